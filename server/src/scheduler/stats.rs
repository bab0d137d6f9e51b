//! What the scheduler tells the metrics.

/// A snapshot of the scheduler. `pages_used + pages_cached + pages_free == pages_total`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SchedulerStats {
    /// Sequences that hold pages.
    pub running: usize,
    /// Sequences in the queue.
    pub waiting: usize,
    /// Pages in the pool now.
    pub pages_total: usize,
    /// Pages that running sequences hold, shared ones counted once.
    pub pages_used: usize,
    /// Pages of cached prefixes that no sequence holds: the next to be evicted.
    pub pages_cached: usize,
    /// Pages without content.
    pub pages_free: usize,
    /// Tokens looked up in the prefix cache, by sequences admitted for the first time.
    pub prefix_query_tokens: u64,
    /// Of those, tokens found.
    pub prefix_hit_tokens: u64,
    /// Times that a sequence lost its pages to others.
    pub preemptions: u64,
}

/// Counters that only grow.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) prefix_query_tokens: u64,
    pub(super) prefix_hit_tokens: u64,
    pub(super) preemptions: u64,
}
