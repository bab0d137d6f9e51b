//! A weight matrix in levels, of which a prefix is held: it grows and shrinks by one at its end.

use crate::kernels::cpu::bitstack::{Level, LevelShape, RECONSTRUCT_FROM};
use crate::{Result, ZooError};

/// How a token is served by weights that come in levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Service {
    /// Blocks of the whole model's stack that it may use.
    pub blocks: usize,
    /// Whether it is one of many that are computed at once. A property of the token and not of the step, so that
    /// it gets the same bits in any company.
    pub many: bool,
}

impl Service {
    /// The service of the token at `position` of a sequence that is served with `blocks`, whose tokens from
    /// `decode_from` on were sampled, if any was.
    ///
    /// Prompts are computed as many tokens, however they are cut into steps; sampled tokens one by one, also when
    /// they are computed again in one go.
    pub fn of(position: usize, (blocks, decode_from): (usize, Option<usize>)) -> Self {
        let many = decode_from.is_none_or(|from| from >= RECONSTRUCT_FROM && position < from);
        Self { blocks, many }
    }

    /// How many tokens of a sequence whose first `prompt_len` tokens were not sampled have K and V that other
    /// sequences with the same beginning would compute alike.
    pub fn shareable_len(prompt_len: usize) -> usize {
        if prompt_len >= RECONSTRUCT_FROM { prompt_len } else { 0 }
    }
}

/// `[rows, cols]` in levels.
#[derive(Debug)]
pub struct StackMatrix {
    shape: LevelShape,
    levels: Vec<Level>,
    /// Where in the model's stack the levels after the first are, in order.
    places: Vec<usize>,
}

impl StackMatrix {
    /// A matrix that holds nothing yet, of which `places` says where its levels after the first lie in the stack.
    pub fn new(shape: LevelShape, places: Vec<usize>) -> Self {
        Self { shape, levels: Vec::new(), places }
    }

    /// Its sizes.
    pub fn shape(&self) -> LevelShape {
        self.shape
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.levels.len() * self.shape.held_bytes()
    }

    /// The levels held.
    pub fn levels(&self) -> &[Level] {
        &self.levels
    }

    /// Levels among the first `blocks` of the stack, and the first one.
    pub fn used(&self, blocks: usize) -> usize {
        1 + self.places.partition_point(|&place| place < blocks)
    }

    /// Holds the next level.
    ///
    /// # Errors
    /// [`ZooError::Unsupported`] when it has other sizes, and nothing changes.
    pub fn grow(&mut self, level: Level) -> Result<()> {
        if level.shape() != self.shape {
            let (found, own) = (level.shape(), self.shape);
            return Err(ZooError::Unsupported(format!("a level of sizes {found:?} of a matrix of {own:?}")));
        }
        self.levels.push(level);
        Ok(())
    }

    /// Frees the last level, if there is more than one.
    pub fn shrink(&mut self) {
        if self.levels.len() > 1 {
            self.levels.pop();
        }
    }

    /// Writes weight row `row`, by all levels held, to `out`, `[cols]`.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        out.fill(0.0);
        self.levels.iter().for_each(|level| level.add_row(row, out));
    }
}
