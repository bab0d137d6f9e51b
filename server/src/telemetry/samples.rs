//! What the engine tells the metrics. Plain data; no metric is named here.

use std::time::Duration;

use crate::request::FinishReason;

/// What is served, as the info metrics and constant gauges tell it.
#[derive(Debug, Clone, Default)]
pub struct ServedModel {
    /// The name that clients ask for.
    pub model: String,
    /// Architecture name.
    pub architecture: String,
    /// KV slots in a page.
    pub block_size: usize,
    /// Pages in the KV pool.
    pub num_pages: usize,
}

/// The parts of an engine step that are timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepPhase {
    /// Deciding what to run and allocating pages.
    Schedule,
    /// The model's forward pass, building its batch included.
    Forward,
    /// Logits and sampling.
    Sample,
    /// Committing the outcome and sending events.
    Commit,
}

impl StepPhase {
    /// Every phase, in the order of a step.
    pub const ALL: [Self; 4] = [Self::Schedule, Self::Forward, Self::Sample, Self::Commit];

    /// The `phase` label.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Schedule => "schedule",
            Self::Forward => "forward",
            Self::Sample => "sample",
            Self::Commit => "commit",
        }
    }
}

/// One finished engine step.
#[derive(Debug, Clone, Copy, Default)]
pub struct StepSample {
    /// Tokens run in the step, prefill and decode together.
    pub tokens: usize,
    /// Tokens sampled.
    pub sampled: usize,
    /// Time of each phase, indexed as [`StepPhase::ALL`].
    pub phases: [Duration; 4],
}

/// What the scheduler holds after a step.
#[derive(Debug, Clone, Copy, Default)]
pub struct SchedulerGauges {
    /// Sequences in the running batch.
    pub running: usize,
    /// Sequences in the waiting queue.
    pub waiting: usize,
    /// Pages owned by sequences.
    pub pages_used: usize,
    /// Pages kept only for the prefix cache; taken back when needed.
    pub pages_cached: usize,
    /// Pages that hold nothing.
    pub pages_free: usize,
}

/// What of the machine's memory is allowed and held, weights then KV.
#[derive(Debug, Clone, Copy, Default)]
pub struct MemoryGauges {
    /// Bytes that the operator allows.
    pub budget: [u64; 2],
    /// Bytes held: weights, and the KV pool.
    pub held: [u64; 2],
    /// Blocks of elastic weights: held, and all.
    pub blocks: [usize; 2],
}

/// What a finished sequence ran and left out, in sublayers over all its tokens.
#[derive(Debug, Clone, Default)]
pub struct CompressionSample {
    /// Names of the methods in its plan.
    pub methods: Vec<&'static str>,
    /// Attention and FFN sublayers run.
    pub sublayers_run: [u64; 2],
    /// Left out by dropping.
    pub dropped: u64,
    /// FFNs left out by FFN skipping.
    pub ffns_skipped: u64,
    /// Left out by SkipDecode.
    pub too_deep: u64,
    /// Left out for image tokens that were dropped.
    pub visual_left_out: u64,
}

/// The life of one finished sequence (a choice of a request).
#[derive(Debug, Clone, Copy)]
pub struct SequenceTimings {
    /// Arrival → first step that ran it; `None` when it never ran.
    pub queue: Option<Duration>,
    /// First step that ran it → first sampled token; `None` when it sampled none.
    pub prefill: Option<Duration>,
    /// First → last sampled token; `None` when it sampled none.
    pub decode: Option<Duration>,
    /// Arrival → end.
    pub total: Duration,
    /// Prompt tokens.
    pub prompt_tokens: usize,
    /// Sampled tokens.
    pub completion_tokens: usize,
    /// The request's token limit.
    pub max_tokens: usize,
    /// The request's number of choices.
    pub n: usize,
    /// Why it ended.
    pub reason: FinishReason,
}
