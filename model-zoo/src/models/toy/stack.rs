//! The toy's weights, where it is told to have some: a stack of blocks that hold real memory and say nothing.

use crate::memory::Region;
use crate::models::elastic::ElasticWeights;
use crate::{Result, ZooError};

/// Matrices of the toy: so many blocks make one level.
const MATRICES: usize = 4;
/// Bytes of the toy's base.
const BASE_BYTES: u64 = 1 << 20;

/// How large the toy's stack is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ToyStackOptions {
    /// Blocks of the whole stack.
    pub num_blocks: usize,
    /// Blocks held at first.
    pub held: usize,
    /// Bytes of a block.
    pub block_bytes: usize,
    /// This block cannot be read.
    pub unreadable: Option<usize>,
}

/// The blocks that are held, over a base of one mebibyte and one level.
#[derive(Debug)]
pub(super) struct ToyStack {
    options: ToyStackOptions,
    blocks: Vec<Region>,
}

impl ToyStack {
    pub(super) fn new(options: ToyStackOptions) -> Self {
        Self { options, blocks: (0..options.held).map_while(|_| block(options.block_bytes).ok()).collect() }
    }
}

impl ElasticWeights for ToyStack {
    fn num_blocks(&self) -> usize {
        self.options.num_blocks
    }

    fn held(&self) -> usize {
        self.blocks.len()
    }

    fn bytes_of(&self, blocks: usize) -> u64 {
        BASE_BYTES + (blocks * self.options.block_bytes) as u64
    }

    fn num_levels(&self) -> usize {
        1 + self.options.num_blocks.div_ceil(MATRICES)
    }

    fn blocks_of_levels(&self, levels: usize) -> usize {
        (levels.saturating_sub(1) * MATRICES).min(self.options.num_blocks)
    }

    fn mean_levels(&self, blocks: usize) -> f64 {
        1.0 + blocks as f64 / MATRICES as f64
    }

    fn grow(&mut self) -> Result<()> {
        let next = self.blocks.len();
        if self.options.unreadable == Some(next) {
            return Err(ZooError::format("toy", format!("block {next} is not what its checksum says")));
        }
        if next < self.options.num_blocks {
            self.blocks.push(block(self.options.block_bytes)?);
        }
        Ok(())
    }

    fn shrink(&mut self) {
        self.blocks.pop();
    }
}

/// A block, every byte of it resident.
fn block(bytes: usize) -> Result<Region> {
    let mut block = Region::zeroed(bytes)?;
    block.bytes_mut().fill(1);
    Ok(block)
}
