//! The right side of signed sums: activations weighed by a row of `B`, quantized to int8.

use std::ops::Range;

use crate::kernels::cpu::convert::widen_f16;
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::pool::{Disjoint, Pool};
use crate::kernels::cpu::quantize::BLOCK;
use crate::kernels::cpu::vector::multiversion;

/// Columns that lie side by side: those that share a pass over the signs.
pub(super) const WIDTH: usize = 8;

/// 32 channels of eight columns, `b ⊙ x ≈ scale · q`, in the order in which the kernels read them.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct TileBlock {
    /// Four channels of a column at a time, `[channel / 4][column]`
    pub(super) q: [[[i8; 4]; WIDTH]; BLOCK / 4],
    /// −Σq: what a sum over the positive signs, taken twice, starts from.
    pub(super) start: [i32; WIDTH],
    /// The int8 step.
    pub(super) scale: [f32; WIDTH],
}

/// Columns of int8 in tiles of eight.
#[derive(Debug, Default)]
pub struct Columns {
    /// Of a tile.
    blocks: usize,
    /// `[tiles, blocks]`
    tiles: Vec<TileBlock>,
}

impl Columns {
    /// The blocks of some tiles.
    pub(super) fn tiles(&self, range: Range<usize>) -> &[TileBlock] {
        &self.tiles[range.start * self.blocks..range.end * self.blocks]
    }

    /// Makes `count` tiles of columns of `channels`, a multiple of 32. Column `i` of tile `t` is the product of
    /// `of(t, i)`, activations and f16 bits; nothing where that is `None`.
    pub(super) fn fill<'a>(
        &mut self,
        (pool, isa): (&Pool, Isa),
        [count, channels]: [usize; 2],
        of: impl Fn(usize, usize) -> Option<(&'a [f32], &'a [u16])> + Sync,
    ) {
        let blocks = channels / BLOCK;
        self.blocks = blocks;
        self.tiles.resize(count * blocks, TileBlock::default());
        let tiles = Disjoint::new(&mut self.tiles);
        let per_chunk = count.div_ceil(4 * pool.threads()).max(1);
        pool.run(count.div_ceil(per_chunk), |chunk| {
            let mut weights = Vec::new();
            for index in chunk * per_chunk..((chunk + 1) * per_chunk).min(count) {
                // SAFETY: a tile belongs to one chunk.
                let tile = unsafe { tiles.part(index * blocks, blocks) };
                for column in 0..WIDTH {
                    let Some((x, b)) = of(index, column) else { break };
                    assert!(x.len() == channels && b.len() == channels);
                    #[cfg(target_arch = "x86_64")]
                    if isa == Isa::Avx512Vnni {
                        // SAFETY: the instruction set was detected, and the lengths are those of the tile.
                        unsafe { x86::quantize((x, b), tile, column) };
                        continue;
                    }
                    weights.resize(channels, 0.0);
                    widen_f16(isa, b, &mut weights);
                    quantize(isa, (x, &weights), tile, column);
                }
            }
        });
    }
}

multiversion! {
    /// `q = round(b·x / scale)` with `scale = max|b·x| / 127`; a block of zeros has scale 0. No branches and fixed
    /// trip counts, so that the compiler vectorises it.
    fn quantize(factors: (&[f32], &[f32]), tile: &mut [TileBlock], column: usize) {
        let inputs = factors.0.chunks_exact(BLOCK).zip(factors.1.chunks_exact(BLOCK));
        for ((x, b), block) in inputs.zip(tile) {
            let mut product = [0f32; BLOCK];
            for ((p, x), b) in product.iter_mut().zip(x).zip(b) {
                *p = x * b;
            }
            let mut lanes = [0f32; 16];
            for part in product.chunks_exact(16) {
                for (lane, p) in lanes.iter_mut().zip(part) {
                    *lane = lane.max(p.abs());
                }
            }
            let max = lanes.iter().fold(0f32, |a, &b| a.max(b));
            let inverse = if max > 0.0 { 127.0 / max } else { 0.0 };
            let (mut q, mut sum) = ([0i8; BLOCK], 0i32);
            for (p, q) in product.iter().zip(&mut q) {
                // Adding 1.5·2²³ rounds to nearest even into the mantissa's low bits.
                let rounded = (p * inverse + 12_582_912.0).to_bits() as i32 - 0x4B40_0000;
                *q = rounded as i8;
                sum += rounded;
            }
            for (quad, q) in block.q.iter_mut().zip(q.chunks_exact(4)) {
                quad[column].copy_from_slice(q);
            }
            block.scale[column] = max / 127.0;
            block.start[column] = -sum;
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{BLOCK, TileBlock};

    /// The same values with AVX-512: a block in two vectors.
    ///
    /// # Safety
    /// The machine has AVX-512 F and F16C; both factors have 32 values for each block of the tile.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
    pub(super) unsafe fn quantize((x, b): (&[f32], &[u16]), tile: &mut [TileBlock], column: usize) {
        for (index, block) in tile.iter_mut().enumerate() {
            // SAFETY: by the caller's promise block `index` is inside both factors.
            let product = [0, 16].map(|half| unsafe {
                let at = index * BLOCK + half;
                let b = _mm512_cvtph_ps(_mm256_loadu_si256(b.as_ptr().add(at).cast()));
                _mm512_mul_ps(_mm512_loadu_ps(x.as_ptr().add(at)), b)
            });
            let [first, second] = product.map(|product| _mm512_abs_ps(product));
            let max = _mm512_reduce_max_ps(_mm512_max_ps(first, second));
            let inverse = _mm512_set1_ps(if max > 0.0 { 127.0 / max } else { 0.0 });
            let q = product.map(|product| _mm512_cvtps_epi32(_mm512_mul_ps(product, inverse)));
            let bytes = _mm256_set_m128i(_mm512_cvtepi32_epi8(q[1]), _mm512_cvtepi32_epi8(q[0]));
            let mut quads = [[0i8; 4]; BLOCK / 4];
            // SAFETY: 32 bytes.
            unsafe { _mm256_storeu_si256(quads.as_mut_ptr().cast(), bytes) };
            for (to, quad) in block.q.iter_mut().zip(quads) {
                to[column] = quad;
            }
            block.scale[column] = max / 127.0;
            block.start[column] = -_mm512_reduce_add_epi32(_mm512_add_epi32(q[0], q[1]));
        }
    }
}
