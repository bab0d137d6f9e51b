//! Page accounting: the one place where pages move between the free pool, sequences and cached blocks.
//!
//! Every page below the limit is free, or in the block table of one sequence, or in one cached block with
//! a count of the sequences that refer to it. Pages are counted by (sequence, layer): how many a layer
//! needs is asked of [`KvDemand`], so that a plan that skips a layer or drops tokens holds less.

use std::borrow::Cow;

use model_zoo::compression::KvDemand;
use model_zoo::compression::think::SealMoves;
use model_zoo::kv_cache::PageId;

use super::SeqId;
use super::page_pool::PagePool;
use super::prefix_cache::{BlockId, LayerPage, Parent, PrefixCache};
use super::sequence::{Sequence, SharedPrefix};

/// All pages, and where they are.
#[derive(Debug)]
pub(super) struct KvPages {
    pub(super) block_size: usize,
    pub(super) pool: PagePool,
    pub(super) cache: PrefixCache,
    /// Sequences sealed and not yet told of.
    pub(super) seals: Vec<(SeqId, SealMoves)>,
}

/// What the prefix cache knows of a sequence.
#[derive(Debug, Default)]
pub(super) struct PrefixHit {
    blocks: Vec<BlockId>,
    /// Tokens that the blocks cover.
    pub(super) num_tokens: usize,
    /// Pages of those blocks that count as available until the hit is taken.
    pub(super) num_idle_pages: usize,
}

/// A block that a sequence looks for or is about to publish.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NextBlock<'a> {
    parent: Parent,
    /// What its KV depends on besides its parent.
    key: Cow<'a, [u32]>,
    /// Token of the sequence at which it ends.
    end: usize,
}

impl KvPages {
    pub(super) fn new(block_size: usize, num_pages: usize) -> Self {
        Self {
            block_size,
            pool: PagePool::new(page_limit(num_pages)),
            cache: PrefixCache::default(),
            seals: Vec::new(),
        }
    }

    /// Pages that exist, in whatever state.
    pub(super) fn num_pages(&self) -> usize {
        self.pool.limit() as usize
    }

    pub(super) fn num_free(&self) -> usize {
        self.pool.num_free()
    }

    /// Pages of cached blocks that no sequence refers to.
    pub(super) fn num_cached(&self) -> usize {
        self.cache.num_idle_pages()
    }

    /// Pages that a sequence can get: free ones and those of idle cached blocks.
    pub(super) fn num_available(&self) -> usize {
        self.num_free() + self.num_cached()
    }

    /// Pages that the first `num_tokens` tokens of a sequence fill, over all layers.
    pub(super) fn pages_of(&self, demand: &KvDemand, num_tokens: usize) -> usize {
        demand.num_pages(self.block_size, num_tokens)
    }

    /// Pages that a sequence holds at most on the way to its first `num_tokens` tokens, over all layers.
    pub(super) fn peak_of(&self, demand: &KvDemand, num_tokens: usize) -> usize {
        let pages = self.pages_of(demand, num_tokens);
        match demand.seal() {
            Some(seal) if num_tokens >= seal.at() => {
                pages.max(self.pages_of(demand, seal.at()) + 2 * demand.num_layers())
            }
            _ => match demand.filter().map(|filter| filter.whole().end) {
                Some(prompt_len) if num_tokens >= prompt_len => pages.max(self.pages_of(demand, prompt_len)),
                _ => pages,
            },
        }
    }

    /// Pages that `seq` lacks to hold its first `num_tokens` tokens.
    pub(super) fn pages_missing(&self, seq: &Sequence, num_tokens: usize) -> usize {
        if seq.is_seal_due() {
            return self.seal_cost(seq);
        }
        let demand = &seq.spec.demand;
        let num_tokens = match demand.seal() {
            Some(seal) if !seq.sealed => num_tokens.min(seal.at()),
            _ if seq.dropped.is_none() => {
                num_tokens.min(demand.filter().map_or(usize::MAX, |filter| filter.whole().end))
            }
            _ => num_tokens,
        };
        let pages = |layer| seq.layer_pages(layer, self.block_size, num_tokens);
        let held: usize = seq.block_tables.iter().map(Vec::len).sum();
        (0..demand.num_layers()).map(pages).sum::<usize>().saturating_sub(held)
    }

