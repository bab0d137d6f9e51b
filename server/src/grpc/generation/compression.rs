//! What a request asks of the model's compression, and what was done.

mod vision;

use model_zoo::compression::CompressionOptions;
use model_zoo::compression::options::{
    BitStack, DropLayers, FfnMode, FfnSelection, FfnSkip, Region, SkipDecode, Think,
};
use rheostat_proto::rheostat::v1;

use crate::error::Error;
use crate::request::{ChoiceUsage, Work};

/// What is on the wire but not known here is refused, never dropped: a client that asks for less of the model must not
/// be answered by all of it unawares.
///
/// # Errors
/// [`crate::error::ErrorKind::InvalidArgument`] for an enum value of a later version.
pub(super) fn options(wire: v1::Compression) -> Result<CompressionOptions, Error> {
    let v1::Compression { profile, skip_decode, ffn_skip, drop, think, vision, bitstack } = wire;
    Ok(CompressionOptions {
        profile: Some(profile).filter(|p| !p.is_empty()),
        skip_decode: skip_decode.map(of_skip_decode).transpose()?,
        ffn_skip: ffn_skip.map(of_ffn_skip).transpose()?,
        drop: drop.map(|drop| DropLayers {
            attention: drop.attention.unwrap_or(0) as usize,
            ffn: drop.ffn.unwrap_or(0) as usize,
            joint: drop.joint.unwrap_or(0) as usize,
        }),
        think: think.map(|think| Think { ratio: think.ratio, recent: think.recent.map(|n| n as usize) }),
        bitstack: bitstack.map(|bitstack| BitStack { levels: bitstack.levels.map(|n| n as usize) }),
        vision: vision.map(vision::of_wire).transpose()?,
    })
}

fn of_skip_decode(wire: v1::SkipDecode) -> Result<SkipDecode, Error> {
    use v1::skip_decode::Region as Wire;
    let region = match Wire::try_from(wire.region) {
        Ok(Wire::Unspecified) => None,
        Ok(Wire::Low) => Some(Region::Low),
        Ok(Wire::Middle) => Some(Region::Middle),
        Err(_) => return Err(unknown("compression.skip_decode.region", wire.region)),
    };
    Ok(SkipDecode {
        min_layers: wire.min_layers.map(|n| n as usize),
        max_layers: wire.max_layers.map(|n| n as usize),
        horizon: wire.horizon.map(|n| n as usize),
        core_layers: wire.core_layers.map(|n| n as usize),
        region,
    })
}

fn of_ffn_skip(wire: v1::FfnSkip) -> Result<FfnSkip, Error> {
    use v1::ffn_skip::{Mode, Selection};
    let mode = match Mode::try_from(wire.mode) {
        Ok(Mode::Unspecified) => None,
        Ok(Mode::Row) => Some(FfnMode::Row),
        Ok(Mode::Batch) => Some(FfnMode::Batch),
        Err(_) => return Err(unknown("compression.ffn_skip.mode", wire.mode)),
    };
    let selection = match Selection::try_from(wire.selection) {
        Ok(Selection::Unspecified) => None,
        Ok(Selection::Adaptive) => Some(FfnSelection::Adaptive),
        Ok(Selection::Static) => Some(FfnSelection::Static),
        Ok(Selection::Random) => Some(FfnSelection::Random),
        Err(_) => return Err(unknown("compression.ffn_skip.selection", wire.selection)),
    };
    Ok(FfnSkip {
        target: wire.target,
        warmup: wire.warmup.map(|n| n as usize),
        threshold: wire.threshold,
        max_skip: wire.max_skip.map(|n| n as usize),
        mode,
        quorum: wire.quorum,
        selection,
    })
}

/// By which weights a request's choices were made.
#[derive(Debug, Clone, Default)]
pub(super) struct WeightUse {
    served: Vec<v1::ServedPart>,
    moved_down: u32,
}

impl WeightUse {
    /// Adds a finished choice.
    pub(super) fn add(&mut self, choice: usize, usage: &ChoiceUsage) {
        self.moved_down += usage.moved_down as u32;
        self.served.extend(usage.served.iter().map(|part| v1::ServedPart {
            choice: choice as u32,
            blocks: part.blocks as u64,
            levels: part.levels,
            completion_tokens: part.tokens as u32,
            continues: part.continues,
        }));
    }
}

/// The work of a request that ran `plan`, which comes from `profile`.
pub(super) fn usage(
    (profile, plan): (&str, &CompressionOptions),
    work: Work,
    weights: WeightUse,
) -> v1::CompressionUsage {
    v1::CompressionUsage {
        served: weights.served,
        moved_down: weights.moved_down,
        plan: Some(wire(plan)),
        attention_layers_run: work.attention_layers,
        ffn_layers_run: work.ffn_layers,
        ffn_layers_skipped: work.ffns_skipped,
        dense_layers: work.dense_layers,
        kv_bytes: work.kv_bytes,
        visual_tokens: work.visual.map(vision::usage),
        profile: profile.to_owned(),
    }
}

fn wire(plan: &CompressionOptions) -> v1::Compression {
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    v1::Compression {
        profile: String::new(),
        skip_decode: plan.skip_decode.map(|skip| v1::SkipDecode {
            min_layers: skip.min_layers.map(count),
            max_layers: skip.max_layers.map(count),
            horizon: skip.horizon.map(count),
            core_layers: skip.core_layers.map(count),
            region: v1::skip_decode::Region::Unspecified.into(),
        }),
        ffn_skip: plan.ffn_skip.map(wire_ffn_skip),
        drop: plan.drop.map(|drop| v1::DropLayers {
            attention: Some(count(drop.attention)),
            ffn: Some(count(drop.ffn)),
            joint: Some(count(drop.joint)),
        }),
        think: plan.think.map(|think| v1::Think { ratio: think.ratio, recent: think.recent.map(count) }),
        vision: plan.vision.as_ref().map(vision::wire),
        bitstack: plan.bitstack.map(|bitstack| v1::BitStack { levels: bitstack.levels.map(count) }),
    }
}

fn wire_ffn_skip(skip: FfnSkip) -> v1::FfnSkip {
    use v1::ffn_skip::{Mode, Selection};
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let mode = match skip.mode.unwrap_or_default() {
        FfnMode::Row => Mode::Row,
        FfnMode::Batch => Mode::Batch,
    };
    let selection = match skip.selection.unwrap_or_default() {
        FfnSelection::Adaptive => Selection::Adaptive,
        FfnSelection::Static => Selection::Static,
        FfnSelection::Random => Selection::Random,
    };
    v1::FfnSkip {
        target: skip.target,
        warmup: skip.warmup.map(count),
        threshold: skip.threshold,
        max_skip: skip.max_skip.map(count),
        mode: mode.into(),
        quorum: skip.quorum,
        selection: selection.into(),
    }
}

fn unknown(name: &str, value: i32) -> Error {
    Error::invalid(name, format!("{name} is {value}, which this version does not know"))
}
