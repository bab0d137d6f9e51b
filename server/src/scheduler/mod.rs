//! The pure scheduler: sequences, waiting queue, page accounting, prefix cache, step plan.
//!
//! Data in, [`StepPlan`] out: no clock, no async, no candle. [`Scheduler::schedule`] decides what the
//! next step runs and allocates its pages; [`Scheduler::commit`] records what the step produced; nothing
//! advances in between, so a failed step is simply not committed and the next plan is the same again.
//!
//! # Policy
//! * A step runs at most `max_num_batched_tokens`. Decode rows come first: every running sequence past its
//!   prompt gets its token (as many sequences run at most as the budget has tokens). What remains goes to
//!   prefill chunks, of running sequences in order of admission, then of newly admitted ones. While others
//!   come behind, a chunk takes half of what remains, so that a long prompt lets short ones pass; what
//!   nobody took goes back to the first. What has to run whole, from a prompt's first image on where its tokens are
//!   filtered, waits until its sequence is the first that prefills and may then run more tokens than the step has.
//! * The queue is first come, first served between requests, and round-robin between the choices of
//!   different requests: after one choice is admitted its request goes to the end. Preempted sequences come
//!   before all of them. A sequence is admitted when its whole prompt fits besides what running prefills
//!   still need and a watermark (1 % of the pool and one page a layer); one that does not fit is waited
//!   for, never overtaken.
//! * A sequence whose next block a running sequence is just computing is passed over until the block is
//!   there, so that the `n` choices of a prompt, or requests with one system prompt, compute it once.
//! * A running sequence that lacks pages takes them from the most recently admitted one after it, which
//!   goes back to the head of the queue and is computed again later (from its cached blocks, if they
//!   survive). The last admitted has nobody to take from and sits the step out. So the first admitted
//!   always advances, and every sequence ends: [`Scheduler::add`] refuses what cannot run even alone.
//! * A demoted sequence ([`Scheduler::demote`]) stands behind all others and decodes in every fourth step while
//!   there are any.

mod commit;
mod demote;
mod kv_pages;
mod page_pool;
mod prefix_cache;
mod resize;
mod schedule;
mod seal;
mod sequence;
mod stats;
#[cfg(test)]
mod tests;
mod waiting_queue;

pub use demote::DEMOTED_EVERY;
pub use resize::PageCopy;
pub use stats::SchedulerStats;

use std::sync::Arc;

use model_zoo::compression::{KvDemand, PlanKey};
use model_zoo::kv_cache::PageId;

use kv_pages::KvPages;
use sequence::{Sequence, Sequences};
use stats::Counters;
use waiting_queue::WaitingQueue;

/// Identifies a sequence (one choice of one request) for its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);

/// Limits of the scheduler.
#[derive(Debug, Clone)]
pub struct SchedulerConfig {
    /// Tokens that a step runs at most, over prefill chunks and decode rows.
    pub max_num_batched_tokens: usize,
    /// Sequences that run at once at most.
    pub max_num_seqs: usize,
    /// KV slots in a page.
    pub block_size: usize,
    /// Pages in the pool.
    pub num_pages: usize,
    /// Reuse the KV of equal prefixes.
    pub prefix_caching: bool,
}

/// A sequence to schedule.
#[derive(Debug, Clone)]
pub struct SequenceSpec {
    /// Its identity.
    pub id: SeqId,
    /// The request that it belongs to: the unit of fairness and of `n`.
    pub group: u64,
    /// Prompt tokens.
    pub prompt: Arc<[u32]>,
    /// Images in the prompt, in order, none over another.
    pub images: Arc<[ImageSpan]>,
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// KV slots that its plan fills.
    pub demand: KvDemand,
    /// The class of plans whose KV it can share. Equal keys imply equal demands, as far as shareable.
    pub plan_key: PlanKey,
    /// Sequences share cached prefixes only with equal salts, so that a tenant cannot find out by timing
    /// what another one asked. 0 is the common cache.
    pub cache_salt: u64,
    /// Keep the prefix cache from answering, so that every prompt position is computed (prompt logprobs).
    /// Of `n` choices one is enough: the others share its prompt.
    pub bypass_prefix_cache: bool,
}

/// Prompt tokens that stand for an image: their KV depends on the image, not on their ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageSpan {
    /// Index in the prompt of its first token.
    pub start: usize,
    /// Its tokens.
    pub num_tokens: usize,
    /// Digest of the image and of how it was encoded: equal digests mean equal embeddings.
    pub digest: [u32; 8],
}

/// One sequence's part in the next step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScheduledSeq {
    /// The sequence.
    pub id: SeqId,
    /// Index in the sequence (prompt followed by output) of the first token to run.
    pub first_pos: usize,
    /// Tokens to run from there.
    pub num_tokens: usize,
    /// The step reaches the sequence's last known token, so its logits are sampled.
    pub samples: bool,
}

/// What the next step runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepPlan {
    /// Rows, decode first, then prefill chunks.
    pub rows: Vec<ScheduledSeq>,
    /// Sequences that lost their pages since the last committed step and went back to the head of the
    /// queue: whatever is kept per computed token starts anew. With nothing else to run, one can be in
    /// `rows` again at once.
    pub preempted: Vec<SeqId>,
}

/// What a committed step produced for one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RowOutcome {
    /// The chunk's KV is written; more of the prompt is to come.
    Prefilled,
    /// A token was sampled and the sequence goes on.
    Sampled(u32),
    /// The sequence ended with this step (a sampled token may have been its last). A row whose
    /// computation failed is not committed at all: abort it first, so that its KV is never shared.
    Finished,
}

