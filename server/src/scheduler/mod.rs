//! The pure scheduler: sequences, waiting queue, page accounting, prefix cache, step plan.
//!
//! Data in, [`StepPlan`] out: no clock, no async, no candle. [`Scheduler::schedule`] decides what the
//! next step runs and allocates its pages; [`Scheduler::commit`] records what the step produced; nothing
//! advances in between, so a failed step is simply not committed.

use std::sync::Arc;

use model_zoo::compression::{KvDemand, PlanKey};
use model_zoo::kv_cache::PageId;

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
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// KV slots that its plan fills.
    pub demand: KvDemand,
    /// The class of plans whose KV it can share. Equal keys imply equal demands.
    pub plan_key: PlanKey,
    /// Sequences share cached prefixes only with equal salts, so that a tenant cannot find out by timing
    /// what another one asked. 0 is the common cache.
    pub cache_salt: u64,
    /// Keep the prefix cache from answering, so that every prompt position is computed (prompt logprobs).
    /// Of `n` choices one is enough: the others share its prompt.
    pub bypass_prefix_cache: bool,
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
