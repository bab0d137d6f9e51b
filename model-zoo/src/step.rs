//! What the engine hands a model for one step: a ragged batch of prefill chunks and decode rows.

use crate::compression::{Plan, RowState, Sublayer};
use crate::kv_cache::PageId;
use crate::vision::PromptImage;

/// Which positions of a row's chunk need logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitRows {
    /// A prefill chunk that is not the prompt's last.
    None,
    /// The chunk's last token: the usual case.
    Last,
    /// Every token of the chunk, for prompt log-probabilities.
    All,
}

/// One sequence's part in a step.
#[derive(Debug)]
pub struct StepRow<'a> {
    /// Token ids to run, at least one.
    pub tokens: &'a [u32],
    /// RoPE position of `tokens[0]`. Never derived from a KV length.
    pub first_pos: usize,
    /// The images of the sequence's prompt, in order. Where one of them lies, its embeddings stand for the
    /// tokens, whose ids count for nothing there.
    pub images: &'a [PromptImage],
    /// For each layer, how many KV slots the sequence holds before this step.
    pub kv_len: &'a [usize],
    /// For each layer, the pages of the sequence in order: slot `s` lives in page
    /// `block_tables[layer][s / block_size]` at offset `s % block_size`. They cover the slots that this
    /// step writes.
    pub block_tables: &'a [Vec<PageId>],
    /// Which of `tokens` need logits.
    pub logits: LogitRows,
    /// What of the model this row runs.
    pub plan: &'a Plan,
    /// What the plan has decided so far.
    pub state: &'a mut RowState,
}

/// The linear operators of a layer, by the input that they share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LinearInput {
    /// Normed residual stream: queries, keys and values.
    Qkv,
    /// What attention mixed: its output projection.
    O,
    /// Normed residual stream: the FFN's gate and up projections.
    GateUp,
    /// The gated product: the FFN's down projection.
    Down,
}

/// Looks on while a step runs: for calibration and tests, not for serving.
pub trait Probe: std::fmt::Debug {
    /// `sublayer` of `layer` changed the residual stream of some tokens from `before` to `after`, both
    /// `[tokens, hidden_size]`.
    fn sublayer(&mut self, place: (usize, Sublayer), before: &[f32], after: &[f32]);

    /// The attention of `layer` is about to compare `queries` `[tokens, num_heads, head_dim]` with the
    /// cached keys and `keys` `[tokens, num_kv_heads, head_dim]`, both rotated.
    fn attention(&mut self, layer: usize, queries: &[f32], keys: &[f32]);

    /// The operators of `layer` that share `input` are about to be applied to `x`, `[tokens, their width]`.
    fn linear_input(&mut self, _place: (usize, LinearInput), _x: &[f32]) {}
}

/// A step: rows in the order in which their logits come back.
#[derive(Debug, Default)]
pub struct StepBatch<'a> {
    /// The rows; at least one.
    pub rows: Vec<StepRow<'a>>,
    /// Who looks on.
    pub probe: Option<&'a mut dyn Probe>,
}

impl StepRow<'_> {
    /// The embedding that an image puts in the place of token `index` of the row, `[hidden_size]`.
    pub fn image_row(&self, index: usize) -> Option<&[f32]> {
        PromptImage::row(self.images, self.first_pos + index)
    }

    /// Whether token `index` of the row stands for a part of an image, with a row or without.
    pub fn is_visual(&self, index: usize) -> bool {
        self.images.iter().any(|image| image.range().contains(&(self.first_pos + index)))
    }

    /// Number of logit rows that this row asks for.
    pub fn num_logit_rows(&self) -> usize {
        match self.logits {
            LogitRows::None => 0,
            LogitRows::Last => 1,
            LogitRows::All => self.tokens.len(),
        }
    }
}

impl StepBatch<'_> {
    /// Tokens in the step, over all rows.
    pub fn num_tokens(&self) -> usize {
        self.rows.iter().map(|row| row.tokens.len()).sum()
    }

    /// Logit rows that the step asks for, over all rows, in row order.
    pub fn num_logit_rows(&self) -> usize {
        self.rows.iter().map(StepRow::num_logit_rows).sum()
    }
}