    /// Gives `seq` the pages for its first `num_tokens` tokens, evicting idle blocks where needed. Does
    /// nothing and returns false when there are not enough.
    pub(super) fn grow(&mut self, seq: &mut Sequence, num_tokens: usize) -> bool {
        if self.pages_missing(seq, num_tokens) > self.num_available() {
            return false;
        }
        if seq.is_seal_due() {
            self.seal(seq);
            return self.grow(seq, num_tokens);
        }
        for layer in 0..seq.block_tables.len() {
            let needed = seq.layer_pages(layer, self.block_size, num_tokens);
            while seq.block_tables[layer].len() < needed {
                seq.block_tables[layer].push(self.take());
            }
        }
        true
    }

    /// Frees the pages of `seq` behind those that its computed tokens fill.
    pub(super) fn trim(&mut self, seq: &mut Sequence) {
        for layer in 0..seq.block_tables.len() {
            let needed = seq.layer_pages(layer, self.block_size, seq.num_computed);
            let table = &mut seq.block_tables[layer];
            for page in table.drain(needed.min(table.len())..) {
                self.pool.give_back(page);
            }
        }
    }

    pub(super) fn take(&mut self) -> PageId {
        while self.pool.num_free() == 0 {
            let pages = self.cache.evict().expect("invariant: the pages were counted before");
            self.give_back(pages);
        }
        self.pool.take().expect("invariant: a page is free")
    }

    /// Takes every page from `seq`: its own become free, those of cached blocks stay cached.
    pub(super) fn release(&mut self, seq: &mut Sequence) {
        for (layer, table) in seq.block_tables.iter_mut().enumerate() {
            let num_shared = seq.spec.demand.kv_len(layer, seq.shared.num_tokens) / self.block_size;
            for page in table.drain(..).skip(num_shared) {
                self.pool.give_back(page);
            }
        }
        for &block in seq.shared.blocks.iter().rev() {
            self.cache.release(block);
        }
        seq.shared = SharedPrefix::default();
        seq.num_computed = 0;
        seq.num_scheduled = 0;
        seq.sealed = false;
        seq.is_mixed = false;
        (seq.dropped, seq.dropping) = (None, None);
        seq.kv_len.fill(0);
    }

    /// Finds the longest cached prefix of `seq` that leaves its last token to be computed.
    pub(super) fn lookup(&self, seq: &Sequence) -> PrefixHit {
        let mut hit = PrefixHit::default();
        if !seq.reads_cache() {
            return hit;
        }
        while let Some(NextBlock { parent, key, end }) = self.next_block(seq, &hit) {
            let Some(block) = self.cache.child(parent, &key) else { break };
            if self.cache.is_idle(block) {
                hit.num_idle_pages += self.cache.pages(block).len();
            }
            hit.num_tokens = end;
            hit.blocks.push(block);
        }
        hit
    }

