//! The packed products with AVX2 and with AVX-512 VNNI.
//!
//! Tiles of up to eight tokens share each weight vector. Within a block integer sums are exact, and blocks
//! are added in order in one f32 accumulator a lane, so that a token's sums do not depend on the tile.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{GROUP, GroupView, Packing};
use crate::kernels::cpu::quantize::{BLOCK, QuantizedRows, SUB_BLOCK};

/// Tokens in a tile at most.
const TILE: usize = 8;

pub(super) type Sums = [[f32; GROUP]; TILE];

/// A group's packed weights and a tile's activations as pointers whose extents [`product`] has checked.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a> {
    w: GroupView<'a>,
    x: &'a QuantizedRows,
    token: usize,
}

impl Tile<'_> {
    /// Four activations of a token at `column` of block `b`, as the bits of an i32.
    ///
    /// # Safety
    /// `token` and `b` are inside the rows, `column + 4 <= 32`.
    #[inline(always)]
    unsafe fn quad(&self, i: usize, b: usize, column: usize) -> i32 {
        let at = (self.token + i) * self.x.channels() + b * BLOCK + column;
        // SAFETY: by the caller's promise the four bytes are inside `q`.
        unsafe { self.x.q.as_ptr().add(at).cast::<i32>().read_unaligned() }
    }

    /// Index of block `b` of a token in the per-block arrays.
    #[inline(always)]
    fn block(&self, i: usize, b: usize) -> usize {
        (self.token + i) * self.w.blocks + b
    }
}

/// An instruction set's tile kernels.
pub(super) trait Kernel {
    /// Sums of the `n` ∈ {1, 2, 4, 8} tokens of a tile.
    ///
    /// # Safety
    /// The machine has the instruction set, and the tile's tokens are inside `x`.
    unsafe fn tile(tile: Tile<'_>, n: usize, sums: &mut Sums);
}

/// Gives `sink` the sixteen sums of each token of a range.
#[inline]
pub(super) fn product<K: Kernel>(
    w: GroupView<'_>,
    (x, tokens): (&QuantizedRows, Range<usize>),
    mut sink: impl FnMut(usize, &[f32; GROUP]),
) {
    let n = w.packing.scales_per_block();
    assert!(w.values.len() == w.blocks * w.packing.block_bytes() && w.scales.len() == w.blocks * n * GROUP);
    assert!(w.mins.is_empty() != w.packing.is_affine() || w.blocks == 0);
    assert!(w.mins.is_empty() || w.mins.len() == w.blocks * GROUP);
    assert!(x.channels() == w.blocks * BLOCK && x.q.len() >= x.rows() * x.channels());
    assert!(x.scale.len() >= x.rows() * w.blocks && x.scaled_sum.len() >= x.rows() * w.blocks);
    assert!(x.sum.len() >= x.rows() * w.blocks * BLOCK / SUB_BLOCK);
    let mut sums = [[0f32; GROUP]; TILE];
    assert!(tokens.end <= x.rows());
    let mut token = tokens.start;
    while token < tokens.end {
        let left = tokens.end - token;
        let n = if left >= 8 {
            8
        } else if left >= 4 {
            4
        } else {
            left.min(2)
        };
        // SAFETY: `K` was chosen by run-time detection, and every extent was checked above.
        unsafe { K::tile(Tile { w, x, token }, n, &mut sums) };
        for (i, sums) in sums[..n].iter().enumerate() {
            sink(token + i, sums);
        }
        token += n;
    }
}

/// AVX-512 with VNNI: sixteen rows in the lanes of one vector.
pub(super) struct Avx512;

impl Kernel for Avx512 {
    unsafe fn tile(tile: Tile<'_>, n: usize, sums: &mut Sums) {
        // SAFETY: passed on from the caller.
        unsafe {
            match n {
                1 => tile512_packing::<1>(tile, sums),
                2 => tile512_packing::<2>(tile, sums),
                4 => tile512_packing::<4>(tile, sums),
                _ => tile512_packing::<8>(tile, sums),
            }
        }
    }
}

#[inline(always)]
unsafe fn tile512_packing<const N: usize>(tile: Tile<'_>, sums: &mut Sums) {
    // SAFETY: passed on from the caller.
    unsafe {
        match tile.w.packing {
            Packing::Affine4 => tile512_affine4::<N>(tile, sums),
            Packing::Symmetric8 => tile512_eight::<N, false, false>(tile, sums),
            Packing::Affine8 => tile512_eight::<N, true, false>(tile, sums),
            Packing::Fine8 => tile512_eight::<N, false, true>(tile, sums),
        }
    }
}

/// Sixteen f16 values as f32.
///
/// # Safety
/// `at + 16` values are inside `values`.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,f16c")]
unsafe fn halves16(values: &[u16], at: usize) -> __m512 {
    // SAFETY: by the caller's promise the 32 bytes are inside the slice.
    unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(values.as_ptr().add(at).cast())) }
}

