//! Weights that come in levels: every matrix is a sum of terms, of which a prefix is a valid matrix.

use std::borrow::Cow;

use crate::Result;
use crate::kernels::cpu::bitstack::{Level, LevelParts, LevelShape};

/// A level of one matrix, as a checkpoint lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LevelEntry {
    /// The matrix, by its Hugging Face name without `.weight` (`model.layers.0.self_attn.q_proj`).
    pub matrix: String,
    /// 0 is the first.
    pub level: usize,
    /// Its sizes; those of every level of a matrix are the same.
    pub shape: LevelShape,
}

/// A level's bytes as an artefact has them: signs, then `A` and `B` in little-endian f16 (see [`LevelParts`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredLevel {
    shape: LevelShape,
    bytes: Vec<u8>,
}

impl StoredLevel {
    /// A level of `shape`, or `None` when `bytes` has another length.
    pub fn new(shape: LevelShape, bytes: Vec<u8>) -> Option<Self> {
        let LevelShape { rows, cols, rank } = shape;
        let len = rows * cols / 8 + 2 * rank * (rows + cols);
        (bytes.len() == len).then_some(Self { shape, bytes })
    }

    /// Its sizes.
    pub fn shape(&self) -> LevelShape {
        self.shape
    }

    /// What `read` makes of its parts.
    pub fn read<T>(&self, read: impl FnOnce(&LevelParts<'_>) -> T) -> T {
        let LevelShape { rows, cols, rank } = self.shape;
        let (signs, factors) = self.bytes.split_at(rows * cols / 8);
        let halves = words(factors);
        let (left, right) = halves.split_at(rows * rank);
        read(&LevelParts { signs, left, right })
    }

    /// The level in the form of the CPU's kernels.
    ///
    /// # Errors
    /// As [`Level::new`].
    pub fn lay(&self) -> Result<Level> {
        self.read(|parts| Level::new(self.shape, parts))
    }
}

/// Little-endian words, in place where the machine and the alignment allow it.
fn words(bytes: &[u8]) -> Cow<'_, [u16]> {
    match bytemuck::try_cast_slice(bytes) {
        Ok(words) if cfg!(target_endian = "little") => Cow::Borrowed(words),
        _ => bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect(),
    }
}

/// A checkpoint whose matrices come in levels: a **base** of the first level of each, and a **stack** of all others
/// in order of importance, of which any prefix may be held. The levels of one matrix come in order.
pub trait LevelSource: Send + std::fmt::Debug {
    /// The first level of every matrix, in the order in which they are best read.
    fn base(&self) -> &[LevelEntry];

    /// Further levels, the most important first.
    fn stack(&self) -> &[LevelEntry];

    /// Reads and checks an entry of the base.
    ///
    /// # Errors
    /// [`crate::ZooError::Io`] and [`crate::ZooError::Format`] when it cannot be read or is not what its checksum
    /// says; nothing of it is used then.
    fn read_base(&self, index: usize) -> Result<StoredLevel>;

    /// The same of the stack.
    ///
    /// # Errors
    /// As [`LevelSource::read_base`].
    fn read(&self, index: usize) -> Result<StoredLevel>;
}
