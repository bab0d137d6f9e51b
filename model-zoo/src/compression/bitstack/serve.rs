//! The artefact as a source of levels for the decoder, and the levels that a request asks for.

use super::artefact::{Artefact, BlockEntry};
use crate::compression::options::BitStack;
use crate::compression::{Context, Plan, refuse};
use crate::kernels::cpu::bitstack::LevelShape;
use crate::weights::levels::{LevelEntry, LevelSource, StoredLevel};
use crate::{Result, ZooError};

/// An opened artefact whose blocks are read when they are wanted.
#[derive(Debug)]
pub struct ArtefactLevels {
    artefact: Artefact,
    base: Vec<LevelEntry>,
    stack: Vec<LevelEntry>,
}

impl ArtefactLevels {
    /// The levels of `artefact`.
    pub fn new(artefact: Artefact) -> Self {
        let entry = |block: &BlockEntry| {
            let shape = artefact.shape(block.linear);
            let name = block.linear.weight_name();
            LevelEntry {
                matrix: name.strip_suffix(".weight").unwrap_or(&name).to_owned(),
                level: block.level,
                shape: LevelShape { rows: shape.rows, cols: shape.cols, rank: shape.rank },
            }
        };
        let (base, stack) =
            (artefact.base().iter().map(entry).collect(), artefact.stack().iter().map(entry).collect());
        Self { artefact, base, stack }
    }

    /// Reads the level of `entry`, which lies at `block`.
    fn level(&self, entry: &LevelEntry, block: &BlockEntry) -> Result<StoredLevel> {
        let bytes = self.artefact.read_bytes(block)?;
        let len = bytes.len();
        StoredLevel::new(entry.shape, bytes).ok_or_else(|| {
            let what = format!("level {} of {} has {len} bytes", entry.level, entry.matrix);
            ZooError::format(self.artefact.path(), what)
        })
    }
}

impl LevelSource for ArtefactLevels {
    fn base(&self) -> &[LevelEntry] {
        &self.base
    }

    fn stack(&self) -> &[LevelEntry] {
        &self.stack
    }

    fn read_base(&self, index: usize) -> Result<StoredLevel> {
        self.level(&self.base[index], &self.artefact.base()[index])
    }

    fn read(&self, index: usize) -> Result<StoredLevel> {
        self.level(&self.stack[index], &self.artefact.stack()[index])
    }
}

/// Limits the levels that the request is served with.
///
/// # Errors
/// [`ZooError::Compression`] where the model's weights have no levels, or not so many.
pub(in crate::compression) fn apply(options: BitStack, context: &Context<'_>, plan: &mut Plan) -> Result<()> {
    let Some(most) = context.offer.levels else {
        return refuse(
            "compression.bitstack: the weights of this model have no levels; the operator makes ones that have with `rheostat bitstack build`",
        );
    };
    let levels = options.levels.unwrap_or(most);
    if !(1..=most).contains(&levels) {
        return refuse(format!("compression.bitstack.levels is {levels}; this model has 1 to {most}"));
    }
    plan.options_mut().bitstack = Some(BitStack { levels: Some(levels) });
    Ok(())
}