    /// The block that `seq` could have found after `hit`, had it been there.
    pub(super) fn next_block<'a>(&self, seq: &'a Sequence, hit: &PrefixHit) -> Option<NextBlock<'a>> {
        let parent = hit.blocks.last().map_or(Parent::Root(seq.cache_key()), |&id| Parent::Block(id));
        let known = seq.reusable(seq.tokens.len() - 1);
        let end = self.next_border(&seq.spec.demand, hit.num_tokens, known)?;
        Some(NextBlock { parent, key: seq.block_key(hit.num_tokens..end), end })
    }

    /// The block that a running `seq` is going to publish next, if its tokens are known already.
    pub(super) fn unpublished_block<'a>(&self, seq: &'a Sequence) -> Option<NextBlock<'a>> {
        if seq.sealed {
            return None;
        }
        let start = seq.shared.num_tokens;
        let end = self.next_border(&seq.spec.demand, start, seq.shareable(seq.tokens.len()))?;
        Some(NextBlock { parent: seq.chain_end(), key: seq.block_key(start..end), end })
    }

    /// Gives `seq`, which holds no page, the blocks of `hit` as its computed prefix.
    pub(super) fn adopt(&mut self, seq: &mut Sequence, hit: PrefixHit) {
        for &block in &hit.blocks {
            self.cache.acquire(block);
            for held in self.cache.pages(block) {
                seq.block_tables[held.layer as usize].push(held.page);
            }
        }
        seq.num_computed = hit.num_tokens;
        seq.refresh_kv_len();
        seq.shared =
            SharedPrefix { blocks: hit.blocks, num_tokens: hit.num_tokens, num_scanned: hit.num_tokens };
    }

    /// Hands the computed full blocks of `seq` to the cache, keeping a reference. Where the cache has an
    /// equal block already, `seq` goes on with that one and its own pages become free.
    pub(super) fn publish(&mut self, seq: &mut Sequence) {
        let end = seq.shareable(seq.num_computed);
        while seq.shared.num_scanned + self.block_size <= end {
            seq.shared.num_scanned += self.block_size;
            if self.is_border(&seq.spec.demand, seq.shared.num_scanned) {
                self.publish_block(seq, seq.shared.num_scanned);
            }
        }
    }

    fn publish_block(&mut self, seq: &mut Sequence, end: usize) {
        let start = seq.shared.num_tokens;
        let (parent, key) = (seq.chain_end(), seq.block_key(start..end));
        let own = self.block_pages(seq, start, end);
        let block = match self.cache.child(parent, &key) {
            Some(block) => {
                self.cache.acquire(block);
                self.exchange(seq, start, block);
                block
            }
            None => self.cache.insert(parent, &key, own),
        };
        seq.shared.blocks.push(block);
        seq.shared.num_tokens = end;
    }

    /// Replaces the own pages of `seq` from token `start` on with those of `block`.
    fn exchange(&mut self, seq: &mut Sequence, start: usize, block: BlockId) {
        let mut next: Vec<usize> = self.first_pages(&seq.spec.demand, start).collect();
        for &LayerPage { layer, page } in self.cache.pages(block) {
            let layer = layer as usize;
            let own = std::mem::replace(&mut seq.block_tables[layer][next[layer]], page);
            self.pool.give_back(own);
            next[layer] += 1;
        }
    }

    /// The pages of `seq` that hold its tokens `start..end`, both block borders.
    fn block_pages(&self, seq: &Sequence, start: usize, end: usize) -> Box<[LayerPage]> {
        let demand = &seq.spec.demand;
        let ranges = self.first_pages(demand, start).zip(self.first_pages(demand, end));
        let tables = (0u32..).zip(&seq.block_tables);
        let of_layer = |((layer, table), (first, end)): ((u32, &Vec<PageId>), (usize, usize))| {
            table[first..end].iter().map(|&page| LayerPage { layer, page }).collect::<Vec<_>>()
        };
        tables.zip(ranges).flat_map(of_layer).collect()
    }

    /// `[layer]`: index in the block table of the page in which token `border`, a block border, begins.
    fn first_pages<'a>(&self, demand: &'a KvDemand, border: usize) -> impl Iterator<Item = usize> + use<'a> {
        let block_size = self.block_size;
        (0..demand.num_layers()).map(move |layer| demand.kv_len(layer, border) / block_size)
    }

    /// Whether the pages of the first `num_tokens` tokens are full in every layer, so that a block can
    /// end here and the next begin.
    fn is_border(&self, demand: &KvDemand, num_tokens: usize) -> bool {
        (0..demand.num_layers()).all(|layer| demand.kv_len(layer, num_tokens).is_multiple_of(self.block_size))
    }

    /// The first block border after `start`, up to `end` inclusive.
    fn next_border(&self, demand: &KvDemand, start: usize, end: usize) -> Option<usize> {
        (start + self.block_size..=end).step_by(self.block_size).find(|&t| self.is_border(demand, t))
    }

    /// Changes the pool to pages `0..num_pages`. Neither a sequence nor the cache may hold a page beyond.
    pub(super) fn resize(&mut self, num_pages: usize) {
        self.pool.resize(page_limit(num_pages));
    }

    pub(super) fn give_back(&mut self, pages: impl IntoIterator<Item = LayerPage>) {
        for held in pages {
            self.pool.give_back(held.page);
        }
    }
}

fn page_limit(num_pages: usize) -> PageId {
    PageId::try_from(num_pages).unwrap_or(PageId::MAX)
}
