//! A checkpoint's levels: where they come from, how many are held, and what each prefix of the stack is.

use std::collections::HashMap;

use crate::kernels::cpu::bitstack::LevelShape;
use crate::weights::levels::{LevelEntry, LevelSource};
use crate::{Result, ZooError};

/// Where levels come from, and how many of them are held.
#[derive(Debug)]
pub(in crate::models) struct Stack {
    pub(in crate::models) source: Box<dyn LevelSource>,
    /// Blocks beside the base.
    pub(in crate::models) held: usize,
    /// Bytes of all weights with the base alone.
    base_bytes: u64,
    /// `[blocks]`: bytes of the first so many blocks of the stack, from 0 on.
    bytes: Vec<u64>,
    /// `[blocks]`: levels of a matrix on average.
    levels: Vec<f64>,
}

/// A matrix of the checkpoint: its sizes, and where its levels after the first lie in the stack.
pub(in crate::models) type Matrices = HashMap<String, (LevelShape, Vec<usize>)>;

/// The matrices that `source` has in levels.
///
/// # Errors
/// [`ZooError::Unsupported`] when the levels of one do not come in order or differ in their sizes.
pub(in crate::models) fn matrices(source: &dyn LevelSource) -> Result<Matrices> {
    let mut matrices = Matrices::new();
    let out_of_order =
        |entry: &LevelEntry| ZooError::Unsupported(format!("level {} of {}", entry.level, entry.matrix));
    for entry in source.base() {
        let before = matrices.insert(entry.matrix.clone(), (entry.shape, Vec::new()));
        if before.is_some() || entry.level != 0 {
            return Err(out_of_order(entry));
        }
    }
    for (place, entry) in source.stack().iter().enumerate() {
        match matrices.get_mut(&entry.matrix) {
            Some((shape, places)) if *shape == entry.shape && places.len() + 1 == entry.level => {
                places.push(place);
            }
            _ => return Err(out_of_order(entry)),
        }
    }
    Ok(matrices)
}

impl Stack {
    /// A stack of which nothing is held yet, beside `other_bytes` of weights that do not come in levels; a level takes
    /// `bytes_of` bytes.
    pub(in crate::models) fn new(
        source: Box<dyn LevelSource>,
        other_bytes: u64,
        bytes_of: impl Fn(&LevelEntry) -> u64,
    ) -> Self {
        let base: u64 = source.base().iter().map(&bytes_of).sum();
        let (mut bytes, mut levels) = (vec![0], vec![1.0]);
        let (mut byte, mut level) = (0, 1.0);
        for entry in source.stack() {
            byte += bytes_of(entry);
            level += bytes_of(entry) as f64 / base as f64;
            bytes.push(byte);
            levels.push(level);
        }
        Self { source, held: 0, base_bytes: other_bytes + base, bytes, levels }
    }

    /// Counts `bytes` more of weights that do not come in levels.
    #[cfg(any(feature = "cuda", feature = "cuda-emulated"))]
    pub(in crate::models) fn add_bytes(&mut self, bytes: u64) {
        self.base_bytes += bytes;
    }

    /// Blocks of the whole stack.
    pub(in crate::models) fn num_blocks(&self) -> usize {
        self.source.stack().len()
    }

    /// Bytes of all weights with the base and the first `blocks` of the stack.
    pub(in crate::models) fn bytes_of(&self, blocks: usize) -> u64 {
        self.base_bytes + self.bytes[blocks]
    }

    /// Levels of the matrix that has most.
    pub(in crate::models) fn num_levels(&self) -> usize {
        1 + self.source.stack().iter().map(|entry| entry.level).max().unwrap_or(0)
    }

    /// The longest prefix of the stack in which no matrix has more than `levels` levels.
    pub(in crate::models) fn blocks_of_levels(&self, levels: usize) -> usize {
        let stack = self.source.stack();
        stack.iter().position(|entry| entry.level >= levels).unwrap_or(stack.len())
    }

    /// Levels of a matrix on average, weighed by bytes, by the first `blocks` of the stack.
    pub(in crate::models) fn mean_levels(&self, blocks: usize) -> f64 {
        self.levels[blocks]
    }
}
