//! SkipDecode (arXiv 2307.02628; methods.md §5): later tokens run fewer layers.
//!
//! Token `t` of the output, `t = 0` being the first that is fed back, runs layers `0..w` and the last
//! `n(t) − w`, where `n` falls from `max_layers` to `min_layers` over the horizon. As `n` never rises,
//! the sets nest: each layer runs the tokens below one position and no other, and every key that a
//! token needs was written. The prompt runs whole.

use super::options::{Region, SkipDecode};
use super::{Context, Plan, Sublayer, refuse};
use crate::Result;

/// A validated schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schedule {
    /// Layers of the model.
    pub num_layers: usize,
    /// `n(0)`.
    pub max_layers: usize,
    /// `n(t)` from the horizon's end on.
    pub min_layers: usize,
    /// Tokens over which `n` falls.
    pub horizon: usize,
    /// Leading layers that always run, `w`.
    pub core_layers: usize,
}

impl Schedule {
    /// `n(t)`: how many layers output token `t` runs.
    pub fn depth(&self, t: usize) -> usize {
        let (span, last) = (self.max_layers - self.min_layers, self.horizon - 1);
        if t >= last {
            return self.min_layers;
        }
        // max − ⌈span·t/last⌉ is ⌊max − span·t/last⌋ in whole numbers.
        self.max_layers - (span * t).div_ceil(last)
    }

    /// Whether output token `t` runs `layer`: `A(t) = {0..w} ∪ {L−(n(t)−w)..L}`.
    pub fn runs(&self, layer: usize, t: usize) -> bool {
        layer < self.core_layers || layer >= self.num_layers + self.core_layers - self.depth(t)
    }

    /// How many output tokens run `layer`: the first ones. `None` for all.
    pub fn num_running(&self, layer: usize) -> Option<usize> {
        if self.runs(layer, self.horizon - 1) {
            return None;
        }
        Some((0..self.horizon).take_while(|&t| self.runs(layer, t)).count())
    }
}

/// Limits the upper layers of `plan` to the first output tokens.
///
/// # Errors
/// [`crate::ZooError::Compression`] when the numbers do not make a schedule of this model.
pub(super) fn apply(options: &SkipDecode, context: &Context<'_>, plan: &mut Plan) -> Result<()> {
    let schedule = schedule(options, context)?;
    plan.options_mut().skip_decode = Some(SkipDecode {
        min_layers: Some(schedule.min_layers),
        max_layers: Some(schedule.max_layers),
        horizon: Some(schedule.horizon),
        core_layers: Some(schedule.core_layers),
        region: None,
    });
    for layer in 0..schedule.num_layers {
        if let Some(count) = schedule.num_running(layer) {
            for sublayer in [Sublayer::Attention, Sublayer::Ffn] {
                plan.limit(layer, sublayer, context.prompt_len + count);
            }
            plan.share_at_most(context.prompt_len);
        }
    }
    Ok(())
}

fn schedule(options: &SkipDecode, context: &Context<'_>) -> Result<Schedule> {
    let num_layers = context.num_layers;
    let max_layers = options.max_layers.unwrap_or(num_layers);
    let min_layers = options.min_layers.unwrap_or((num_layers * 3).div_ceil(5).min(max_layers));
    let horizon = options.horizon.unwrap_or(context.max_tokens.clamp(1, 256));
    let default_core = match options.region.unwrap_or_default() {
        Region::Low => 2,
        Region::Middle => num_layers.div_ceil(4),
    };
    let core_layers = options.core_layers.unwrap_or(default_core.min(min_layers.saturating_sub(1)));
    if max_layers > num_layers || min_layers > max_layers || min_layers == 0 {
        return refuse(format!(
            "compression.skip_decode needs 1 <= min_layers <= max_layers <= {num_layers}, the model's layers; got {min_layers} and {max_layers}"
        ));
    }
    if core_layers >= min_layers {
        return refuse(format!(
            "compression.skip_decode.core_layers must be below min_layers, so that the last layer runs; got {core_layers} and {min_layers}"
        ));
    }
    if horizon == 0 {
        return refuse("compression.skip_decode.horizon must be at least 1");
    }
    Ok(Schedule { num_layers, max_layers, min_layers, horizon, core_layers })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn schedules() -> impl Strategy<Value = Schedule> {
        (1usize..60)
            .prop_flat_map(|layers| (Just(layers), 1..=layers))
            .prop_flat_map(|(layers, max)| (Just(layers), Just(max), 1..=max))
            .prop_flat_map(|(layers, max, min)| (Just((layers, max, min)), 0..min, 1usize..300))
            .prop_map(|((num_layers, max_layers, min_layers), core_layers, horizon)| Schedule {
                num_layers,
                max_layers,
                min_layers,
                horizon,
                core_layers,
            })
    }

    proptest! {
        /// methods.md §5 (e) 2.
        #[test]
        fn layer_sets_nest_and_keep_core_and_last(s in schedules(), t in 0usize..400) {
            let set = |t| (0..s.num_layers).filter(|&l| s.runs(l, t)).collect::<Vec<_>>();
            let (now, next) = (set(t), set(t + 1));
            prop_assert_eq!(now.len(), s.depth(t));
            prop_assert!(next.iter().all(|l| now.contains(l)));
            prop_assert!((0..s.core_layers).all(|l| next.contains(&l)));
            prop_assert!(next.contains(&(s.num_layers - 1)));
        }

        /// A layer runs exactly the tokens below its count.
        #[test]
        fn a_layer_runs_the_tokens_below_one_position(s in schedules(), layer in 0usize..60, t in 0usize..400) {
            prop_assume!(layer < s.num_layers);
            prop_assert_eq!(s.runs(layer, t), s.num_running(layer).is_none_or(|count| t < count));
        }

        /// The formula of methods.md §5 (b) 1, in f64.
        #[test]
        fn depth_is_the_published_formula(s in schedules(), t in 0usize..400) {
            prop_assume!(s.horizon > 1);
            let (max, min) = (s.max_layers as f64, s.min_layers as f64);
            let last = (s.horizon - 1) as f64;
            // An exact quotient must not fall short of the whole number by rounding.
            let exact = max - (max - min) * (t as f64).min(last) / last + 1e-9;
            prop_assert_eq!(s.depth(t), (exact.floor() as usize).max(s.min_layers));
        }

        /// AdaSkip's executable reading (github ASISys/AdaSkip, `llama_SD.py`): layers 1..=K(t) are
        /// skipped, K(t) = min(N, ⌈(t/T)(N−1)⌉ + 1).
        #[test]
        fn matches_the_golden_schedule_of_adaskip(layers in 8usize..60, n in 2usize..7, total in 1usize..600, t in 0usize..700) {
            let s = Schedule { num_layers: layers, max_layers: layers - 1, min_layers: layers - n, horizon: total + 1, core_layers: 1 };
            let k = n.min((t * (n - 1)).div_ceil(total) + 1);
            let skipped: Vec<_> = (0..layers).filter(|&l| !s.runs(l, t)).collect();
            prop_assert_eq!(skipped, (1..=k).collect::<Vec<_>>());
        }
    }
}