/// Why a sequence was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    /// It could not run to its end even alone.
    #[error("the sequence needs {needed} KV pages and there are {total}")]
    NeverFits {
        /// Pages that it holds at its last token.
        needed: usize,
        /// Pages that the pool has, or will have once it has shrunk.
        total: usize,
    },
    /// A live sequence has this id.
    #[error("a live sequence has this id")]
    DuplicateId,
    /// There is no token to begin with.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
}

/// Decides what each step runs, and owns the accounting of KV pages.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    sequences: Sequences,
    /// In order of admission, demoted sequences last.
    running: Vec<SeqId>,
    waiting: WaitingQueue,
    kv: KvPages,
    /// The last plan, while nothing has changed since: asked again, the scheduler answers the same.
    plan: Option<StepPlan>,
    /// Steps committed.
    num_steps: u64,
    /// Preempted since the last plan.
    preempted: Vec<SeqId>,
    /// Copies that shrinking has left to be made.
    copies: Vec<PageCopy>,
    /// Preempted in plans that were not committed.
    reported: Vec<SeqId>,
    counters: Counters,
}

impl Scheduler {
    /// A scheduler without sequences. Zero limits count as 1, and no more sequences run at once than a
    /// step has tokens.
    pub fn new(mut config: SchedulerConfig) -> Self {
        config.block_size = config.block_size.max(1);
        config.max_num_batched_tokens = config.max_num_batched_tokens.max(1);
        config.max_num_seqs = config.max_num_seqs.clamp(1, config.max_num_batched_tokens);
        Self {
            kv: KvPages::new(config.block_size, config.num_pages),
            config,
            sequences: Sequences::default(),
            running: Vec::new(),
            waiting: WaitingQueue::default(),
            plan: None,
            num_steps: 0,
            preempted: Vec::new(),
            copies: Vec::new(),
            reported: Vec::new(),
            counters: Counters::default(),
        }
    }

    /// Puts a sequence into the queue.
    ///
    /// # Errors
    /// [`AddError`]; the scheduler is as before.
    pub fn add(&mut self, spec: SequenceSpec) -> Result<(), AddError> {
        if spec.prompt.is_empty() {
            return Err(AddError::EmptyPrompt);
        }
        if self.sequences.0.contains_key(&spec.id) {
            return Err(AddError::DuplicateId);
        }
        let needed = self.kv.peak_of(&spec.demand, Sequence::max_computed(&spec));
        let total = self.config.num_pages;
        if needed > total {
            return Err(AddError::NeverFits { needed, total });
        }
        self.plan = None;
        self.waiting.push(spec.group, spec.id);
        self.sequences.0.insert(spec.id, Sequence::new(spec, needed));
        Ok(())
    }

    /// Ends a sequence, waiting or running, and takes its pages back at once; a plan that has a row of it
    /// is committed without that row. False when there is no such sequence.
    pub fn abort(&mut self, id: SeqId) -> bool {
        if !self.sequences.0.contains_key(&id) {
            return false;
        }
        self.plan = None;
        self.preempted.retain(|&preempted| preempted != id);
        self.reported.retain(|&preempted| preempted != id);
        match self.running.iter().position(|&running| running == id) {
            Some(index) => drop(self.running.remove(index)),
            None => self.waiting.remove(id),
        }
        self.drop_sequence(id);
        self.settle_num_pages();
        true
    }

    fn drop_sequence(&mut self, id: SeqId) {
        if let Some(mut seq) = self.sequences.0.remove(&id) {
            self.kv.release(&mut seq);
        }
    }

    /// The tokens of a live sequence: prompt followed by output so far.
    pub fn tokens(&self, id: SeqId) -> Option<&[u32]> {
        self.sequences.0.get(&id).map(|seq| seq.tokens.as_slice())
    }

    /// `[layer]`: the pages of a live sequence in slot order. They cover what the current plan writes.
    pub fn block_tables(&self, id: SeqId) -> Option<&[Vec<PageId>]> {
        self.sequences.0.get(&id).map(|seq| seq.block_tables.as_slice())
    }

    /// `[layer]`: KV slots that a live sequence fills before the next step.
    pub fn kv_len(&self, id: SeqId) -> Option<&[usize]> {
        self.sequences.0.get(&id).map(|seq| seq.kv_len.as_slice())
    }

    /// Prompt tokens of a live sequence that the prefix cache had when it was first admitted; `None`
    /// before that.
    pub fn num_cached_tokens(&self, id: SeqId) -> Option<usize> {
        self.sequences.0.get(&id)?.num_cached
    }

    /// Whether any sequence is live. Then [`Scheduler::schedule`] has at least one row.
    pub fn has_work(&self) -> bool {
        !self.sequences.0.is_empty()
    }

    /// Counts for the metrics.
    pub fn stats(&self) -> SchedulerStats {
        let (pages_total, pages_free) = (self.kv.num_pages(), self.kv.num_free());
        let pages_cached = self.kv.num_cached();
        SchedulerStats {
            running: self.running.len(),
            waiting: self.waiting.len(),
            pages_total,
            pages_used: pages_total - pages_free - pages_cached,
            pages_cached,
            pages_free,
            prefix_query_tokens: self.counters.prefix_query_tokens,
            prefix_hit_tokens: self.counters.prefix_hit_tokens,
            preemptions: self.counters.preemptions,
        }
    }
}
