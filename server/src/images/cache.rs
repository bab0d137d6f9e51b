//! Embeddings of images that were shown before, inside a byte budget: the least recently used go first.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use model_zoo::vision::ImageEmbeddings;

/// The cache, by the digest of the image's file.
#[derive(Debug)]
pub(super) struct EmbeddingCache {
    budget: usize,
    bytes: usize,
    entries: HashMap<[u8; 32], (u64, Arc<ImageEmbeddings>)>,
    /// Digests by the time of their last use.
    order: BTreeMap<u64, [u8; 32]>,
    /// Counts uses: the source of times.
    ticks: u64,
}

impl EmbeddingCache {
    /// A cache of `budget` bytes.
    pub(super) fn new(budget: usize) -> Self {
        Self { budget, bytes: 0, entries: HashMap::new(), order: BTreeMap::new(), ticks: 0 }
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The image of this digest, which counts as used.
    pub(super) fn get(&mut self, digest: &[u8; 32]) -> Option<Arc<ImageEmbeddings>> {
        let (used, embeddings) = self.entries.get_mut(digest)?;
        self.order.remove(used);
        self.ticks += 1;
        *used = self.ticks;
        self.order.insert(self.ticks, *digest);
        Some(Arc::clone(embeddings))
    }

    /// Keeps an image, if it fits at all.
    pub(super) fn insert(&mut self, embeddings: &Arc<ImageEmbeddings>) {
        let (digest, bytes) = (*embeddings.digest(), embeddings.bytes());
        if bytes > self.budget || self.get(&digest).is_some() {
            return;
        }
        while self.bytes + bytes > self.budget {
            let Some((_, oldest)) = self.order.pop_first() else { return };
            if let Some((_, evicted)) = self.entries.remove(&oldest) {
                self.bytes -= evicted.bytes();
            }
        }
        self.ticks += 1;
        self.bytes += bytes;
        self.order.insert(self.ticks, digest);
        self.entries.insert(digest, (self.ticks, Arc::clone(embeddings)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_holds_and_the_least_recently_used_go() {
        let image = |n: u8, rows: usize| Arc::new(ImageEmbeddings::new(4, vec![0.0; 4 * rows], [n; 32]));
        let mut cache = EmbeddingCache::new(100);
        for n in [1, 2, 3] {
            cache.insert(&image(n, 2));
        }
        assert_eq!(cache.bytes(), 96);
        assert!(cache.get(&[1; 32]).is_some());
        cache.insert(&image(4, 2));
        assert_eq!([1, 2, 3, 4].map(|n| cache.get(&[n; 32]).is_some()), [true, false, true, true]);
        cache.insert(&image(5, 7));
        assert!(cache.get(&[5; 32]).is_none(), "what is larger than the budget evicts nobody");
        cache.insert(&image(4, 2));
        cache.insert(&image(6, 6));
        assert_eq!((cache.bytes(), cache.get(&[6; 32]).is_some()), (96, true));
    }
}
