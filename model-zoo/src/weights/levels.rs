//! Weights that come in levels: every matrix is a sum of terms, of which a prefix is a valid matrix.

use crate::Result;
use crate::kernels::cpu::bitstack::{Level, LevelShape};

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
    fn read_base(&self, index: usize) -> Result<Level>;

    /// The same of the stack.
    ///
    /// # Errors
    /// As [`LevelSource::read_base`].
    fn read(&self, index: usize) -> Result<Level>;
}
