//! Changing the KV budget of a running scheduler.
//!
//! A pool that shrinks evicts the cached prefixes beyond its new end, and moves what sequences hold there to free
//! pages below, which it makes free, if it has to, by evicting further prefixes, the least recently used first,
//! and then by preempting sequences, the most recently admitted first. No sequence fails.

use std::collections::HashMap;

use model_zoo::compression::PlanKey;
use model_zoo::kv_cache::PageId;

use super::kv_pages::KvPages;
use super::sequence::Sequence;
use super::{Scheduler, SeqId};

/// A page whose content has to be copied to another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageCopy {
    /// Beyond the pool's end, perhaps.
    pub from: PageId,
    /// Within the pool.
    pub to: PageId,
}

impl Scheduler {
    /// Changes the pool to `num_pages` pages and returns how many it has now. Growing takes effect at
    /// once, so the storage must have grown before. Shrinking takes effect at once too, and leaves copies to be
    /// made ([`Scheduler::drain_copies`]) before the storage is cut; where a live sequence could then not run to
    /// its end, the pool keeps what that one needs, and shrinks further as such sequences end (see
    /// [`Scheduler::num_pages`]).
    pub fn set_num_pages(&mut self, num_pages: usize) -> usize {
        self.config.num_pages = num_pages;
        self.settle_num_pages();
        self.kv.num_pages()
    }

    /// Pages in the pool now.
    pub fn num_pages(&self) -> usize {
        self.kv.num_pages()
    }

    /// The copies that shrinking has left since the last call. All of them have to be made, in this order, before
    /// the next step runs and before storage beyond [`Scheduler::num_pages`] is cut.
    pub fn drain_copies(&mut self) -> Vec<PageCopy> {
        std::mem::take(&mut self.copies)
    }

    /// Has live sequences computed anew, each under a new key: their KV was written by weights that are going
    /// away. Those that run lose their pages and go back to the head of the queue in their order.
    pub fn recompute(&mut self, changed: &HashMap<SeqId, PlanKey>) {
        for index in (0..self.running.len()).rev() {
            if changed.contains_key(&self.running[index]) {
                self.plan = None;
                self.preempt(index);
            }
        }
        for (id, &key) in changed {
            if let Some(seq) = self.sequences.0.get_mut(id) {
                seq.spec.plan_key = key;
            }
        }
    }

    /// Whether a sequence has all of its KV and runs token by token.
    pub fn is_decoding(&self, id: SeqId) -> bool {
        self.sequences.0.get(&id).is_some_and(|seq| seq.num_computed > 0 && seq.is_decoding())
    }

    /// Has decoding sequences go on, each under a new key, over the KV that they have, which other weights have made.
    /// What they compute is not shared until they lose their pages and begin anew.
    pub fn continue_as(&mut self, changed: &HashMap<SeqId, PlanKey>) {
        for (id, &key) in changed {
            if let Some(seq) = self.sequences.0.get_mut(id) {
                seq.spec.plan_key = key;
                seq.is_mixed = true;
            }
        }
    }

    /// Brings the pool to its configured size, or as near as the live sequences allow.
    pub(super) fn settle_num_pages(&mut self) {
        let wanted = self.config.num_pages;
        if self.kv.num_pages() == wanted {
            return;
        }
        let needed = self.sequences.0.values().map(|seq| seq.max_pages).max().unwrap_or(0);
        let num_pages = wanted.max(needed);
        if self.kv.num_pages() != num_pages {
            self.plan = None;
            self.vacate_from(num_pages);
            self.kv.resize(num_pages);
        }
    }

    /// Leaves no page from `num_pages` on in the hands of a sequence.
    fn vacate_from(&mut self, num_pages: usize) {
        let limit = PageId::try_from(num_pages).unwrap_or(PageId::MAX);
        self.kv.evict_from(limit);
        let mut beyond = self.pages_beyond(limit);
        while !self.kv.make_free_below(limit, beyond.len()) {
            let Some(last) = self.running.len().checked_sub(1) else { return };
            self.preempt(last);
            self.kv.evict_from(limit);
            beyond = self.pages_beyond(limit);
        }
        let target: HashMap<PageId, PageId> = beyond.into_iter().map(|page| (page, self.kv.take())).collect();
        let mut copies: Vec<_> = target.iter().map(|(&from, &to)| PageCopy { from, to }).collect();
        copies.sort_by_key(|copy| copy.from);
        self.copies.append(&mut copies);
        for &id in &self.running {
            self.kv.relocate(&mut self.sequences[id], &target);
        }
    }

    /// The pages from `limit` on that sequences hold, each once.
    fn pages_beyond(&self, limit: PageId) -> Vec<PageId> {
        let tables = self.running.iter().flat_map(|&id| &self.sequences[id].block_tables);
        let mut pages: Vec<PageId> = tables.flatten().copied().filter(|&page| page >= limit).collect();
        pages.sort_unstable();
        pages.dedup();
        pages
    }
}

impl KvPages {
    /// Frees the cached blocks that nobody refers to and that hold a page from `limit` on.
    fn evict_from(&mut self, limit: PageId) {
        let pages = self.cache.evict_from(limit);
        self.give_back(pages);
    }

    /// Evicts idle blocks until `count` pages below `limit` are free. False when there are not as many.
    fn make_free_below(&mut self, limit: PageId, count: usize) -> bool {
        let mut num_free = self.pool.num_free_below(limit);
        while num_free < count {
            let Some(pages) = self.cache.evict() else { return false };
            num_free += pages.iter().filter(|held| held.page < limit).count();
            self.give_back(pages);
        }
        true
    }

    /// Replaces pages in the tables of `seq` and in the cached blocks that it refers to.
    fn relocate(&mut self, seq: &mut Sequence, target: &HashMap<PageId, PageId>) {
        for page in seq.block_tables.iter_mut().flatten() {
            *page = target.get(page).copied().unwrap_or(*page);
        }
        for &block in &seq.shared.blocks {
            self.cache.relocate(block, target);
        }
    }
}
