//! Dropping of image tokens, on the wire and back.

use model_zoo::compression::VisualUse;
use model_zoo::compression::options::{Vision, VisionBaseline};
use rheostat_proto::rheostat::v1;
use v1::vision::Baseline as Wire;

use super::unknown;
use crate::error::Error;

/// # Errors
/// [`crate::error::ErrorKind::InvalidArgument`] for a baseline of a later version.
pub(super) fn of_wire(wire: v1::Vision) -> Result<Vision, Error> {
    let v1::Vision { keep, baseline, seed, merge, key_rate, alpha, beta, layers } = wire;
    let baseline = match Wire::try_from(baseline) {
        Ok(Wire::Unspecified) => None,
        Ok(Wire::Pool) => Some(VisionBaseline::Pool),
        Ok(Wire::Random) => Some(VisionBaseline::Random),
        Err(_) => return Err(unknown("compression.vision.baseline", baseline)),
    };
    let layers = layers.map(|layers| layers.index.into_iter().map(|layer| layer as usize).collect());
    Ok(Vision { keep: keep.map(|n| n as usize), baseline, seed, merge, key_rate, alpha, beta, layers })
}

pub(super) fn wire(plan: &Vision) -> v1::Vision {
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let baseline = match plan.baseline {
        None => Wire::Unspecified,
        Some(VisionBaseline::Pool) => Wire::Pool,
        Some(VisionBaseline::Random) => Wire::Random,
    };
    let layers =
        |layers: &Vec<usize>| v1::Layers { index: layers.iter().map(|&layer| count(layer)).collect() };
    v1::Vision {
        keep: plan.keep.map(count),
        baseline: baseline.into(),
        seed: plan.seed,
        merge: plan.merge,
        key_rate: plan.key_rate,
        alpha: plan.alpha,
        beta: plan.beta,
        layers: plan.layers.as_ref().map(layers),
    }
}

pub(super) fn usage(visual: VisualUse) -> v1::VisualTokens {
    v1::VisualTokens { shown: visual.shown as u64, kept: visual.kept as u64, mean_kept: visual.mean }
}
