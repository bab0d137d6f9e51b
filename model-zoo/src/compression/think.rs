//! ThinK (arXiv 2407.21018; methods.md §2): key channels that the prompt's last queries hardly look at
//! are left out of the cache once the prompt is computed.
//!
//! While the prompt runs, its last [`OBSERVED`] queries are summed up by channel. When it is computed, the
//! sequence is **sealed**: the best channels of its older keys move into packed pages
//! ([`crate::kv_cache::pruned`]), and decode steps look at those. Channels are chosen once; a sequence that
//! was preempted is sealed again with the same ones.

use std::sync::Arc;

use super::options::Think;
use super::{Context, Plan, refuse};
use crate::Result;
use crate::kv_cache::{KvCache, KvLayout, PageId, PageMove, PrunedKeys};

/// Last queries of the prompt that score the channels.
pub const OBSERVED: usize = 32;
const DEFAULT_RATIO: f32 = 0.4;
const DEFAULT_RECENT: usize = 32;

/// What of the keys stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pruning {
    /// Channels kept of every KV head, `d_k`.
    pub kept: usize,
    /// Last prompt tokens that keep every channel at least, `R`.
    pub recent: usize,
    /// Tokens of the prompt: with the last of them computed, the sequence is sealed.
    pub prompt_len: usize,
}

/// What pruning has seen and decided for one sequence.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PruningState {
    /// `[layer][num_kv_heads, head_dim]`: Σ q² of the observed queries so far, mean of the heads that share
    /// a KV head. Empty until the first of them ran.
    pub query_sums: Vec<f32>,
    /// The channels, once they are chosen.
    pub keys: Option<Arc<PrunedKeys>>,
    /// Whether the older keys lie in packed pages now.
    pub sealed: bool,
}

/// Where a sequence's pages go when it is sealed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SealMoves {
    /// `[layer]`: the pages of the prompt before.
    pub old: Vec<Vec<PageId>>,
    /// What is moved, to be done in order: a later move may write where an earlier one has read.
    pub moves: Vec<PageMove>,
}

/// Chooses the channels, unless they are chosen already, and moves the pages.
///
/// # Errors
/// [`crate::ZooError::Device`] when the device that the pages lie on fails.
pub fn seal(
    kv: &mut KvCache,
    seal: &SealMoves,
    (pruning, state): (&Pruning, &mut PruningState),
) -> Result<()> {
    let query_sums = std::mem::take(&mut state.query_sums);
    let keys = match &state.keys {
        Some(keys) => Arc::clone(keys),
        None => Arc::new(choose(kv, seal, (pruning, &query_sums))?),
    };
    kv.seal(&seal.moves, &keys)?;
    state.keys = Some(keys);
    state.sealed = true;
    Ok(())
}

fn choose(kv: &KvCache, seal: &SealMoves, (pruning, query_sums): (&Pruning, &[f32])) -> Result<PrunedKeys> {
    let KvLayout { num_kv_heads, head_dim, .. } = kv.layout();
    let width = num_kv_heads * head_dim;
    let key_sums = kv.key_squares(&seal.old, pruning.prompt_len)?;
    let of_layer = |(layer, keys): (usize, &Vec<f64>)| {
        let queries = query_sums.get(layer * width..(layer + 1) * width).filter(|_| !keys.is_empty());
        let best = |queries| PrunedKeys::best((queries, keys), num_kv_heads, pruning.kept);
        queries.map(best).unwrap_or_default()
    };
    let channels = key_sums.iter().enumerate().map(of_layer).collect();
    Ok(PrunedKeys { kept: pruning.kept, channels })
}

impl Pruning {
    /// Slots that are packed, whole blocks of `block_size`: those before the recent ones.
    pub fn num_packed(&self, block_size: usize) -> usize {
        self.prompt_len.saturating_sub(self.recent) / block_size * block_size
    }

    /// Whether the query at `position` is one of those that score the channels.
    pub(crate) fn observes(&self, position: usize) -> bool {
        position < self.prompt_len && position + OBSERVED >= self.prompt_len
    }
}

/// Channels kept of `head_dim` at `ratio`: what the paper keeps, rounded up to a multiple of eight, of
/// sixteen for wide heads, so that vector loads and tensor cores have whole tiles.
pub fn kept_channels(ratio: f32, head_dim: usize) -> usize {
    let pruned = (f64::from(ratio) * head_dim as f64 + 1e-6) as usize;
    let tile = if head_dim > 64 { 16 } else { 8 };
    (head_dim - pruned).next_multiple_of(tile).min(head_dim)
}

/// Sets the pruning of `plan`.
///
/// # Errors
/// [`crate::ZooError::Compression`] for a ratio outside its range.
pub(super) fn apply(options: &Think, context: &Context<'_>, plan: &mut Plan) -> Result<()> {
    let ratio = options.ratio.unwrap_or(DEFAULT_RATIO);
    if !(0.0..1.0).contains(&ratio) {
        return refuse(format!("compression.think.ratio must be from 0 to less than 1, got {ratio}"));
    }
    let recent = options.recent.unwrap_or(DEFAULT_RECENT);
    plan.options_mut().think = Some(Think { ratio: Some(ratio), recent: Some(recent) });
    let pruning =
        Pruning { kept: kept_channels(ratio, context.head_dim), recent, prompt_len: context.prompt_len };
    // Nothing to prune: too few channels or too short a prompt.
    if pruning.kept < context.head_dim && context.prompt_len > recent && context.head_dim <= 256 {
        plan.share_at_most(context.prompt_len);
        plan.set_pruning(pruning, context.head_dim);
    }
    Ok(())
}
