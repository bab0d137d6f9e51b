//! FFN-SkipLLM (arXiv 2404.03865; methods.md §4): once a token's residual stream is saturated, the next
//! feed-forward blocks are left out. Attention always runs, so KV is complete.
//!
//! Whether an FFN saturates is known only after it ran: cos(x, x + FFN(x)) ≥ threshold lets the next
//! `max_skip` blocks be skipped, then one runs to test again. What was decided is recorded, one bit per
//! output token and layer, and replayed after preemption: equal tokens keep equal KV.

use super::options::{FfnMode, FfnSelection, FfnSkip};
use super::{Context, Plan, refuse};
use crate::Result;

/// Generated tokens that run whole by default: where the paper's ablation saturates.
const DEFAULT_WARMUP: usize = 32;
const DEFAULT_TARGET: f32 = 0.25;
const MAX_TARGET: f32 = 0.6;
/// Constant of the random control.
const RANDOM_SEED: u64 = 0x9E37_79B9_7F4A_7C15;

/// A compiled policy.
#[derive(Debug, Clone, PartialEq)]
pub struct FfnPolicy {
    /// Layers outside of `cold.0..cold.1` always run their FFN.
    pub cold: (usize, usize),
    /// First position whose FFNs may be skipped.
    pub first_pos: usize,
    /// FFNs skipped for one token at most.
    pub cap: usize,
    /// How they are chosen.
    pub rule: FfnRule,
}

/// How the FFNs of a token are chosen.
#[derive(Debug, Clone, PartialEq)]
pub enum FfnRule {
    /// By the token's own similarity.
    Adaptive {
        /// Cosine from which a block counts as saturated.
        threshold: f32,
        /// Blocks skipped before the next test.
        max_skip: usize,
        /// Share of the step's rows that must agree; `None` where each row decides for itself.
        quorum: Option<f32>,
    },
    /// These layers.
    Static(Box<[bool]>),
    /// So many layers, drawn for each token.
    Random(usize),
}

/// What FFN skipping has decided for one sequence: recorded for every output token that ran.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FfnDecisions {
    /// Position of the first recorded token.
    first_pos: usize,
    /// `[token][words_per_token]`: bit `layer` is set where the FFN was skipped.
    skipped: Vec<u64>,
    words_per_token: usize,
    /// Tokens of the running step that are not recorded yet, in position order.
    live: Vec<LiveToken>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct LiveToken {
    skip_left: usize,
    num_skipped: usize,
    skipped: Vec<u64>,
}

impl FfnPolicy {
    /// Whether the FFN of `layer` may be skipped for a token at `position`.
    pub fn may_skip(&self, layer: usize, position: usize) -> bool {
        position >= self.first_pos && self.cold.0 <= layer && layer < self.cold.1
    }

    /// Whether the rule decides without looking at the token, and then what.
    pub(super) fn fixed(&self, layer: usize, position: usize) -> Option<bool> {
        if !self.may_skip(layer, position) {
            return Some(false);
        }
        match &self.rule {
            FfnRule::Adaptive { .. } => None,
            FfnRule::Static(layers) => Some(layers[layer]),
            FfnRule::Random(count) => Some(self.draws(*count, layer, position)),
        }
    }

    /// Selection sampling: layer after layer, a block is drawn with probability needed ÷ left.
    fn draws(&self, count: usize, layer: usize, position: usize) -> bool {
        let mut needed = count;
        for (index, left) in (self.cold.0..self.cold.1).zip((1..=self.cold.1 - self.cold.0).rev()) {
            let mut z = (position as u64) << 32 | index as u64;
            z = (z ^ z >> 31).wrapping_mul(RANDOM_SEED);
            z = (z ^ z >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let drawn = ((z ^ z >> 32) % left as u64) < needed as u64;
            if index == layer {
                return drawn;
            }
            needed -= usize::from(drawn);
        }
        false
    }
}

impl FfnDecisions {
    /// Makes ready for a step that runs positions up to `end`, exclusive.
    pub(super) fn begin(&mut self, policy: &FfnPolicy, num_layers: usize, end: usize) {
        self.first_pos = policy.first_pos;
        self.words_per_token = num_layers.div_ceil(64);
        let num_live = end.saturating_sub(self.first_pos + self.num_recorded());
        let token = LiveToken { skipped: vec![0; self.words_per_token], ..LiveToken::default() };
        self.live = vec![token; num_live];
    }

    /// Records what the step decided.
    pub(super) fn finish(&mut self) {
        for token in self.live.drain(..) {
            self.skipped.extend(token.skipped);
        }
    }

    /// Output tokens whose decisions are recorded, from position `first_pos` of the policy on.
    pub fn num_recorded(&self) -> usize {
        self.skipped.len() / self.words_per_token.max(1)
    }

    /// Whether the FFN of `layer` was skipped for recorded token `index`.
    pub fn is_skipped(&self, index: usize, layer: usize) -> bool {
        self.skipped[index * self.words_per_token + layer / 64] >> (layer % 64) & 1 == 1
    }

