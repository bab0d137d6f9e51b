//! What was measured of a model once, for the methods that need it: `rheostat calibrate` writes it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::options::CompressionOptions;
use super::{Sublayer, refuse};
use crate::{Result, ZooError};

/// The version of the file format that this build reads and writes.
pub const VERSION: u32 = 1;

/// Measurements of one model over one text, and the presets chosen from them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// Format version.
    pub version: u32,
    /// What was calibrated, and on what.
    pub source: Source,
    /// Mean cosine of the residual stream before and after the attention of each layer.
    pub attention_similarity: Vec<f64>,
    /// The same for the feed-forward blocks.
    pub ffn_similarity: Vec<f64>,
    /// FFN skipping.
    pub ffn_skip: FfnCalibration,
    /// Key pruning.
    pub think: ThinkCalibration,
    /// Presets by name, besides `dense`.
    #[serde(default)]
    pub profiles: BTreeMap<String, CompressionOptions>,
    /// Of what was tried, the plans that no other beats in quality, work and KV, by rising loss: what a server
    /// may choose between by itself.
    #[serde(default)]
    pub front: Vec<FrontPoint>,
    /// What the presets and the front were chosen from.
    #[serde(default)]
    pub tried: Vec<Tried>,
}

/// What was calibrated, and on what.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// The model's name, for people.
    pub model: String,
    /// SHA-256 over the weight files.
    pub weights_sha256: String,
    /// The text's file name, for people.
    pub text: String,
    /// SHA-256 of the text.
    pub text_sha256: String,
    /// Tokens measured.
    pub tokens: usize,
}

/// Where FFNs may be skipped, and from which cosine.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FfnCalibration {
    /// First layer whose FFN may be skipped.
    pub first_layer: usize,
    /// Layer after the last.
    pub end_layer: usize,
    /// Ascending by target.
    pub thresholds: Vec<FfnThreshold>,
}

/// The threshold found for a target.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FfnThreshold {
    /// Fraction of all FFNs asked for.
    pub target: f32,
    /// Cosine that comes nearest.
    pub threshold: f32,
    /// Blocks skipped before the next test, for which the threshold holds.
    pub max_skip: usize,
    /// Fraction that it skipped on the calibration text.
    pub reached: f32,
}

/// A plan that was tried on held-out windows of the calibration text.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tried {
    /// The plan.
    pub plan: CompressionOptions,
    /// Perplexity over that of dense, less 1.
    pub perplexity_increase: f64,
    /// Work in the layers as a share of dense.
    pub layer_work: f64,
    /// KV pages as a share of dense.
    pub kv: f64,
}

/// A plan of the front. Requests may name it as they name a preset.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FrontPoint {
    /// The preset's name, where it is one's plan, else one made of its methods.
    pub name: String,
    /// The plan.
    pub plan: CompressionOptions,
    /// Perplexity over that of dense, less 1.
    pub perplexity_increase: f64,
    /// Work in the layers as a share of dense.
    pub layer_work: f64,
    /// KV pages as a share of dense.
    pub kv: f64,
}

/// How key channels are spread, by layer: what pruning by query-driven score can hope for.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ThinkCalibration {
    /// `[layer]`: share of the score Σ‖q_j‖²‖k_j‖² that the best 60% of the channels hold, mean of heads.
    pub kept_score: Vec<f64>,
}

/// The artefact that this build carries for a model of the catalogue.
pub fn shipped(model: &str) -> Option<&'static str> {
    match model {
        "smollm2-135m" => Some(include_str!("../../calibration/smollm2-135m.toml")),
        _ => None,
    }
}

impl Calibration {
    /// Reads the TOML text of an artefact for a model of `num_layers`, whose weight files have the digest
    /// `weights_sha256`.
    ///
    /// # Errors
    /// [`ZooError::Compression`] for another version, another model, or numbers that do not fit it.
    pub fn parse(text: &str, num_layers: usize, weights_sha256: &str) -> Result<Self> {
        let fail = |what: String| ZooError::Compression(format!("the calibration artefact {what}"));
        let calibration: Self = toml::from_str(text).map_err(|e| fail(format!("does not parse: {e}")))?;
        if calibration.version != VERSION {
            return Err(fail(format!(
                "has version {}, this build reads {VERSION}; run `rheostat calibrate` again",
                calibration.version
            )));
        }
        if calibration.source.weights_sha256 != weights_sha256 {
            return Err(fail(format!(
                "is of another model (`{}`, weights {:.12}…, not {weights_sha256:.12}…); run `rheostat calibrate` on this one",
                calibration.source.model, calibration.source.weights_sha256
            )));
        }
        calibration.check(num_layers)?;
        Ok(calibration)
    }

