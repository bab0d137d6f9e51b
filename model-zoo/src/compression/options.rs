//! A request's compression options as parsed from the wire, before compilation.

use serde::{Deserialize, Serialize};

/// Names of the methods, as requests and metrics have them.
pub const METHODS: [&str; 6] = ["skip_decode", "ffn_skip", "drop", "think", "bitstack", "vision"];

/// What a request asks for. A method adds one field; `None` everywhere is the dense plan. Fields that are
/// given override those of the profile, method by method.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CompressionOptions {
    /// A named preset of the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<String>,
    /// Fewer layers for later tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skip_decode: Option<SkipDecode>,
    /// Saturated feed-forward blocks are skipped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ffn_skip: Option<FfnSkip>,
    /// Sublayers that never run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drop: Option<DropLayers>,
    /// Key channels pruned after the prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub think: Option<Think>,
    /// Fewer levels of weights that come in levels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bitstack: Option<BitStack>,
    /// Image tokens dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vision: Option<Vision>,
}

/// Where SkipDecode takes layers from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Region {
    /// After the first two layers, as published; for checkpoints that were tuned for it.
    Low,
    /// After a quarter of the layers.
    #[default]
    Middle,
}

/// SkipDecode (arXiv 2307.02628): the number of layers falls linearly with the generated position.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SkipDecode {
    /// Layers of the last tokens. Default: 60% of the layers, rounded up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_layers: Option<usize>,
    /// Layers of the first generated token. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_layers: Option<usize>,
    /// Generated tokens over which the number falls. Default: `max_tokens`, at most 256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub horizon: Option<usize>,
    /// Leading layers that always run. Default: from `region`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub core_layers: Option<usize>,
    /// Sets the default of `core_layers`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<Region>,
}

/// Who decides that a feed-forward block is skipped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FfnMode {
    /// Every row for itself.
    #[default]
    Row,
    /// All rows of a step together: a block is skipped when `quorum` of them would.
    Batch,
}

/// How the blocks are chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FfnSelection {
    /// By the similarity that the token itself shows.
    #[default]
    Adaptive,
    /// The blocks most similar in calibration, for every token: a control.
    Static,
    /// Drawn anew for every token: a control.
    Random,
}

/// FFN-SkipLLM (arXiv 2404.03865).
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FfnSkip {
    /// Fraction of all feed-forward blocks to skip, 0 to 0.6. Default 0.25.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<f32>,
    /// First generated tokens that run whole. Default 32.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmup: Option<usize>,
    /// Cosine from which a block counts as saturated. Default: calibrated for `target`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f32>,
    /// Blocks skipped before the similarity is tested again. Default: from `target`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_skip: Option<usize>,
    /// Who decides. Default: every row for itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<FfnMode>,
    /// With `mode: batch`, the share of a step's rows that must agree, above 0 up to 1. Default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quorum: Option<f32>,
    /// How blocks are chosen. Default: by similarity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selection: Option<FfnSelection>,
}

/// LLM-Drop (arXiv 2406.15786): the least important sublayers of the model, by calibration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DropLayers {
    /// Attention sublayers to drop.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub attention: usize,
    /// Feed-forward sublayers to drop.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub ffn: usize,
    /// Sublayers of either kind to drop, by one common order; not together with the other two.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub joint: usize,
}

/// ThinK (arXiv 2407.21018): query-driven pruning of key channels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Think {
    /// Fraction of the key channels to prune, 0 up to less than 1. Default 0.4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f32>,
    /// Last prompt tokens that keep every channel. Default 32.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recent: Option<usize>,
}

/// BitStack (arXiv 2410.23918): the first levels of each matrix.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BitStack {
    /// Levels at most, 1 up to those of the model; as many as are held where that is less. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub levels: Option<usize>,
}

/// What keeps image tokens without looking at them: for comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VisionBaseline {
    /// Means of neighbouring embeddings, over a grid of at most `keep` cells.
    Pool,
    /// `keep` tokens drawn by `seed` and the image.
    Random,
}

/// MustDrop (arXiv 2411.10803): image tokens that nobody looks at are dropped.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vision {
    /// Tokens kept of an image at most, 1 or more. Default: as many as the thresholds keep.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<usize>,
    /// Keep `keep` tokens by this baseline instead; excludes all options but `keep` and `seed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline: Option<VisionBaseline>,
    /// Seed of the baseline `random`. Default 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Mean cosine of nine neighbouring patches from which they become one token; above 1 none do. Default 0.8; off
    /// with `keep`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merge: Option<f32>,
    /// Share of an image's tokens that the encoder's class token looks at most and that are never dropped, 0 to 1.
    /// Default 0.08.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_rate: Option<f32>,
    /// Share of the text's attention to an image below which a token may be dropped, 0 to 1. Default 0.001.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f32>,
    /// Attention of a single text token below which a token may be dropped, 0 or more. Default 0.001.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta: Option<f32>,
    /// Decoder layers after whose attention tokens are dropped, ascending; none drops nothing there. Default: 2, 6,
    /// 10 and 14 of 32, scaled to the model's depth.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<usize>>,
}

impl CompressionOptions {
    /// Names of the methods that are asked for.
    pub fn methods(&self) -> Vec<&'static str> {
        let asked = [
            self.skip_decode.is_some(),
            self.ffn_skip.is_some(),
            self.drop.is_some(),
            self.think.is_some(),
            self.bitstack.is_some(),
            self.vision.is_some(),
        ];
        METHODS.into_iter().zip(asked).filter_map(|(name, is_asked)| is_asked.then_some(name)).collect()
    }

    /// These options with those of `profile` where a method is not given.
    pub fn or(self, profile: &Self) -> Self {
        Self {
            profile: self.profile,
            skip_decode: self.skip_decode.or(profile.skip_decode),
            ffn_skip: self.ffn_skip.or(profile.ffn_skip),
            drop: self.drop.or(profile.drop),
            think: self.think.or(profile.think),
            bitstack: self.bitstack.or(profile.bitstack),
            vision: self.vision.or_else(|| profile.vision.clone()),
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(n: &usize) -> bool {
    *n == 0
}
