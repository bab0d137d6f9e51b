//! FFN skipping as functions; see `ffn.cuh`.

use super::device::{Device, Part};
use super::ops::{need, run};
use super::params::{SkipParams, WatchParams};
use crate::Result;

/// Words of a watched token, of a row's rule, and of a layer's tally, as `ffn.cuh` declares them.
pub(super) const WATCHED_WORDS: usize = 3;
pub(super) const RULE_WORDS: usize = 5;
pub(super) const TALLY_WORDS: usize = 3;
/// Words of a token's state before the bits of its layers.
pub(super) const STATE_WORDS: usize = 2;

/// Which tokens the kernels of a sublayer pass over.
#[derive(Debug, Clone, Copy)]
pub struct Skips {
    /// A tally, whose third word is the number of tokens that run the sublayer: with 0 its kernels do nothing. Or
    /// [`Part::NONE`].
    pub tally: Part,
    /// `[step tokens, stride]` u32.
    pub states: Part,
    /// Words of a state.
    pub stride: usize,
    /// The layer.
    pub layer: usize,
}

impl Skips {
    /// The same where kernels have to write what each token is given, even if that is nothing for all of them.
    #[must_use]
    pub fn one_by_one(self) -> Self {
        Self { tally: Part::NONE, ..self }
    }

    pub(super) fn params(skips: Option<&Self>) -> SkipParams {
        skips.map_or_else(bytemuck::Zeroable::zeroed, |skips| SkipParams {
            runs: if skips.tally.is_empty() {
                0
            } else {
                skips.tally.pointer() + 4 * (TALLY_WORDS as u64 - 1)
            },
            states: skips.states.pointer(),
            stride: skips.stride as u32,
            layer: skips.layer as u32,
        })
    }
}

/// The tokens that may leave out the FFN of a layer.
#[derive(Debug, Clone, Copy)]
pub struct Watch {
    /// `[count]` of `Watched`.
    pub watched: Part,
    /// How many.
    pub count: usize,
    /// `[rows]` of `FfnRule`.
    pub rules: Part,
    /// `[layers]` of `Tally`.
    pub tallies: Part,
    /// What the FFN's kernels look at.
    pub skips: Skips,
}

impl Watch {
    /// Decides who leaves the FFN out, and keeps the tokens' residual streams `x`, `[step tokens, width]` f32, in `before`,
    /// `[count, width]`.
    ///
    /// # Errors
    /// [`crate::ZooError::Device`].
    pub fn decide(&self, device: &dyn Device, (x, width): (Part, usize), before: Part) -> Result<()> {
        let params = self.params((x, width), before)?;
        run(device, ("ffn_watch", 256, 0), [self.count as u32, 1, 1], &params)
    }

    /// Compares the streams with what they were.
    ///
    /// # Errors
    /// [`crate::ZooError::Device`].
    pub fn observe(&self, device: &dyn Device, (x, width): (Part, usize), before: Part) -> Result<()> {
        let params = self.params((x, width), before)?;
        run(device, ("ffn_observe", 256, 4 * 32), [self.count as u32, 1, 1], &params)
    }

    fn params(&self, (x, width): (Part, usize), before: Part) -> Result<WatchParams> {
        need("watched", self.watched, 4 * WATCHED_WORDS * self.count)?;
        need("streams before the FFN", before, 4 * self.count * width)?;
        need("tallies", self.tallies, 4 * TALLY_WORDS * (self.skips.layer + 1))?;
        Ok(WatchParams {
            x: x.pointer(),
            before: before.pointer(),
            watched: self.watched.pointer(),
            rules: self.rules.pointer(),
            tallies: self.tallies.pointer(),
            states: self.skips.states.pointer(),
            width: width as u32,
            stride: self.skips.stride as u32,
            layer: self.skips.layer as u32,
            pad: 0,
        })
    }
}
