//! The free pages. The lowest free page is taken first, so that the pages in use stay dense at the low
//! end: untouched memory stays untouched, and a shrinking pool finds its high pages free.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use model_zoo::kv_cache::PageId;

/// Which pages of `0..limit` are free. Who holds the others is said by block tables and cached blocks.
#[derive(Debug)]
pub(super) struct PagePool {
    /// Pages that were in use and came back, all below `num_touched`.
    returned: BinaryHeap<Reverse<PageId>>,
    /// Pages from here on were never taken.
    num_touched: PageId,
    limit: PageId,
}

impl PagePool {
    pub(super) fn new(limit: PageId) -> Self {
        Self { returned: BinaryHeap::new(), num_touched: 0, limit }
    }

    pub(super) fn limit(&self) -> PageId {
        self.limit
    }

    pub(super) fn num_free(&self) -> usize {
        self.returned.len() + (self.limit - self.num_touched) as usize
    }

    /// Free pages below `limit`.
    pub(super) fn num_free_below(&self, limit: PageId) -> usize {
        let returned = self.returned.iter().filter(|&&Reverse(page)| page < limit).count();
        returned + limit.min(self.limit).saturating_sub(self.num_touched) as usize
    }

    /// Takes the lowest free page.
    pub(super) fn take(&mut self) -> Option<PageId> {
        if let Some(Reverse(page)) = self.returned.pop() {
            return Some(page);
        }
        if self.num_touched == self.limit {
            return None;
        }
        self.num_touched += 1;
        Some(self.num_touched - 1)
    }

    pub(super) fn give_back(&mut self, page: PageId) {
        debug_assert!(page < self.num_touched, "page {page} was never taken");
        self.returned.push(Reverse(page));
    }

    /// Changes the pool to pages `0..limit`. Pages from `limit` on must be free.
    pub(super) fn resize(&mut self, limit: PageId) {
        self.returned.retain(|&Reverse(page)| page < limit);
        self.num_touched = self.num_touched.min(limit);
        self.limit = limit;
    }
}