    /// What was recorded for `position`; `None` for a token that is decided now.
    pub(super) fn recorded(&self, layer: usize, position: usize) -> Option<bool> {
        let index = position.checked_sub(self.first_pos)?;
        (index < self.num_recorded()).then(|| self.is_skipped(index, layer))
    }

    /// Whether the token now decided at `position` would skip its next FFN.
    pub(super) fn votes(&self, policy: &FfnPolicy, position: usize) -> bool {
        let token = &self.live[position - self.first_pos - self.num_recorded()];
        token.skip_left > 0 && token.num_skipped < policy.cap
    }

    /// The FFN of `layer` is skipped for the token now decided at `position`.
    pub(super) fn skip(&mut self, layer: usize, position: usize) {
        let token = self.live_mut(position);
        token.skip_left = token.skip_left.saturating_sub(1);
        token.num_skipped += 1;
        token.skipped[layer / 64] |= 1 << (layer % 64);
    }

    /// The FFN ran for it, and changed the residual stream by this cosine.
    pub(super) fn observe(&mut self, policy: &FfnPolicy, position: usize, cosine: f32) {
        let FfnRule::Adaptive { threshold, max_skip, .. } = policy.rule else { return };
        if cosine >= threshold {
            self.live_mut(position).skip_left = max_skip;
        }
    }

    fn live_mut(&mut self, position: usize) -> &mut LiveToken {
        let index = position - self.first_pos - self.num_recorded();
        &mut self.live[index]
    }
}

/// Blocks skipped after each test by default: enough that always-saturated tokens pass the target.
pub fn default_max_skip(target: f32, num_layers: usize, (low, high): (usize, usize)) -> usize {
    let wanted = 1.25 * f64::from(target) * num_layers as f64;
    let warm = high.saturating_sub(low) as f64;
    (1..num_layers).find(|&k| k as f64 / (k + 1) as f64 * warm >= wanted).unwrap_or(num_layers)
}

/// Sets the policy of `plan`.
///
/// # Errors
/// [`crate::ZooError::Compression`] for numbers outside their range, or without the calibration that
/// finds a threshold.
pub(super) fn apply(options: &FfnSkip, context: &Context<'_>, plan: &mut Plan) -> Result<()> {
    let target = options.target.unwrap_or(DEFAULT_TARGET);
    if !(0.0..=MAX_TARGET).contains(&target) {
        return refuse(format!("compression.ffn_skip.target must be from 0 to {MAX_TARGET}, got {target}"));
    }
    let quorum = options.quorum.unwrap_or(1.0);
    if !(quorum > 0.0 && quorum <= 1.0) {
        return refuse(format!("compression.ffn_skip.quorum must be above 0 and at most 1, got {quorum}"));
    }
    if options.threshold.is_some_and(|t| !t.is_finite()) {
        return refuse("compression.ffn_skip.threshold must be a number, a cosine");
    }
    if target == 0.0 {
        return Ok(());
    }
    let calibration = context.calibration("ffn_skip")?;
    let cold = calibration.ffn_region();
    let num_layers = context.num_layers;
    let count = ((target * num_layers as f32).round() as usize).min(cold.1 - cold.0);
    let rule = match options.selection.unwrap_or_default() {
        FfnSelection::Random => FfnRule::Random(count),
        FfnSelection::Static => {
            let mut layers = vec![false; num_layers];
            let order = calibration.ffn_order();
            let warm = order.iter().filter(|&&layer| cold.0 <= layer && layer < cold.1);
            warm.take(count).for_each(|&layer| layers[layer] = true);
            FfnRule::Static(layers.into())
        }
        FfnSelection::Adaptive => {
            let (threshold, max_skip) = match (options.threshold, options.max_skip) {
                (Some(threshold), max_skip) => {
                    (threshold, max_skip.unwrap_or_else(|| default_max_skip(target, num_layers, cold)))
                }
                (None, given) => {
                    let (threshold, max_skip) = calibration.ffn_threshold(target)?;
                    (threshold, given.unwrap_or(max_skip))
                }
            };
            FfnRule::Adaptive {
                threshold,
                max_skip,
                quorum: (options.mode == Some(FfnMode::Batch)).then_some(quorum),
            }
        }
    };
    let mut resolved = FfnSkip { target: Some(target), quorum: None, ..*options };
    if let FfnRule::Adaptive { threshold, max_skip, quorum } = rule {
        resolved.threshold = Some(threshold);
        resolved.max_skip = Some(max_skip);
        resolved.quorum = quorum;
    }
    resolved.warmup = Some(options.warmup.unwrap_or(DEFAULT_WARMUP));
    plan.options_mut().ffn_skip = Some(resolved);
    let first_pos = context.prompt_len + options.warmup.unwrap_or(DEFAULT_WARMUP);
    let cap = (2.0 * target * num_layers as f32).ceil() as usize;
    plan.set_ffn(FfnPolicy { cold, first_pos, cap, rule });
    plan.share_at_most(context.prompt_len);
    Ok(())
}
