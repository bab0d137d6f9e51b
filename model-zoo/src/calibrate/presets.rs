//! Presets: of the plans tried, the one that runs least within a limit of perplexity.

use std::collections::BTreeMap;

use super::probe::rounded;
use super::{Progress, context};
use crate::Result;
use crate::compression::calibration::{Calibration, Tried};
use crate::compression::options::{DropLayers, FfnSkip, SkipDecode, Think};
use crate::compression::{CompressionOptions, Offer, Plan, registry};
use crate::eval::{Runner, Windows, score};
use crate::models::ModelDims;

/// Presets and the increase of perplexity over dense that each may cost.
const PRESETS: [(&str, f64); 2] = [("balanced", 0.02), ("eco", 0.08)];

/// KV slots in a page, for the share of KV.
const BLOCK_SIZE: usize = 16;

/// Plans to choose from: every method alone, drops of both kinds together, and deep combinations.
fn candidates(num_layers: usize, targets: &[f32]) -> Vec<CompressionOptions> {
    let drop = |attention, ffn| {
        let drop = DropLayers { attention, ffn, joint: 0 };
        CompressionOptions { drop: Some(drop), ..CompressionOptions::default() }
    };
    let most = (num_layers / 4).min(num_layers.saturating_sub(2));
    let mut all: Vec<_> = (1..=most).map(|attention| drop(attention, 0)).collect();
    all.extend(
        (1..=2.min(most)).flat_map(|ffn| (0..=2.min(most)).map(move |attention| drop(attention, ffn))),
    );
    let depths = [1, 2, 3, num_layers.div_ceil(5), (2 * num_layers).div_ceil(5)];
    for fewer in depths.into_iter().filter(|&fewer| fewer < num_layers) {
        let skip = SkipDecode { min_layers: Some(num_layers - fewer), ..SkipDecode::default() };
        all.push(CompressionOptions { skip_decode: Some(skip), ..CompressionOptions::default() });
    }
    let think = |ratio| Some(Think { ratio: Some(ratio), ..Think::default() });
    all.extend([0.25, 0.4, 0.5].map(|ratio| CompressionOptions { think: think(ratio), ..drop(0, 0) }));
    all.extend(
        (1..=4.min(most)).map(|attention| CompressionOptions { think: think(0.4), ..drop(attention, 0) }),
    );
    for &target in targets {
        let skip = FfnSkip { target: Some(target), ..FfnSkip::default() };
        all.push(CompressionOptions { ffn_skip: Some(skip), ..CompressionOptions::default() });
    }
    all.extend(deep(num_layers));
    // In a small model several shares are the same number of layers.
    let mut distinct = Vec::new();
    for options in all {
        if !distinct.contains(&options) {
            distinct.push(options);
        }
    }
    distinct
}

/// Plans that run half of the work and less: what an operator may fall back to who would rather answer badly than
/// late. Shares of all layers are dropped, of attention and of FFNs, by themselves and with fewer layers for later
/// tokens, which fall within a few tokens here.
fn deep(num_layers: usize) -> Vec<CompressionOptions> {
    let share = |share: f64| (share * num_layers as f64).round() as usize;
    let most = num_layers.saturating_sub(2);
    let joint = [0.15, 0.3, 0.45, 0.6, 0.8, 1.0]
        .map(|part| DropLayers { joint: share(part), ..DropLayers::default() });
    let apart = [(0.25, 0.1), (0.25, 0.25), (0.4, 0.3), (0.5, 0.4), (0.5, 0.5), (0.6, 0.6)]
        .map(|(attention, ffn)| DropLayers { attention: share(attention), ffn: share(ffn), joint: 0 });
    let is_possible = |drop: &DropLayers| {
        *drop != DropLayers::default() && drop.attention.max(drop.ffn) <= most && drop.joint <= 2 * most
    };
    let drops: Vec<_> = joint.into_iter().chain(apart).filter(is_possible).collect();
    let skips = [(0.6, 64), (0.4, 64), (0.3, 32)].map(|(part, horizon)| SkipDecode {
        min_layers: Some(share(part).max(1)),
        horizon: Some(horizon),
        ..SkipDecode::default()
    });
    let mut all: Vec<_> = drops
        .iter()
        .map(|drop| CompressionOptions { drop: Some(*drop), ..CompressionOptions::default() })
        .collect();
    all.extend(
        skips.map(|skip| CompressionOptions { skip_decode: Some(skip), ..CompressionOptions::default() }),
    );
    // Together: a quarter of attention, and later tokens by half of the layers.
    all.extend(drops.iter().filter(|drop| drop.attention == share(0.25)).map(|drop| CompressionOptions {
        drop: Some(*drop),
        skip_decode: Some(skips[1]),
        ..CompressionOptions::default()
    }));
    let without_think = all.clone();
    let think = Some(Think { ratio: Some(0.4), ..Think::default() });
    all.extend(without_think.into_iter().map(|options| CompressionOptions { think, ..options }));
    all
}

