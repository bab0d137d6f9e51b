//! Changing the KV budget of a running scheduler.

use super::Scheduler;

impl Scheduler {
    /// Changes the pool to `num_pages` pages and returns how many it has now. Growing takes effect at
    /// once, so the storage must have grown before. Shrinking evicts cached prefixes and preempts the
    /// sequences that hold pages beyond the new end, so that the storage can be cut there; where a live
    /// sequence could then not run to its end, the pool keeps what that one needs, and shrinks further
    /// as such sequences end (see [`super::SchedulerStats::pages_total`]).
    pub fn set_num_pages(&mut self, num_pages: usize) -> usize {
        self.config.num_pages = num_pages;
        self.settle_num_pages();
        self.kv.num_pages()
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
            self.preempt_beyond(num_pages);
            self.kv.resize(num_pages);
        }
    }

    /// Preempts every sequence that holds a page from `num_pages` on, the most recently admitted first,
    /// so that the queue has them in order of admission.
    fn preempt_beyond(&mut self, num_pages: usize) {
        for index in (0..self.running.len()).rev() {
            let seq = &self.sequences[self.running[index]];
            if seq.block_tables.iter().flatten().any(|&page| page as usize >= num_pages) {
                self.preempt(index);
            }
        }
    }
}