/// # Safety
/// As [`Kernel::tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
unsafe fn tile512_affine4<const N: usize>(tile: Tile<'_>, sums: &mut Sums) {
    let low_nibbles = _mm512_set1_epi8(15);
    let mut total = [_mm512_setzero_ps(); N];
    for b in 0..tile.w.blocks {
        let mut dot = [_mm512_setzero_si512(); N];
        for j in 0..4 {
            // SAFETY: the block's 256 bytes are inside `values`; quads are inside the rows.
            unsafe {
                let pair = _mm512_loadu_si512(tile.w.values.as_ptr().add(b * 256 + j * 64).cast());
                let low = _mm512_and_si512(pair, low_nibbles);
                let high = _mm512_and_si512(_mm512_srli_epi16(pair, 4), low_nibbles);
                for (i, dot) in dot.iter_mut().enumerate() {
                    *dot = _mm512_dpbusd_epi32(*dot, low, _mm512_set1_epi32(tile.quad(i, b, 4 * j)));
                    *dot = _mm512_dpbusd_epi32(*dot, high, _mm512_set1_epi32(tile.quad(i, b, 4 * j + 16)));
                }
            }
        }
        // SAFETY: sixteen scales and minima a block.
        let (scale, min) = unsafe { (halves16(tile.w.scales, b * GROUP), halves16(tile.w.mins, b * GROUP)) };
        for i in 0..N {
            let at = tile.block(i, b);
            let scale = _mm512_mul_ps(scale, _mm512_set1_ps(tile.x.scale[at]));
            total[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[i]), scale, total[i]);
            total[i] = _mm512_fmadd_ps(min, _mm512_set1_ps(tile.x.scaled_sum[at]), total[i]);
        }
    }
    for i in 0..N {
        // SAFETY: sixteen floats a token.
        unsafe { _mm512_storeu_ps(sums[i].as_mut_ptr(), total[i]) };
    }
}

