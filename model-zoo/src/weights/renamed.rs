//! A checkpoint whose tensors have other names than their readers use.

use super::{RawTensor, WeightSource};
use crate::Result;

/// Names and the prefixes that they may have instead, first come first served. The first entry whose prefix
/// a name begins with holds.
type Prefixes = &'static [(&'static str, &'static [&'static str])];

/// LLaVA's names in transformers since 4.52 and before. The decoder's readers know no LLaVA.
const LLAVA: Prefixes = &[
    ("model.", &["model.language_model.", "language_model.model."]),
    ("lm_head.", &["lm_head.", "language_model.lm_head."]),
    (
        "vision_tower.",
        &[
            "vision_tower.vision_model.",
            "model.vision_tower.vision_model.",
            "model.vision_tower.",
            "vision_tower.",
        ],
    ),
    ("multi_modal_projector.", &["multi_modal_projector.", "model.multi_modal_projector."]),
];

/// A view of a checkpoint under its readers' names.
pub struct Renamed<'a> {
    inner: &'a dyn WeightSource,
    prefixes: Prefixes,
}

impl<'a> Renamed<'a> {
    /// The parts of a LLaVA checkpoint: `model.…` and `lm_head.…` are the decoder, `vision_tower.…` and
    /// `multi_modal_projector.…` the rest.
    pub fn llava(inner: &'a dyn WeightSource) -> Self {
        Self { inner, prefixes: LLAVA }
    }

    /// The name in the checkpoint; where no spelling is there, the first one.
    fn name(&self, name: &str) -> String {
        let known =
            self.prefixes.iter().find_map(|(prefix, others)| Some((name.strip_prefix(prefix)?, others)));
        let Some((rest, others)) = known else { return name.to_owned() };
        let mut spellings = others.iter().map(|other| format!("{other}{rest}")).collect::<Vec<_>>();
        let found = spellings.iter().position(|spelling| self.inner.contains(spelling));
        spellings.swap_remove(found.unwrap_or(0))
    }
}

impl WeightSource for Renamed<'_> {
    fn contains(&self, name: &str) -> bool {
        self.inner.contains(&self.name(name))
    }

    fn tensor(&self, name: &str) -> Result<RawTensor<'_>> {
        self.inner.tensor(&self.name(name))
    }
}