/// The options without a drop of nothing.
fn without_nothing(mut options: CompressionOptions) -> CompressionOptions {
    options.drop = options.drop.filter(|drop| *drop != DropLayers::default());
    options
}

/// Scores the candidates beside dense.
pub(super) fn try_all(
    runner: &mut Runner<'_>,
    windows: &Windows<'_>,
    (dims, calibration): (&ModelDims, &Calibration),
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<Tried>> {
    let offer = Offer { calibration: Some(calibration.clone()), ..Offer::default() };
    let targets: Vec<f32> = calibration.ffn_skip.thresholds.iter().map(|entry| entry.target).collect();
    let options = candidates(dims.num_layers, &targets);
    let mut plans = vec![Plan::dense(dims.num_layers)];
    for options in &options {
        plans.push(registry::compile(options, &context(runner, windows, &offer))?);
    }
    let scores = score(runner, windows, &plans, |done, total| {
        progress(Progress { stage: "presets", done, total });
    })?;
    let pages = |plan: &Plan| plan.kv_demand().num_pages(BLOCK_SIZE, windows.len) as f64;
    let dense = (scores[0].perplexity(), pages(&plans[0]));
    let tried =
        options.into_iter().zip(&plans[1..]).zip(&scores[1..]).map(|((options, plan), score)| Tried {
            plan: without_nothing(options),
            perplexity_increase: rounded(score.perplexity() / dense.0 - 1.0),
            layer_work: rounded(score.cost(dims.sublayer_weights)),
            kv: rounded(pages(plan) / dense.1),
        });
    Ok(tried.collect())
}

/// For each preset, the plan within its limit that saves most: work in the layers and KV count alike.
pub(super) fn choose(tried: &[Tried]) -> BTreeMap<String, CompressionOptions> {
    let cost = |tried: &Tried| tried.layer_work + tried.kv;
    let preset = |(name, limit): (&str, f64)| {
        let within = tried.iter().filter(|tried| tried.perplexity_increase <= limit);
        let best = within.min_by(|a, b| cost(a).total_cmp(&cost(b)));
        // Where nothing tried is good enough, the preset is the whole model.
        (name.to_owned(), best.map(|tried| tried.plan.clone()).unwrap_or_default())
    };
    PRESETS.into_iter().map(preset).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deep_plans_reach_below_half_of_the_layers_and_are_distinct() {
        let all = candidates(30, &[0.25]);
        // An FFN is three quarters of a layer here.
        let work = |options: &CompressionOptions| {
            let drop = options.drop.unwrap_or_default();
            1.0 - (0.25 * drop.attention as f64 + 0.75 * drop.ffn as f64) / 30.0
        };
        assert!(all.iter().map(work).fold(1.0, f64::min) <= 0.5);
        for layers in [1, 2, 3, 4] {
            let all = candidates(layers, &[]);
            for (index, options) in all.iter().enumerate() {
                assert!(!all[..index].contains(options), "{options:?} twice");
                let drop = options.drop.unwrap_or_default();
                assert!(drop.attention.max(drop.ffn) < layers && drop.joint <= 2 * (layers.max(2) - 2));
            }
        }
    }
}