/// Signed weights are made unsigned by adding 128; what that adds to a dot product, 128·Σx, is taken off
/// by starting from its negative.
///
/// # Safety
/// As [`Kernel::tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
unsafe fn tile512_eight<const N: usize, const AFFINE: bool, const FINE: bool>(
    tile: Tile<'_>,
    sums: &mut Sums,
) {
    let (parts, vectors) = if FINE { (2, 4) } else { (1, 8) };
    let flip = _mm512_set1_epi8(-128);
    let mut total = [_mm512_setzero_ps(); N];
    for b in 0..tile.w.blocks {
        for part in 0..parts {
            let mut dot: [__m512i; N] = std::array::from_fn(|i| {
                let at = 2 * tile.block(i, b);
                let sum = if FINE { tile.x.sum[at + part] } else { tile.x.sum[at] + tile.x.sum[at + 1] };
                _mm512_set1_epi32(-128 * sum)
            });
            for j in part * vectors..(part + 1) * vectors {
                // SAFETY: the block's 512 bytes are inside `values`; quads are inside the rows.
                unsafe {
                    let signed = _mm512_loadu_si512(tile.w.values.as_ptr().add(b * 512 + j * 64).cast());
                    let w = _mm512_xor_si512(signed, flip);
                    for (i, dot) in dot.iter_mut().enumerate() {
                        *dot = _mm512_dpbusd_epi32(*dot, w, _mm512_set1_epi32(tile.quad(i, b, 4 * j)));
                    }
                }
            }
            // SAFETY: sixteen scales a part.
            let scale = unsafe { halves16(tile.w.scales, (b * parts + part) * GROUP) };
            for i in 0..N {
                let scale = _mm512_mul_ps(scale, _mm512_set1_ps(tile.x.scale[tile.block(i, b)]));
                total[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[i]), scale, total[i]);
            }
        }
        if AFFINE {
            // SAFETY: sixteen minima a block.
            let min = unsafe { halves16(tile.w.mins, b * GROUP) };
            for (i, total) in total.iter_mut().enumerate() {
                *total = _mm512_fmadd_ps(min, _mm512_set1_ps(tile.x.scaled_sum[tile.block(i, b)]), *total);
            }
        }
    }
    for i in 0..N {
        // SAFETY: sixteen floats a token.
        unsafe { _mm512_storeu_ps(sums[i].as_mut_ptr(), total[i]) };
    }
}

/// AVX2: eight rows in the lanes of a vector, a group in two halves.
pub(super) struct Avx2;

impl Kernel for Avx2 {
    unsafe fn tile(tile: Tile<'_>, n: usize, sums: &mut Sums) {
        for half in 0..2 {
            // Sixteen registers hold the accumulators of four tokens.
            for first in (0..n).step_by(4) {
                let tile = Tile { token: tile.token + first, ..tile };
                let sums = &mut sums[first..];
                // SAFETY: passed on from the caller; n ∈ {1, 2, 4, 8}.
                unsafe {
                    match n {
                        1 => tile256_packing::<1>(tile, half, sums),
                        2 => tile256_packing::<2>(tile, half, sums),
                        _ => tile256_packing::<4>(tile, half, sums),
                    }
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn tile256_packing<const N: usize>(tile: Tile<'_>, half: usize, sums: &mut [[f32; GROUP]]) {
    // SAFETY: passed on from the caller.
    unsafe {
        match tile.w.packing {
            Packing::Affine4 => tile256_affine4::<N>(tile, half, sums),
            Packing::Symmetric8 => tile256_eight::<N, false, false>(tile, half, sums),
            Packing::Affine8 => tile256_eight::<N, true, false>(tile, half, sums),
            Packing::Fine8 => tile256_eight::<N, false, true>(tile, half, sums),
        }
    }
}

/// Eight f16 values as f32.
///
/// # Safety
/// `at + 8` values are inside `values`.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn halves8(values: &[u16], at: usize) -> __m256 {
    // SAFETY: by the caller's promise the 16 bytes are inside the slice.
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(values.as_ptr().add(at).cast())) }
}

/// Pair sums stay in i16 for a whole block: 16 · 15 · 127 = 30,480 < 2¹⁵.
///
/// # Safety
/// As [`Kernel::tile`], with `half` 0 or 1.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile256_affine4<const N: usize>(tile: Tile<'_>, half: usize, sums: &mut [[f32; GROUP]]) {
    let (low_nibbles, ones) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
    let mut total = [_mm256_setzero_ps(); N];
    for b in 0..tile.w.blocks {
        let mut pairs = [_mm256_setzero_si256(); N];
        for j in 0..4 {
            // SAFETY: the block's 256 bytes are inside `values`; quads are inside the rows.
            unsafe {
                let at = b * 256 + j * 64 + half * 32;
                let pair = _mm256_loadu_si256(tile.w.values.as_ptr().add(at).cast());
                let low = _mm256_and_si256(pair, low_nibbles);
                let high = _mm256_and_si256(_mm256_srli_epi16(pair, 4), low_nibbles);
                for (i, pairs) in pairs.iter_mut().enumerate() {
                    let x = _mm256_set1_epi32(tile.quad(i, b, 4 * j));
                    *pairs = _mm256_add_epi16(*pairs, _mm256_maddubs_epi16(low, x));
                    let x = _mm256_set1_epi32(tile.quad(i, b, 4 * j + 16));
                    *pairs = _mm256_add_epi16(*pairs, _mm256_maddubs_epi16(high, x));
                }
            }
        }
        let at = b * GROUP + half * 8;
        // SAFETY: sixteen scales and minima a block.
        let (scale, min) = unsafe { (halves8(tile.w.scales, at), halves8(tile.w.mins, at)) };
        for i in 0..N {
            let at = tile.block(i, b);
            let dot = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs[i], ones));
            let scale = _mm256_mul_ps(scale, _mm256_set1_ps(tile.x.scale[at]));
            total[i] = _mm256_fmadd_ps(dot, scale, total[i]);
            total[i] = _mm256_fmadd_ps(min, _mm256_set1_ps(tile.x.scaled_sum[at]), total[i]);
        }
    }
    for i in 0..N {
        // SAFETY: eight floats of sixteen, at 0 or 8.
        unsafe { _mm256_storeu_ps(sums[i].as_mut_ptr().add(half * 8), total[i]) };
    }
}

