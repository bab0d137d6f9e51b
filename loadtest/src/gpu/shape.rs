//! The shapes of known models, and the plans that are run at them.

use model_zoo::compression::calibration::{Calibration, FfnCalibration};
use model_zoo::compression::options::{DropLayers, SkipDecode};
use model_zoo::compression::{CompressionOptions, Context, Offer, Plan, Sublayer, registry};
use model_zoo::config::{Activation, DecoderConfig, RopeConfig, RopeScaling, RopeStyle};

use super::bench::Sizes;

/// Tokens over which SkipDecode goes from all layers to half of them.
pub(super) const SKIP_HORIZON: usize = 256;

/// A model's sizes, and what must be reached on one Hopper GPU: milliseconds a step of one row, tokens a second of 32 and
/// of 128, milliseconds of a prefill.
pub(super) struct Shape {
    pub(super) name: &'static str,
    pub(super) hidden: usize,
    pub(super) ffn: usize,
    pub(super) layers: usize,
    pub(super) heads: [usize; 2],
    pub(super) head_dim: usize,
    pub(super) vocab: usize,
    pub(super) tied: bool,
    pub(super) goals: [&'static str; 4],
}

pub(super) const SHAPES: [Shape; 3] = [
    Shape {
        name: "135m",
        hidden: 576,
        ffn: 1536,
        layers: 30,
        heads: [9, 3],
        head_dim: 64,
        vocab: 49_152,
        tied: true,
        goals: ["≤ 0.5 ms", "≥ 32,082 /s", "≥ 83,699 /s", "≤ 9.2 ms"],
    },
    Shape {
        name: "1b",
        hidden: 2048,
        ffn: 8192,
        layers: 16,
        heads: [32, 8],
        head_dim: 64,
        vocab: 128_256,
        tied: true,
        goals: ["≤ 0.9 ms", "≥ 20,390 /s", "≥ 44,795 /s", "≤ 11.5 ms"],
    },
    Shape {
        name: "8b",
        hidden: 4096,
        ffn: 14_336,
        layers: 32,
        heads: [32, 8],
        head_dim: 128,
        vocab: 128_256,
        tied: false,
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
        let (half, quarter) = (self.layers / 2, self.layers / 4);
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
        let similarity: Vec<f64> = (0..self.layers).map(|layer| 0.5 + layer as f64 / 100.0).collect();
        let calibration = Calibration {
            attention_similarity: similarity.clone(),
            ffn_similarity: similarity,
            ffn_skip: FfnCalibration {
                first_layer: 1,
                end_layer: self.layers - 1,
                ..FfnCalibration::default()
            },
            ..Calibration::default()
        };
        let offer = Offer { calibration: Some(calibration), ..Offer::default() };
        let context = Context {
            num_layers: self.layers,
            head_dim: self.head_dim,
            prompt_len: sizes.context,
            max_tokens: sizes.warm + sizes.steps,
            images: &[],
            offer: &offer,
        };
        registry::compile(options, &context)
    }

    /// Bytes that a step of one row at `position` reads: weights of the sublayers that run, the head, keys and values.
    pub(super) fn bytes(&self, plan: &Plan, position: usize) -> f64 {
        let (queries, kv) = (self.heads[0] * self.head_dim, self.heads[1] * self.head_dim);
        let attention = self.hidden * (2 * queries + 2 * kv) + 2 * kv * position;
        let ffn = 3 * self.hidden * self.ffn;
        let runs = |layer, sublayer| plan.active_len(layer, sublayer, (position, 1));
        let layers = (0..self.layers)
            .map(|l| attention * runs(l, Sublayer::Attention) + ffn * runs(l, Sublayer::Ffn))
            .sum::<usize>();
        2.0 * (layers + self.vocab * self.hidden) as f64
    }

    pub(super) fn config(&self) -> DecoderConfig {
        DecoderConfig {
            architecture: "llama".into(),
            hidden_size: self.hidden,
            intermediate_size: self.ffn,
            num_layers: self.layers,
            num_heads: self.heads[0],
            num_kv_heads: self.heads[1],
            head_dim: self.head_dim,
            vocab_size: self.vocab,
            max_context: 8192,
            rms_norm_eps: 1e-5,
            rope: RopeConfig { theta: 500_000.0, scaling: RopeScaling::None },
            rope_style: RopeStyle::Half,
            sliding_window: None,
            activation: Activation::Silu,
            qk_norm: false,
            sandwich_norms: false,
            norm_offset: 0.0,
            embedding_scale: 1.0,
            attention_scale: 1.0 / (self.head_dim as f32).sqrt(),
            tie_word_embeddings: self.tied,
        }
    }
}
