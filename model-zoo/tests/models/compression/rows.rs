//! The rows of the conformance table, and the models and the prompt that they run with.

use std::path::PathBuf;
use std::sync::Arc;

use model_zoo::compression::options::{
    BitStack, DropLayers, FfnSelection, FfnSkip, Region, SkipDecode, Vision, VisionBaseline,
};
use model_zoo::compression::{CompressionOptions, Context, Offer, Plan, registry};
use model_zoo::vision::{EncodedImage, ImageEmbeddings, PromptImage};
use tempfile::TempDir;

use crate::stacked::write_artefact;
use crate::tiny::{LAYERS, calibration, write_for_joint_steps};

pub(super) const PROMPT: [u32; 21] =
    [5, 9, 200, 31, 7, 7, 81, 14, 3, 99, 120, 44, 61, 8, 250, 17, 23, 42, 4, 190, 66];
pub(super) const OUTPUT: usize = 13;
pub(super) const LEVELS: usize = 3;

/// The prompt's image, at tokens 3 to 10 of it, as the options want it.
pub(super) fn images(options: &CompressionOptions) -> Vec<PromptImage> {
    let value = |i: usize| ((i * 7919 + 13) % 101) as f32 / 50.0 - 1.0;
    let encoded = EncodedImage {
        rows: (0..8 * 64).map(value).collect(),
        places: None,
        salience: (0..8).map(|i| value(i + 5)).collect(),
    };
    let whole = Arc::new(ImageEmbeddings::of((64, 8), encoded, [1; 32]));
    let prepared = registry::prepare(options, &offer(), vec![whole]).unwrap();
    prepared.into_iter().map(|embeddings| PromptImage { start: 3, embeddings }).collect()
}

/// What the tiny model offers, and levels of its artefact.
pub(super) fn offer() -> Offer {
    Offer { calibration: Some(calibration()), levels: Some(LEVELS), ..Offer::default() }
}

/// A folder with the tiny model, and the paths of its two forms: whole, and in levels.
pub(super) fn models() -> (TempDir, [PathBuf; 2]) {
    let folder = write_for_joint_steps(|_| false);
    let artefact = folder.path().join("tiny.bitstack");
    write_artefact(folder.path(), &artefact, (LEVELS, 2));
    let paths = [folder.path().to_owned(), artefact];
    (folder, paths)
}

pub(super) fn compile(options: CompressionOptions) -> Plan {
    let context = Context {
        num_layers: LAYERS,
        head_dim: 16,
        prompt_len: PROMPT.len(),
        max_tokens: OUTPUT,
        images: &images(&options),
        offer: &offer(),
    };
    registry::compile(&options, &context).unwrap()
}

pub(super) fn skip_decode(min_layers: usize, region: Region) -> CompressionOptions {
    let skip = SkipDecode {
        min_layers: Some(min_layers),
        horizon: Some(8),
        region: Some(region),
        ..SkipDecode::default()
    };
    CompressionOptions { skip_decode: Some(skip), ..CompressionOptions::default() }
}

pub(super) fn ffn_skip(change: impl FnOnce(&mut FfnSkip)) -> CompressionOptions {
    let mut skip = FfnSkip { target: Some(0.4), warmup: Some(3), threshold: Some(0.5), ..FfnSkip::default() };
    change(&mut skip);
    CompressionOptions { ffn_skip: Some(skip), ..CompressionOptions::default() }
}

pub(super) fn drop_layers(attention: usize, ffn: usize) -> CompressionOptions {
    let drop = DropLayers { attention, ffn, joint: 0 };
    CompressionOptions { drop: Some(drop), ..CompressionOptions::default() }
}

pub(super) fn vision(change: impl FnOnce(&mut Vision)) -> CompressionOptions {
    let mut vision = Vision {
        key_rate: Some(0.2),
        alpha: Some(0.13),
        beta: Some(1.0),
        layers: Some(vec![1, 3]),
        ..Vision::default()
    };
    change(&mut vision);
    CompressionOptions { vision: Some(vision), ..CompressionOptions::default() }
}

pub(super) fn baseline(baseline: VisionBaseline, keep: usize) -> CompressionOptions {
    let vision = Vision { keep: Some(keep), baseline: Some(baseline), ..Vision::default() };
    CompressionOptions { vision: Some(vision), ..CompressionOptions::default() }
}

pub(super) fn levels(levels: usize) -> CompressionOptions {
    let bitstack = Some(BitStack { levels: Some(levels) });
    CompressionOptions { bitstack, ..CompressionOptions::default() }
}

/// Every method, with a name for messages. Of whole weights every number of levels is all.
pub(super) fn methods() -> Vec<(&'static str, CompressionOptions)> {
    let joint = DropLayers { joint: 3, ..DropLayers::default() };
    vec![
        ("dense", CompressionOptions::default()),
        ("skip_decode low", skip_decode(3, Region::Low)),
        ("skip_decode middle", skip_decode(4, Region::Middle)),
        ("drop", drop_layers(2, 1)),
        ("bitstack", levels(2)),
        ("bitstack with drop", CompressionOptions { drop: drop_layers(1, 0).drop, ..levels(1) }),
        ("drop joint", CompressionOptions { drop: Some(joint), ..CompressionOptions::default() }),
        ("ffn_skip", ffn_skip(|_| {})),
        ("ffn_skip random", ffn_skip(|skip| skip.selection = Some(FfnSelection::Random))),
        ("ffn_skip static", ffn_skip(|skip| skip.selection = Some(FfnSelection::Static))),
        (
            "drop with skip_decode",
            CompressionOptions { drop: drop_layers(1, 1).drop, ..skip_decode(4, Region::Low) },
        ),
        ("vision", vision(|_| {})),
        ("vision with a cap", vision(|vision| vision.keep = Some(3))),
        ("vision pooled", baseline(VisionBaseline::Pool, 4)),
        ("vision drawn", baseline(VisionBaseline::Random, 3)),
        (
            "vision with drop and skip_decode",
            CompressionOptions {
                drop: drop_layers(0, 2).drop,
                vision: vision(|vision| vision.keep = Some(4)).vision,
                ..skip_decode(3, Region::Low)
            },
        ),
        ("ffn_skip with vision", CompressionOptions { vision: vision(|_| {}).vision, ..ffn_skip(|_| {}) }),
    ]
}