    /// # Errors
    /// [`ZooError::Compression`] when the numbers do not fit a model of `num_layers`.
    pub fn check(&self, num_layers: usize) -> Result<()> {
        let lengths = [self.attention_similarity.len(), self.ffn_similarity.len()];
        let finite = self.attention_similarity.iter().chain(&self.ffn_similarity).all(|v| v.is_finite());
        let (low, high) = self.ffn_region();
        if lengths != [num_layers; 2] || !finite || low > high || high > num_layers {
            return refuse(format!("the calibration artefact does not fit a model of {num_layers} layers"));
        }
        Ok(())
    }

    /// The artefact as TOML text.
    ///
    /// # Errors
    /// [`ZooError::Compression`] when it holds what TOML cannot.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(self).map_err(|e| ZooError::Compression(e.to_string()))
    }

    /// Layers by the importance of their attention, least important first (S = 1 − cosine ascending;
    /// equal ones in layer order). The first and the last layer come last of all.
    pub fn attention_order(&self) -> Vec<usize> {
        order(&self.attention_similarity)
    }

    /// The same for feed-forward blocks.
    pub fn ffn_order(&self) -> Vec<usize> {
        order(&self.ffn_similarity)
    }

    /// All sublayers in one order, least important first.
    pub fn joint_order(&self) -> Vec<(usize, Sublayer)> {
        let layers = self.attention_similarity.len();
        let both: Vec<f64> = self.attention_similarity.iter().chain(&self.ffn_similarity).copied().collect();
        let mut indices: Vec<usize> = (0..both.len()).collect();
        let is_end = |index: usize| index.is_multiple_of(layers) || index % layers == layers - 1;
        indices.sort_by(|&a, &b| is_end(a).cmp(&is_end(b)).then(both[b].total_cmp(&both[a])).then(a.cmp(&b)));
        let name =
            |index: usize| (index % layers, if index < layers { Sublayer::Attention } else { Sublayer::Ffn });
        indices.into_iter().map(name).collect()
    }

    /// Layers whose FFN may be skipped, `first..end`.
    pub fn ffn_region(&self) -> (usize, usize) {
        (self.ffn_skip.first_layer, self.ffn_skip.end_layer)
    }

    /// The cosine from which FFNs are skipped so that about `target` of them are, and how many are skipped
    /// before the next test: linear between calibrated targets of one `max_skip`, else the nearest one's.
    ///
    /// # Errors
    /// [`ZooError::Compression`] when no calibrated target reaches so far.
    pub fn ffn_threshold(&self, target: f32) -> Result<(f32, usize)> {
        let table = &self.ffn_skip.thresholds;
        let Some(next) = table.iter().position(|entry| entry.target >= target) else {
            let most = table.last().map_or(0.0, |entry| entry.target);
            return refuse(format!(
                "compression.ffn_skip.target {target} was not calibrated: this model has thresholds up to {most}"
            ));
        };
        let high = table[next];
        let Some(low) = next.checked_sub(1).map(|index| table[index]) else {
            return Ok((high.threshold, high.max_skip));
        };
        let part = (target - low.target) / (high.target - low.target);
        if low.max_skip != high.max_skip {
            let nearest = if part < 0.5 { low } else { high };
            return Ok((nearest.threshold, nearest.max_skip));
        }
        Ok((low.threshold + (high.threshold - low.threshold) * part, high.max_skip))
    }
}

fn order(similarity: &[f64]) -> Vec<usize> {
    let is_end = |layer: usize| layer == 0 || layer + 1 == similarity.len();
    let mut layers: Vec<usize> = (0..similarity.len()).collect();
    layers.sort_by(|&a, &b| {
        is_end(a).cmp(&is_end(b)).then(similarity[b].total_cmp(&similarity[a])).then(a.cmp(&b))
    });
    layers
}
