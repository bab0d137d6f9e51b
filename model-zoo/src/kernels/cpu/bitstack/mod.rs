//! Products with weights that are sums of signed low-rank matrices (BitStack, arXiv 2410.23918, methods.md §1):
//! `W = Σᵢ Sᵢ ⊙ (Aᵢ·Bᵢ)` with signs `Sᵢ` `[rows, cols]` of one bit, and `Aᵢ` `[rows, rank]` and `Bᵢ`
//! `[rank, cols]` in f16. A **level** is one such term; a token is served with a prefix of them.
//!
//! There are two ways to `y = W·x`, and the caller says for every token which one:
//!
//! - **Signed sums**, for few tokens: `y += A[:, c] ⊙ (S·(B[c, :] ⊙ x))` for every level and every `c` of its rank.
//!   `B[c, :] ⊙ x` is quantized to int8 in blocks of 32 channels ([`columns`]), so that what is left is a matrix of
//!   signs times int8 columns: sixty-four signs are spread from bits to bytes by one instruction, and used for up
//!   to eight columns ([`signed`]). Costs `levels · rank` passes over the signs a token.
//! - **Reconstruction**, for many tokens: sixteen rows of `W` are made in f32, level by level, quantized to int8 in
//!   blocks of 32 columns, and multiplied with int8 activations by the kernel of packed matrices
//!   ([`reconstruct`]). Costs `levels · (rank + 3)` passes however many tokens there are.
//!
//! Rounding to int8 moves a product by at most half a step a channel: by `Σ |A[r, c]| · step/2` over all levels,
//! `c` and channels, with `step = max |B[c, j]·x[j]| / 127` of the channel's block, in the first way; by
//! `Σ |w|·step(x)/2 + |x|·step(w)/2` over the channels in the second. The orders of summation are fixed: a token
//! gets the same bits whatever else is in the call.

mod columns;
mod layout;
mod product;
mod reconstruct;
mod signed;
#[cfg(test)]
mod tests;

pub use columns::Columns;
pub use product::{Rows, StackProduct, matmul_many};

use half::f16;

use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::packed::GROUP;
use crate::kernels::cpu::quantize::BLOCK;
use crate::memory::Region;
use crate::{Result, ZooError};

/// The largest rank of a level.
pub const MAX_RANK: usize = 32;

/// Tokens of a prompt from which on reconstruction is the faster way for it: measured, see `loadtest/RESULTS.md`.
/// At most the least size of a KV block, so that no shared page of a prompt was computed in the other way.
pub const RECONSTRUCT_FROM: usize = 12;

/// Memory is mapped in pages of so many bytes.
const PAGE: usize = 4096;

/// Sizes of a level.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LevelShape {
    /// Output rows.
    pub rows: usize,
    /// Input columns, a multiple of 32.
    pub cols: usize,
    /// Columns of `A` and rows of `B`, 1 to [`MAX_RANK`].
    pub rank: usize,
}

/// A level as the artefact has it.
#[derive(Debug, Clone, Copy)]
pub struct LevelParts<'a> {
    /// `[rows · cols / 8]`, row-major, the most significant bit first; a set bit is +1.
    pub signs: &'a [u8],
    /// f16 bits of `A`, `[rows, rank]`
    pub left: &'a [u16],
    /// f16 bits of `B`, `[rank, cols]`
    pub right: &'a [u16],
}

/// One level in the form of its kernels, in a mapping of its own.
///
/// Rows are taken in groups of 16, the last one padded. For each four columns a group has 64 bits, of row `r` the
/// bits `4r..4r+4`: spread to bytes, they lie as the weights of packed matrices do. Then `A`, `[groups, rank, 16]`,
/// and `B` as it is.
#[derive(Debug)]
pub struct Level {
    shape: LevelShape,
    region: Region,
}

/// A group's part of a level.
#[derive(Clone, Copy)]
struct GroupLevel<'a> {
    rank: usize,
    /// `[cols / 4]`
    signs: &'a [u64],
    /// f16 bits, `[rank, 16]`
    left: &'a [u16],
}

