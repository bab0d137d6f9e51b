//! The compression seam: what of the model a request runs.
//!
//! [`plan::Plan`] is compiled once, at admission, from [`CompressionOptions`] and never changes; what is
//! decided while a request runs lives in its [`RowState`]. A decoder asks [`rows`] before each sublayer
//! which rows of the step take part, and knows no method by name. A method is one file here plus one
//! line in [`registry`]; today the dense plan is the only occupant.

pub mod plan;
pub mod registry;

pub use plan::{KvDemand, Plan, PlanKey};
pub use registry::CompressionOptions;

/// The two residual sublayers of a decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sublayer {
    /// Self-attention with its norm.
    Attention,
    /// The feed-forward block with its norm.
    Ffn,
}

/// Which rows (sequences) of a step take part in a sublayer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rows {
    /// Every row: the dense path, no gather.
    All,
    /// No row: the sublayer's weights are not touched.
    None,
    /// Only these row indices, ascending.
    Some(Vec<usize>),
}

/// What a request's plan has decided while it ran: per-row, mutable, private to the compression methods.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RowState {
    /// Sublayers executed for tokens of this row so far, attention then FFN: the realised work.
    pub sublayers_run: [u64; 2],
}

/// Answers, for one step, which of `plans` take part in `sublayer` of `layer`.
///
/// `plans` yields each row's plan in row order. Rows whose plans agree give [`Rows::All`] or
/// [`Rows::None`], so that the dense path never gathers.
pub fn rows<'a>(layer: usize, sublayer: Sublayer, plans: impl ExactSizeIterator<Item = &'a Plan>) -> Rows {
    let total = plans.len();
    let mut active = Vec::new();
    for (row, plan) in plans.enumerate() {
        if plan.runs(layer, sublayer) {
            active.push(row);
        }
    }
    match active.len() {
        0 => Rows::None,
        n if n == total => Rows::All,
        _ => Rows::Some(active),
    }
}
