//! The compression seam: what of the model a request runs.
//!
//! [`plan::Plan`] is compiled once, at admission, from [`CompressionOptions`] and never changes; what is
//! decided while a request runs lives in its [`RowState`]. A decoder asks the step's [`route::Route`]
//! before each sublayer which tokens take part, and knows no method by name. A method is one file here
//! plus one line in [`registry`].

pub mod bitstack;
pub mod calibration;
mod drop;
pub mod ffn_skip;
pub mod must_drop;
pub mod options;
pub mod plan;
pub mod registry;
pub mod route;
pub mod skip_decode;
pub mod think;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

pub use calibration::{Calibration, FrontPoint};
pub use options::CompressionOptions;
pub use plan::{KvDemand, Plan, PlanKey, VisualUse};

use crate::vision::PromptImage;
use crate::{Result, ZooError};

/// The two residual sublayers of a decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sublayer {
    /// Self-attention with its norm.
    Attention,
    /// The feed-forward block with its norm.
    Ffn,
}

/// The request and the model for which options are compiled.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// Decoder layers.
    pub num_layers: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Tokens of the prompt.
    pub prompt_len: usize,
    /// Tokens that may be generated.
    pub max_tokens: usize,
    /// Images of the prompt, in order, as [`registry::prepare`] left them.
    pub images: &'a [PromptImage],
    /// What this model offers.
    pub offer: &'a Offer,
}

/// What requests can name of one served model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Offer {
    /// What was measured of the model, if anything was.
    pub calibration: Option<Calibration>,
    /// The operator's own profiles, which win over the model's.
    pub profiles: BTreeMap<String, CompressionOptions>,
    /// Levels of the model's weights, where they come in levels.
    pub levels: Option<usize>,
}

/// What a request's plan has decided while it ran, and the work that it did.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RowState {
    /// Sublayers executed for tokens of this row so far, attention then FFN: the realised work, replays
    /// after preemption included.
    pub sublayers_run: [u64; 2],
    /// Feed-forward blocks that FFN skipping left out so far.
    pub ffns_skipped: u64,
    /// Decisions of FFN skipping.
    pub ffn: ffn_skip::FfnDecisions,
    /// What key pruning has seen and decided.
    pub pruning: think::PruningState,
    /// What became of its image tokens, once its prompt was computed with filters.
    pub visual: Option<Arc<must_drop::filter::VisualOutcome>>,
    /// Sublayers that were left out for image tokens that were dropped.
    pub visual_left_out: u64,
    /// Blocks of elastic weights that the row is served with (see [`crate::models::elastic`]); all that are
    /// held when it is not set.
    pub blocks: Option<usize>,
    /// Where the tokens begin that were sampled by those blocks; without it none was, and all are a prompt's.
    pub decode_from: Option<usize>,
}

impl Offer {
    /// The profile `name`.
    fn profile(&self, name: &str) -> Option<&CompressionOptions> {
        let preset = || self.calibration.as_ref().and_then(|calibration| calibration.profiles.get(name));
        let point = || self.front().iter().find(|point| point.name == name).map(|point| &point.plan);
        self.profiles.get(name).or_else(preset).or_else(point)
    }

    /// The calibrated front; empty where nothing was calibrated.
    pub fn front(&self) -> &[FrontPoint] {
        self.calibration.as_ref().map_or(&[], |calibration| &calibration.front)
    }

    /// Names of all profiles, `dense` first, then in order.
    pub fn profile_names(&self) -> Vec<String> {
        let presets = self.calibration.iter().flat_map(|calibration| calibration.profiles.keys());
        let points = self.front().iter().map(|point| &point.name);
        let names: BTreeSet<&String> = self.profiles.keys().chain(presets).chain(points).collect();
        let others = names.into_iter().filter(|name| *name != registry::DENSE).cloned();
        std::iter::once(registry::DENSE.to_owned()).chain(others).collect()
    }
}

impl<'a> Context<'a> {
    /// The calibration that `method` cannot do without.
    fn calibration(&self, method: &str) -> Result<&'a Calibration> {
        let missing = || {
            ZooError::Compression(format!(
                "compression.{method} needs a calibration artefact of this model; the operator makes one with `rheostat calibrate`"
            ))
        };
        self.offer.calibration.as_ref().ok_or_else(missing)
    }
}

fn refuse<T>(message: impl Into<String>) -> Result<T> {
    Err(ZooError::Compression(message.into()))
}

#[cfg(test)]
mod tests;
