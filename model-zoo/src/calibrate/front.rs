//! The front: of the plans tried, those that no other beats in quality, work and KV alike.

use std::collections::BTreeMap;

use crate::compression::CompressionOptions;
use crate::compression::calibration::{FrontPoint, Tried};

/// The front of `tried`, without dense, by rising loss. How much loss is bearable is the operator's to say
/// (`targets.max_perplexity_increase`). Plans of `presets` have their names.
pub(super) fn choose(tried: &[Tried], presets: &BTreeMap<String, CompressionOptions>) -> Vec<FrontPoint> {
    let dense = Tried { layer_work: 1.0, kv: 1.0, ..Tried::default() };
    let is_cheaper = |tried: &&Tried| tried.layer_work < 1.0 || tried.kv < 1.0;
    let within = || tried.iter().filter(is_cheaper);
    let is_beaten = |one: &Tried| within().chain([&dense]).any(|other| beats(other, one));
    let mut front: Vec<_> =
        within().filter(|tried| !is_beaten(tried)).map(|tried| point(tried, presets)).collect();
    front.sort_by(|a, b| a.perplexity_increase.total_cmp(&b.perplexity_increase));
    front
}

/// Whether `a` is nowhere worse than `b`, and somewhere better.
fn beats(a: &Tried, b: &Tried) -> bool {
    let costs = |tried: &Tried| [tried.perplexity_increase.max(0.0), tried.layer_work, tried.kv];
    let (a, b) = (costs(a), costs(b));
    a.iter().zip(&b).all(|(a, b)| a <= b) && a != b
}

fn point(tried: &Tried, presets: &BTreeMap<String, CompressionOptions>) -> FrontPoint {
    let preset = presets.iter().find(|(_, plan)| **plan == tried.plan).map(|(name, _)| name.clone());
    FrontPoint {
        name: preset.unwrap_or_else(|| name(&tried.plan)),
        plan: tried.plan.clone(),
        perplexity_increase: tried.perplexity_increase,
        layer_work: tried.layer_work,
        kv: tried.kv,
    }
}

/// A name made of the methods and their first knobs, such as `drop-4-think-50`.
fn name(plan: &CompressionOptions) -> String {
    let percent = |share: Option<f32>| (share.unwrap_or_default() * 100.0).round();
    let mut parts = Vec::new();
    if let Some(drop) = plan.drop {
        for (kind, count) in [("drop", drop.attention), ("drop-ffn", drop.ffn), ("drop-joint", drop.joint)] {
            parts.extend((count > 0).then(|| format!("{kind}-{count}")));
        }
    }
    parts.extend(plan.think.map(|think| format!("think-{}", percent(think.ratio))));
    parts.extend(plan.skip_decode.map(|skip| {
        let within = skip.horizon.map_or_else(String::new, |horizon| format!("-in-{horizon}"));
        format!("depth-{}{within}", skip.min_layers.unwrap_or_default())
    }));
    parts.extend(plan.ffn_skip.map(|skip| format!("ffn-skip-{}", percent(skip.target))));
    parts.join("-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compression::options::{DropLayers, Think};

    #[test]
    fn the_front_is_what_nothing_beats_by_rising_loss() {
        let tried = |attention, think: f32, (perplexity_increase, layer_work, kv)| Tried {
            plan: CompressionOptions {
                drop: (attention > 0).then(|| DropLayers { attention, ..DropLayers::default() }),
                think: (think > 0.0).then(|| Think { ratio: Some(think), ..Think::default() }),
                ..CompressionOptions::default()
            },
            perplexity_increase,
            layer_work,
            kv,
        };
        let all = [
            tried(4, 0.5, (0.2, 0.97, 0.7)),
            tried(4, 0.0, (0.2, 0.97, 0.8)),
            tried(0, 0.5, (0.01, 1.0, 0.9)),
            // Better than dense by chance, and no cheaper.
            tried(0, 0.1, (-0.002, 1.0, 1.0)),
            // Beyond bearing for most, and the cheapest there is.
            tried(9, 0.0, (40.0, 0.5, 0.5)),
            tried(9, 0.4, (41.0, 0.5, 0.5)),
        ];
        let presets = BTreeMap::from([("balanced".to_owned(), all[2].plan.clone())]);
        let names: Vec<_> = choose(&all, &presets).into_iter().map(|point| point.name).collect();
        assert_eq!(names, ["balanced", "drop-4-think-50", "drop-9"]);
    }
}
