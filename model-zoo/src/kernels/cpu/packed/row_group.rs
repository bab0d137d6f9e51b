//! Sixteen rows of eight bits that are made for one product and then made anew.

use std::ops::Range;

use super::{GROUP, GroupView, Packing, product};
use crate::kernels::cpu::aligned::AlignedBytes;
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::quantize::{BLOCK, QuantizedRows};

/// A group in [`Packing::Symmetric8`].
#[derive(Debug)]
pub(in crate::kernels::cpu) struct RowGroup {
    blocks: usize,
    /// f16 bits, `[blocks, 16]`
    scales: Vec<u16>,
    /// `[blocks, 512]`
    values: AlignedBytes,
}

impl RowGroup {
    /// Zeros, `cols` wide, a multiple of 32.
    pub(in crate::kernels::cpu) fn new(cols: usize) -> Self {
        let blocks = cols / BLOCK;
        let values = AlignedBytes::zeroed(blocks * GROUP * BLOCK);
        Self { blocks, scales: vec![0; blocks * GROUP], values }
    }

    /// Values and scales of block `b`: the value of `column` and `row` at `column / 4 · 64 + row · 4 + column % 4`.
    pub(in crate::kernels::cpu) fn block_mut(&mut self, b: usize) -> (&mut [u8], &mut [u16]) {
        let values = &mut self.values.as_bytes_mut()[b * GROUP * BLOCK..][..GROUP * BLOCK];
        (values, &mut self.scales[b * GROUP..(b + 1) * GROUP])
    }

    /// Gives `sink` the sixteen sums of each token of a range.
    #[inline]
    pub(in crate::kernels::cpu) fn product(
        &self,
        isa: Isa,
        x: &QuantizedRows,
        tokens: Range<usize>,
        sink: impl FnMut(usize, &[f32; GROUP]),
    ) {
        let view = GroupView {
            packing: Packing::Symmetric8,
            scales: &self.scales,
            mins: &[],
            values: self.values.as_bytes(),
            blocks: self.blocks,
        };
        product(isa, view, (x, tokens), sink);
    }
}
