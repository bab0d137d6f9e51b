//! Closing the gaps that dropped tokens leave in a sequence's slots.

use super::{KvCache, KvLayout, PageId};
use crate::Result;

/// What is kept of a sequence's slots in a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptSlots<'a> {
    /// Its pages, dense ones.
    pub table: &'a [PageId],
    /// The slot from which on the others are counted; those before it stay.
    pub first: usize,
    /// Slots that are kept, ascending; there are pages for all of them.
    pub kept: Vec<usize>,
}

impl KvCache {
    /// Moves the slots `first + kept[i]` of each of `lists` to `first + i`. What was in the slots behind them means nothing
    /// then.
    ///
    /// # Errors
    /// [`crate::ZooError::Device`] when the device that they lie on fails; the pages are lost then.
    pub fn compact(&mut self, lists: &[KeptSlots<'_>]) -> Result<()> {
        if let Some(pages) = self.device_pages_mut() {
            return pages.compact(lists);
        }
        lists.iter().for_each(|list| self.compact_one(list));
        Ok(())
    }

    fn compact_one(&mut self, KeptSlots { table, first, kept }: &KeptSlots<'_>) {
        let KvLayout { num_kv_heads, head_dim, block_size } = self.layout;
        let channels = num_kv_heads * head_dim;
        for (to, &from) in kept.iter().enumerate().filter(|(to, from)| to < from) {
            let [(source, from), (target, to)] =
                [first + from, first + to].map(|slot| (table[slot / block_size], slot % block_size));
            for channel in 0..channels {
                let keys = channel * block_size;
                self.pages_mut().copy((source, keys + from), (target, keys + to), 1);
            }
            for head in 0..num_kv_heads {
                let values = channels * block_size + head * block_size * head_dim;
                let [from, to] = [from, to].map(|slot| values + slot * head_dim);
                self.pages_mut().copy((source, from), (target, to), head_dim);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::attention::write_kv;
    use crate::kernels::cpu::isa::Isa;

    #[test]
    fn compacted_slots_are_as_if_only_what_was_kept_had_been_written() {
        let layout = KvLayout { num_kv_heads: 2, head_dim: 5, block_size: 16 };
        let token = |n: usize| (0..10).map(|c| (n * 10 + c) as f32).collect::<Vec<_>>();
        let write = |kv: &mut KvCache, table: &[PageId], tokens: &[usize]| {
            for (slot, &n) in tokens.iter().enumerate() {
                let (k, v) = (token(n), token(100 + n));
                write_kv(Isa::Portable, (layout, kv.pages_mut()), (table, slot), (&k, &v));
            }
        };
        let kept = [0, 1, 4, 17, 18, 33];
        let mut kv = KvCache::new(layout, 9).expect("memory");
        let all: Vec<usize> = (0..40).collect();
        write(&mut kv, &[5, 2, 7], &all);
        let list = KeptSlots { table: &[5, 2, 7], first: 3, kept: kept.to_vec() };
        kv.compact(&[list]).expect("pages of the host");
        let expected: Vec<usize> = [0, 1, 2].into_iter().chain(kept.map(|slot| slot + 3)).collect();
        write(&mut kv, &[8], &expected);
        for slot in 0..expected.len() {
            for word in 0..10 {
                let key = word * 16 + slot;
                assert_eq!(kv.pages().page(5)[key], kv.pages().page(8)[key]);
                let value = 160 + (word / 5 * 16 + slot) * 5 + word % 5;
                assert_eq!(kv.pages().page(5)[value], kv.pages().page(8)[value]);
            }
        }
    }
}
