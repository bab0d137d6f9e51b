//! The shapes of known models, and the plans that are run at them.

use model_zoo::compression::calibration::{Calibration, FfnCalibration};
use model_zoo::compression::options::{DropLayers, SkipDecode};
use model_zoo::compression::{CompressionOptions, Context, Offer, Plan, Sublayer, registry};
use model_zoo::weights::LlamaShape;

use super::bench::Sizes;

/// Tokens over which SkipDecode goes from all layers to half of them.
pub(super) const SKIP_HORIZON: usize = 256;

/// A model's sizes, and what must be reached on one Hopper GPU: milliseconds a step of one row, tokens a second of 32 and
/// of 128, milliseconds of a prefill.
pub(super) struct Shape {
    pub(super) name: &'static str,
    pub(super) sizes: LlamaShape,
    pub(super) goals: [&'static str; 4],
}

pub(super) const SHAPES: [Shape; 3] = [
    Shape {
        name: "135m",
        sizes: LlamaShape {
            hidden: 576,
            ffn: 1536,
            layers: 30,
            heads: [9, 3],
            head_dim: 64,
            vocab: 49_152,
            tied: true,
        },
        goals: ["≤ 0.5 ms", "≥ 32,082 /s", "≥ 83,699 /s", "≤ 9.2 ms"],
    },
    Shape {
        name: "1b",
        sizes: LlamaShape {
            hidden: 2048,
            ffn: 8192,
            layers: 16,
            heads: [32, 8],
            head_dim: 64,
            vocab: 128_256,
            tied: true,
        },
        goals: ["≤ 0.9 ms", "≥ 20,390 /s", "≥ 44,795 /s", "≤ 11.5 ms"],
    },
    Shape {
        name: "8b",
        sizes: LlamaShape {
            hidden: 4096,
            ffn: 14_336,
            layers: 32,
            heads: [32, 8],
            head_dim: 128,
            vocab: 128_256,
            tied: false,
        },
        goals: ["≤ 4.1 ms", "≥ 5,258 /s", "≥ 12,212 /s", "≤ 53.1 ms"],
    },
];

impl Shape {
    /// Half of the attention, a quarter of the FFNs, and SkipDecode to half of the layers.
    pub(super) fn reductions(&self) -> [(String, CompressionOptions); 3] {
        let drop = |attention, ffn| CompressionOptions {
            drop: Some(DropLayers { attention, ffn, joint: 0 }),
            ..CompressionOptions::default()
        };
        let (half, quarter) = (self.sizes.layers / 2, self.sizes.layers / 4);
        let skip =
            SkipDecode { min_layers: Some(half), horizon: Some(SKIP_HORIZON), ..SkipDecode::default() };
        [
            (format!("attention of {half} layers dropped"), drop(half, 0)),
            (format!("FFN of {quarter} layers dropped"), drop(0, quarter)),
            (
                format!("SkipDecode to {half} layers over {SKIP_HORIZON} tokens"),
                CompressionOptions { skip_decode: Some(skip), ..CompressionOptions::default() },
            ),
        ]
    }

    /// The plan of these options; which layers they leave out makes no difference to speed.
    pub(super) fn compile(&self, options: &CompressionOptions, sizes: Sizes) -> model_zoo::Result<Plan> {
        let similarity: Vec<f64> = (0..self.sizes.layers).map(|layer| 0.5 + layer as f64 / 100.0).collect();
        let calibration = Calibration {
            attention_similarity: similarity.clone(),
            ffn_similarity: similarity,
            ffn_skip: FfnCalibration {
                first_layer: 1,
                end_layer: self.sizes.layers - 1,
                ..FfnCalibration::default()
            },
            ..Calibration::default()
        };
        let offer = Offer { calibration: Some(calibration), ..Offer::default() };
        let context = Context {
            num_layers: self.sizes.layers,
            head_dim: self.sizes.head_dim,
            prompt_len: sizes.context,
            max_tokens: sizes.warm + sizes.steps,
            images: &[],
            offer: &offer,
        };
        registry::compile(options, &context)
    }

    /// Bytes that a step of one row at `position` reads: weights of the sublayers that run, the head, keys and values.
    pub(super) fn bytes(&self, plan: &Plan, position: usize) -> f64 {
        let (queries, kv) =
            (self.sizes.heads[0] * self.sizes.head_dim, self.sizes.heads[1] * self.sizes.head_dim);
        let attention = self.sizes.hidden * (2 * queries + 2 * kv) + 2 * kv * position;
        let ffn = 3 * self.sizes.hidden * self.sizes.ffn;
        let runs = |layer, sublayer| plan.active_len(layer, sublayer, (position, 1));
        let layers = (0..self.sizes.layers)
            .map(|l| attention * runs(l, Sublayer::Attention) + ffn * runs(l, Sublayer::Ffn))
            .sum::<usize>();
        2.0 * (layers + self.sizes.vocab * self.sizes.hidden) as f64
    }
}
