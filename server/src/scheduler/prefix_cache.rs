//! KV of token prefixes that several sequences share: a forest of blocks with reference counts.
//!
//! A block is the KV of a run of tokens after a given parent block, one or more pages for each layer that
//! holds slots. Chains begin at a [`CacheKey`]. Children are found by comparing their tokens, not a digest
//! of them: two different prefixes can never be taken for one another. (Images are the exception: they
//! count by their SHA-256.) (vLLM's chained block hashes find
//! the same blocks; SGLang's radix tree is this forest with edges of any length.)
//!
//! Invariants: whoever refers to a block refers to its parent; a block without references is idle and may
//! be evicted, the least recently used first, and that is never one with children.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use model_zoo::compression::PlanKey;
use model_zoo::kv_cache::PageId;

/// Everything besides the tokens that must be equal for KV to be shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct CacheKey {
    pub(super) plan_key: PlanKey,
    pub(super) salt: u64,
}

/// Identifies a block for ever: ids are not reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct BlockId(u64);

/// What a block comes after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Parent {
    /// Nothing: it is the first of its chain.
    Root(CacheKey),
    /// Another block.
    Block(BlockId),
}

/// A page and the layer whose slots it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LayerPage {
    pub(super) layer: u32,
    pub(super) page: PageId,
}

type Children = HashMap<Arc<[u32]>, BlockId>;

#[derive(Debug)]
struct Block {
    parent: Parent,
    tokens: Arc<[u32]>,
    /// In order of layer, then slot.
    pages: Box<[LayerPage]>,
    children: Children,
    num_refs: usize,
    /// Key in `idle` while there are no references.
    idle_since: u64,
}

/// The forest.
#[derive(Debug, Default)]
pub(super) struct PrefixCache {
    roots: HashMap<CacheKey, Children>,
    blocks: HashMap<BlockId, Block>,
    /// Blocks without references, by the time of their last release.
    idle: BTreeMap<u64, BlockId>,
    num_idle_pages: usize,
    /// Counts insertions and releases: the source of ids and of times.
    ticks: u64,
}

impl PrefixCache {
    /// Pages of blocks that nobody refers to.
    pub(super) fn num_idle_pages(&self) -> usize {
        self.num_idle_pages
    }

    /// The block of `tokens` after `parent`.
    pub(super) fn child(&self, parent: Parent, tokens: &[u32]) -> Option<BlockId> {
        let children = match parent {
            Parent::Root(key) => self.roots.get(&key),
            Parent::Block(id) => self.blocks.get(&id).map(|block| &block.children),
        };
        children?.get(tokens).copied()
    }

    /// The pages of a block, in order of layer, then slot.
    pub(super) fn pages(&self, id: BlockId) -> &[LayerPage] {
        &self.block(id).pages
    }

    /// Sequences that refer to the block.
    pub(super) fn num_refs(&self, id: BlockId) -> usize {
        self.block(id).num_refs
    }

    /// Whether nobody refers to the block.
    pub(super) fn is_idle(&self, id: BlockId) -> bool {
        self.block(id).num_refs == 0
    }

    /// Adds the block of `tokens` after `parent`, which has no such child, with one reference. The cache
    /// owns `pages` from now on.
    pub(super) fn insert(&mut self, parent: Parent, tokens: &[u32], pages: Box<[LayerPage]>) -> BlockId {
        let id = BlockId(self.tick());
        let tokens: Arc<[u32]> = tokens.into();
        self.children_mut(parent).insert(tokens.clone(), id);
        let block = Block { parent, tokens, pages, children: Children::new(), num_refs: 1, idle_since: 0 };
        self.blocks.insert(id, block);
        id
    }

    /// Adds a reference.
    pub(super) fn acquire(&mut self, id: BlockId) {
        let block = self.block_mut(id);
        block.num_refs += 1;
        if block.num_refs == 1 {
            let (since, num_pages) = (block.idle_since, block.pages.len());
            self.idle.remove(&since);
            self.num_idle_pages -= num_pages;
        }
    }

    /// Drops a reference. Release the blocks of a chain from its end, so that children become idle, and
    /// are evicted, before their parents.
    pub(super) fn release(&mut self, id: BlockId) {
        let now = self.tick();
        let block = self.block_mut(id);
        block.num_refs -= 1;
        if block.num_refs == 0 {
            block.idle_since = now;
            let num_pages = block.pages.len();
            self.idle.insert(now, id);
            self.num_idle_pages += num_pages;
        }
    }

    /// Removes the least recently used idle block and hands out its pages. `None` when none is idle.
    pub(super) fn evict(&mut self) -> Option<Box<[LayerPage]>> {
        let (_, &id) = self.idle.first_key_value()?;
        Some(self.remove(id))
    }

    /// Removes idle blocks that hold a page from `limit` on, with all that comes after them, and hands out
    /// their pages.
    pub(super) fn evict_from(&mut self, limit: PageId) -> Vec<LayerPage> {
        let holds_high = |id: &BlockId| self.pages(*id).iter().any(|held| held.page >= limit);
        let mut doomed: Vec<BlockId> = self.idle.values().copied().filter(holds_high).collect();
        let mut pages = Vec::new();
        // A descendant is reached from its parent and perhaps on its own: the second time it is gone.
        while let Some(id) = doomed.pop() {
            if let Some(block) = self.blocks.get(&id) {
                doomed.extend(block.children.values());
                pages.extend(self.remove(id));
            }
        }
        pages
    }

    /// Replaces the pages of a block that are in `target`.
    pub(super) fn relocate(&mut self, id: BlockId, target: &HashMap<PageId, PageId>) {
        for held in &mut self.block_mut(id).pages {
            held.page = target.get(&held.page).copied().unwrap_or(held.page);
        }
    }

    fn remove(&mut self, id: BlockId) -> Box<[LayerPage]> {
        let block = self.blocks.remove(&id).expect("invariant: idle and child blocks exist");
        self.idle.remove(&block.idle_since);
        self.num_idle_pages -= block.pages.len();
        match block.parent {
            Parent::Root(key) => {
                let children = self.children_mut(block.parent);
                children.remove(&block.tokens);
                if children.is_empty() {
                    self.roots.remove(&key);
                }
            }
            // Eviction from the top of a chain removes the parent first.
            Parent::Block(parent) => {
                if let Some(parent) = self.blocks.get_mut(&parent) {
                    parent.children.remove(&block.tokens);
                }
            }
        }
        block.pages
    }

    fn tick(&mut self) -> u64 {
        self.ticks += 1;
        self.ticks
    }

    fn children_mut(&mut self, parent: Parent) -> &mut Children {
        match parent {
            Parent::Root(key) => self.roots.entry(key).or_default(),
            Parent::Block(id) => &mut self.block_mut(id).children,
        }
    }

    fn block(&self, id: BlockId) -> &Block {
        self.blocks.get(&id).expect("invariant: a block is referred to while it exists")
    }

    fn block_mut(&mut self, id: BlockId) -> &mut Block {
        self.blocks.get_mut(&id).expect("invariant: a block is referred to while it exists")
    }
}
