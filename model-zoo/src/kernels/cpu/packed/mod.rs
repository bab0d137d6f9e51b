//! Quantized weight matrices, repacked so that sixteen output rows are computed in the lanes of a vector.
//!
//! Rows are taken in groups of 16 (the last one padded with zeros) and columns in blocks of 32. Within a
//! block the bytes of four consecutive columns of all sixteen rows are adjacent, so that one broadcast of
//! four int8 activations meets one vector of weights and no sum is ever taken across lanes:
//!
//! - 4-bit: vector `j` of 4 holds columns `4j..4j+4` in the low and `4j+16..4j+20` in the high nibbles;
//! - 8-bit: vector `j` of 8 holds columns `4j..4j+4`, signed.
//!
//! Beside them, per group and block (or half block), sixteen f16 scales and, for affine formats, sixteen
//! f16 minima: `w = scale · q + min`. Weights are held in this form only.

mod portable;
mod row_group;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(in crate::kernels::cpu) use row_group::RowGroup;

use std::ops::Range;

use half::f16;

use super::aligned::AlignedBytes;
use super::isa::Isa;
use super::pool::{Disjoint, Pool};
use super::quantize::{BLOCK, QuantizedRows};

/// Output rows in a group.
pub const GROUP: usize = 16;

/// What a packed block holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// 4-bit unsigned with scale and minimum per 32 columns (Q4_0, Q4_1, Q4_K).
    Affine4,
    /// 8-bit signed with scale per 32 columns (Q8_0, Q5_0).
    Symmetric8,
    /// 8-bit with scale and minimum per 32 columns (Q5_1, Q5_K).
    Affine8,
    /// 8-bit signed with scale per 16 columns (Q6_K).
    Fine8,
}

impl Packing {
    fn is_affine(self) -> bool {
        matches!(self, Self::Affine4 | Self::Affine8)
    }

    /// Bytes of quantized values in a block of 16 rows × 32 columns.
    fn block_bytes(self) -> usize {
        if self == Self::Affine4 { GROUP * BLOCK / 2 } else { GROUP * BLOCK }
    }

    /// Scales of a row in a block of 32 columns.
    fn scales_per_block(self) -> usize {
        if self == Self::Fine8 { 2 } else { 1 }
    }
}

/// One row's values of a block of 32 columns, before packing: `w[i] = scale[i / (32 / n)] · q[i] + min`.
#[derive(Debug, Clone, Copy, Default)]
pub struct UnpackedBlock {
    /// Quantized values: 0..=15 for [`Packing::Affine4`].
    pub q: [i8; BLOCK],
    /// One scale, or one for each half.
    pub scale: [f32; 2],
    /// Minimum, 0 for symmetric packings.
    pub min: f32,
}

/// A packed matrix `[rows, cols]`.
#[derive(Debug)]
pub struct PackedMatrix {
    rows: usize,
    cols: usize,
    packing: Packing,
    /// f16 bits, `[groups, blocks, scales_per_block, 16]`
    scales: Vec<u16>,
    /// f16 bits, `[groups, blocks, 16]`; empty for symmetric packings
    mins: Vec<u16>,
    /// `[groups, blocks, block_bytes]`
    values: AlignedBytes,
}

/// One group's part of a matrix.
#[derive(Clone, Copy)]
struct GroupView<'a> {
    packing: Packing,
    scales: &'a [u16],
    mins: &'a [u16],
    values: &'a [u8],
    blocks: usize,
}

/// What a product does with its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// `out = x·Wᵀ`
    Store,
    /// `out += x·Wᵀ`: the residual add.
    Add,
}

impl PackedMatrix {
    /// Packs `rows` × `cols` (a multiple of 32), asking `block(row, block)` for each row's blocks.
    pub fn pack(
        pool: &Pool,
        [rows, cols]: [usize; 2],
        packing: Packing,
        block: impl Fn(usize, usize) -> UnpackedBlock + Sync,
    ) -> Self {
        let (groups, blocks) = (rows.div_ceil(GROUP), cols / BLOCK);
        let scale_len = blocks * packing.scales_per_block() * GROUP;
        let min_len = if packing.is_affine() { blocks * GROUP } else { 0 };
        let value_len = blocks * packing.block_bytes();
        let mut scales = vec![0u16; groups * scale_len];
        let mut mins = vec![0u16; groups * min_len];
        let mut values = AlignedBytes::zeroed(groups * value_len);
        {
            let (scales, mins) = (Disjoint::new(&mut scales), Disjoint::new(&mut mins));
            let values = Disjoint::new(values.as_bytes_mut());
            pool.run(groups, |group| {
                // SAFETY: each group's part is written by the one chunk of that group.
                let (scales, mins, values) = unsafe {
                    (
                        scales.part(group * scale_len, scale_len),
                        mins.part(group * min_len, min_len),
                        values.part(group * value_len, value_len),
                    )
                };
                for lane in 0..GROUP.min(rows - group * GROUP) {
                    for b in 0..blocks {
                        let unpacked = block(group * GROUP + lane, b);
                        put_values(packing, &mut values[b * packing.block_bytes()..], lane, &unpacked.q);
                        for s in 0..packing.scales_per_block() {
                            let at = (b * packing.scales_per_block() + s) * GROUP + lane;
                            scales[at] = f16::from_f32(unpacked.scale[s]).to_bits();
                        }
                        if packing.is_affine() {
                            mins[b * GROUP + lane] = f16::from_f32(unpacked.min).to_bits();
                        }
                    }
                }
            });
        }
        Self { rows, cols, packing, scales, mins, values }
    }