impl LevelShape {
    /// Fails where the kernels cannot take it.
    ///
    /// # Errors
    /// [`ZooError::Unsupported`] with the figure that does not fit.
    pub fn check(self) -> Result<()> {
        let Self { rows, cols, rank } = self;
        if rows == 0 || cols == 0 || !cols.is_multiple_of(BLOCK) {
            return Err(ZooError::Unsupported(format!(
                "levels of shape [{rows}, {cols}]: the width must be a multiple of {BLOCK}"
            )));
        }
        if !(1..=MAX_RANK).contains(&rank) {
            return Err(ZooError::Unsupported(format!("levels of rank {rank}; it must be 1 to {MAX_RANK}")));
        }
        Ok(())
    }

    fn groups(self) -> usize {
        self.rows.div_ceil(GROUP)
    }

    /// Words of signs, and 16-bit words of `A`, of one group.
    fn group_len(self) -> (usize, usize) {
        (self.cols / 4, self.rank * GROUP)
    }

    /// Where `A` and `B` begin, and where the level ends, in bytes.
    fn offsets(self) -> [usize; 3] {
        let (signs, left) = self.group_len();
        let left_start = self.groups() * signs * 8;
        let right_start = left_start + self.groups() * left * 2;
        [left_start, right_start, right_start + self.rank * self.cols * 2]
    }

    /// Bytes that a level of this shape takes, whole pages of memory.
    pub fn held_bytes(self) -> usize {
        self.offsets()[2].next_multiple_of(PAGE)
    }
}

impl Level {
    /// Lays `parts` out for the kernels.
    ///
    /// # Errors
    /// [`ZooError::Unsupported`] when the shape is not served or the parts do not have it, [`ZooError::Memory`]
    /// when there is no room.
    pub fn new(shape: LevelShape, parts: &LevelParts<'_>) -> Result<Self> {
        shape.check()?;
        let LevelShape { rows, cols, rank } = shape;
        let lens = [parts.signs.len(), parts.left.len(), parts.right.len()];
        if lens != [rows * cols / 8, rows * rank, rank * cols] {
            return Err(ZooError::Unsupported(format!(
                "a level of shape [{rows}, {cols}] and rank {rank} has {lens:?} signs and factors"
            )));
        }
        let mut region = Region::zeroed(shape.held_bytes())?;
        let [left_start, right_start, end] = shape.offsets();
        let (signs, rest) = region.bytes_mut()[..end].split_at_mut(left_start);
        layout::lay_signs(Isa::detect(), (shape, parts.signs), bytemuck::cast_slice_mut(signs));
        let (left, right) = rest.split_at_mut(right_start - left_start);
        let left: &mut [u16] = bytemuck::cast_slice_mut(left);
        for (row, values) in parts.left.chunks_exact(rank).enumerate() {
            let group = row / GROUP * rank * GROUP;
            values.iter().enumerate().for_each(|(c, &a)| left[group + c * GROUP + row % GROUP] = a);
        }
        bytemuck::cast_slice_mut(right).copy_from_slice(parts.right);
        Ok(Self { shape, region })
    }

    /// Its sizes.
    pub fn shape(&self) -> LevelShape {
        self.shape
    }

    /// Adds row `row` of `S ⊙ (A·B)` to `out`, `[cols]`.
    pub fn add_row(&self, row: usize, out: &mut [f32]) {
        let LevelShape { cols, rank, .. } = self.shape;
        let (group, lane) = (self.group(row / GROUP), row % GROUP);
        for (column, out) in out.iter_mut().enumerate() {
            let factor = |bits: u16| f16::from_bits(bits).to_f32();
            let term =
                |c: usize| factor(group.left[c * GROUP + lane]) * factor(self.right()[c * cols + column]);
            let sum: f32 = (0..rank).map(term).sum();
            let plus = group.signs[column / 4] >> (4 * lane + column % 4) & 1 == 1;
            *out += if plus { sum } else { -sum };
        }
    }

    /// f16 bits of `B`, `[rank, cols]`
    fn right(&self) -> &[u16] {
        let [_, start, end] = self.shape.offsets();
        bytemuck::cast_slice(&self.region.bytes()[start..end])
    }

    fn group(&self, group: usize) -> GroupLevel<'_> {
        let (signs, left) = self.shape.group_len();
        let [left_start, right_start, _] = self.shape.offsets();
        let bytes = self.region.bytes();
        let all_signs: &[u64] = bytemuck::cast_slice(&bytes[..left_start]);
        let all_left: &[u16] = bytemuck::cast_slice(&bytes[left_start..right_start]);
        GroupLevel {
            rank: self.shape.rank,
            signs: &all_signs[group * signs..(group + 1) * signs],
            left: &all_left[group * left..(group + 1) * left],
        }
    }
}