/// `maddubs` wants one unsigned side: |w| · (x with w's sign). Products of 8-bit pairs need i32 at once.
///
/// # Safety
/// As [`Kernel::tile`], with `half` 0 or 1.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile256_eight<const N: usize, const AFFINE: bool, const FINE: bool>(
    tile: Tile<'_>,
    half: usize,
    sums: &mut [[f32; GROUP]],
) {
    let (parts, vectors) = if FINE { (2, 4) } else { (1, 8) };
    let ones = _mm256_set1_epi16(1);
    let mut total = [_mm256_setzero_ps(); N];
    for b in 0..tile.w.blocks {
        for part in 0..parts {
            let mut dot = [_mm256_setzero_si256(); N];
            for j in part * vectors..(part + 1) * vectors {
                // SAFETY: the block's 512 bytes are inside `values`; quads are inside the rows.
                unsafe {
                    let at = b * 512 + j * 64 + half * 32;
                    let w = _mm256_loadu_si256(tile.w.values.as_ptr().add(at).cast());
                    let magnitude = _mm256_abs_epi8(w);
                    for (i, dot) in dot.iter_mut().enumerate() {
                        let x = _mm256_sign_epi8(_mm256_set1_epi32(tile.quad(i, b, 4 * j)), w);
                        let quads = _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, x), ones);
                        *dot = _mm256_add_epi32(*dot, quads);
                    }
                }
            }
            // SAFETY: sixteen scales a part.
            let scale = unsafe { halves8(tile.w.scales, (b * parts + part) * GROUP + half * 8) };
            for i in 0..N {
                let scale = _mm256_mul_ps(scale, _mm256_set1_ps(tile.x.scale[tile.block(i, b)]));
                total[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[i]), scale, total[i]);
            }
        }
        if AFFINE {
            // SAFETY: sixteen minima a block.
            let min = unsafe { halves8(tile.w.mins, b * GROUP + half * 8) };
            for (i, total) in total.iter_mut().enumerate() {
                *total = _mm256_fmadd_ps(min, _mm256_set1_ps(tile.x.scaled_sum[tile.block(i, b)]), *total);
            }
        }
    }
    for i in 0..N {
        // SAFETY: eight floats of sixteen, at 0 or 8.
        unsafe { _mm256_storeu_ps(sums[i].as_mut_ptr().add(half * 8), total[i]) };
    }
}