    /// Output rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        2 * (self.scales.len() + self.mins.len()) + self.values.as_bytes().len()
    }

    fn group(&self, group: usize) -> GroupView<'_> {
        let blocks = self.cols / BLOCK;
        let part = |len: usize| group * len..(group + 1) * len;
        let min_len = if self.packing.is_affine() { blocks * GROUP } else { 0 };
        GroupView {
            packing: self.packing,
            scales: &self.scales[part(blocks * self.packing.scales_per_block() * GROUP)],
            mins: &self.mins[part(min_len)],
            values: &self.values.as_bytes()[part(blocks * self.packing.block_bytes())],
            blocks,
        }
    }

    /// Writes the dequantized `row` to `out`, `[cols]`.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        portable::dequantize_lane(self.group(row / GROUP), row % GROUP, out);
    }

    fn groups(&self) -> usize {
        self.rows.div_ceil(GROUP)
    }

    /// `out = x·Wᵀ` or `out += x·Wᵀ`: `x` is `[n, cols]`, `out` is `[n, rows]`.
    pub fn matmul(&self, pool: &Pool, isa: Isa, x: &QuantizedRows, (write, out): (Write, &mut [f32])) {
        matmul_many(pool, isa, x, &mut [Product { matrix: self, write, out }]);
    }
}

/// One matrix's part in [`matmul_many`].
#[derive(Debug)]
pub struct Product<'a> {
    /// `[rows, cols]`
    pub matrix: &'a PackedMatrix,
    /// What happens with the result.
    pub write: Write,
    /// `[n, rows]`
    pub out: &'a mut [f32],
}

/// Multiplies `x` with several matrices in one parallel region: Q, K and V, or gate and up.
pub fn matmul_many(pool: &Pool, isa: Isa, x: &QuantizedRows, products: &mut [Product<'_>]) {
    for p in &*products {
        assert_eq!(x.channels(), p.matrix.cols, "invariant: activations fit the matrix");
        assert_eq!(p.out.len(), x.rows() * p.matrix.rows, "invariant: the output fits the product");
    }
    let parts: Vec<_> =
        products.iter_mut().map(|p| (p.matrix, p.write, Disjoint::new(&mut *p.out))).collect();
    let groups: usize = parts.iter().map(|(matrix, ..)| matrix.groups()).sum();
    let per_chunk = groups.div_ceil(8 * pool.threads()).max(1);
    pool.run(groups.div_ceil(per_chunk), |chunk| {
        for index in chunk * per_chunk..((chunk + 1) * per_chunk).min(groups) {
            let mut group = index;
            for (matrix, write, out) in &parts {
                if group >= matrix.groups() {
                    group -= matrix.groups();
                    continue;
                }
                let lanes = GROUP.min(matrix.rows - group * GROUP);
                product(isa, matrix.group(group), (x, 0..x.rows()), |token, sums| {
                    // SAFETY: a (matrix, token, group) triple is computed by one chunk.
                    let out = unsafe { out.part(token * matrix.rows + group * GROUP, lanes) };
                    match write {
                        Write::Store => out.copy_from_slice(&sums[..lanes]),
                        Write::Add => out.iter_mut().zip(sums).for_each(|(o, s)| *o += s),
                    }
                });
                break;
            }
        }
    });
}

/// Gives `sink` the sixteen sums of each token of a range.
#[inline]
fn product(
    isa: Isa,
    w: GroupView<'_>,
    x: (&QuantizedRows, Range<usize>),
    sink: impl FnMut(usize, &[f32; GROUP]),
) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => x86::product::<x86::Avx512>(w, x, sink),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => x86::product::<x86::Avx2>(w, x, sink),
        _ => portable::product(w, x, sink),
    }
}

/// Places one row's 32 values in a packed block.
fn put_values(packing: Packing, block: &mut [u8], lane: usize, q: &[i8; BLOCK]) {
    for (column, &q) in q.iter().enumerate() {
        let (vector, byte) = (column / 4, column % 4);
        if packing == Packing::Affine4 {
            let at = (vector % 4) * 64 + lane * 4 + byte;
            block[at] |= if vector < 4 { q as u8 } else { (q as u8) << 4 };
        } else {
            block[vector * 64 + lane * 4 + byte] = q as u8;
        }
    }
}

#[cfg(test)]
mod tests;
