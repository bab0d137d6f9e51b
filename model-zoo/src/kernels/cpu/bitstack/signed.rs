//! Signed sums: a matrix of sign bits times int8 columns, weighed by `A`.
//!
//! A sum over signs is twice the sum over the positive ones, less the sum of all: spread bits are the bytes 2 and 0,
//! and a block's sum starts from −Σq. Sums within a block are exact integers; blocks are added in order in f32.

use half::f16;

use super::GroupLevel;
use super::columns::{TileBlock, WIDTH};
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::packed::GROUP;

/// A group's sums for some tokens.
pub(super) type Sums = [[f32; GROUP]];

/// Adds `A[:, c] ⊙ (S · column)` for `count` columns of a level, in tiles of eight, to `y`: those of token 0 for
/// every `c`, then those of token 1, and so on.
pub(super) fn accumulate(
    isa: Isa,
    group: GroupLevel<'_>,
    (tiles, count): (&[TileBlock], usize),
    y: &mut Sums,
) {
    let blocks = group.signs.len() / 8;
    assert!(group.signs.len() == 8 * blocks && group.left.len() == group.rank * GROUP);
    assert!(tiles.len() == count.div_ceil(WIDTH) * blocks && count <= y.len() * group.rank);
    for (index, tile) in tiles.chunks_exact(blocks).enumerate() {
        let first = index * WIDTH;
        let columns = first..(first + WIDTH).min(count);
        match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the instruction set was detected, and every extent was checked.
            Isa::Avx512Vnni => unsafe { x86::tile512(x86::Tile { group, tile, first }, columns.len(), y) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { x86::tile256(x86::Tile { group, tile, first }, columns.len(), y) },
            _ => plain(group, (tile, columns), y),
        }
    }
}

/// The plain twin.
fn plain(group: GroupLevel<'_>, (tile, columns): (&[TileBlock], std::ops::Range<usize>), y: &mut Sums) {
    for (i, column) in columns.enumerate() {
        let mut total = [0f32; GROUP];
        for (block, signs) in tile.iter().zip(group.signs.chunks_exact(8)) {
            for (lane, total) in total.iter_mut().enumerate() {
                let mut dot = block.start[i];
                for (signs, quad) in signs.iter().zip(&block.q) {
                    for (k, &q) in quad[i].iter().enumerate() {
                        dot += 2 * i32::from(q) * (signs >> (4 * lane + k) & 1) as i32;
                    }
                }
                *total += dot as f32 * block.scale[i];
            }
        }
        let c = column % group.rank;
        let y = &mut y[column / group.rank];
        for ((y, total), &a) in y.iter_mut().zip(total).zip(&group.left[c * GROUP..]) {
            *y += f16::from_bits(a).to_f32() * total;
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{GROUP, GroupLevel, Sums, TileBlock};

    /// Columns of a level; [`super::accumulate`] has checked every extent.
    #[derive(Clone, Copy)]
    pub(super) struct Tile<'a> {
        pub(super) group: GroupLevel<'a>,
        pub(super) tile: &'a [TileBlock],
        /// The tile's first column among those of the level.
        pub(super) first: usize,
    }

    impl Tile<'_> {
        /// The token of the tile's `i`-th column, and where its values of `A` begin.
        #[inline(always)]
        fn place(&self, i: usize) -> (usize, usize) {
            let index = self.first + i;
            (index / self.group.rank, index % self.group.rank * GROUP)
        }
    }

    /// AVX-512 with VNNI: sixteen rows in the lanes of one vector. Adds the first `n` columns of a tile.
    ///
    /// # Safety
    /// The machine has the instruction set; the group has eight words of signs a block; the tokens of the columns
    /// are inside `y`.
    pub(super) unsafe fn tile512(tile: Tile<'_>, n: usize, y: &mut Sums) {
        // SAFETY: passed on from the caller.
        unsafe {
            match n {
                1 => columns512::<1>(tile, y),
                2 => columns512::<2>(tile, y),
                3 => columns512::<3>(tile, y),
                4 => columns512::<4>(tile, y),
                5 => columns512::<5>(tile, y),
                6 => columns512::<6>(tile, y),
                7 => columns512::<7>(tile, y),
                _ => columns512::<8>(tile, y),
            }
        }
    }

    /// # Safety
    /// As [`tile512`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
    unsafe fn columns512<const N: usize>(tile: Tile<'_>, y: &mut Sums) {
        let two = _mm512_set1_epi8(2);
        let mut total = [_mm512_setzero_ps(); N];
        for (block, signs) in tile.tile.iter().zip(tile.group.signs.chunks_exact(8)) {
            let mut dot: [__m512i; N] = std::array::from_fn(|i| _mm512_set1_epi32(block.start[i]));
            for (&signs, quads) in signs.iter().zip(&block.q) {
                let positive = _mm512_maskz_mov_epi8(signs, two);
                for (dot, &quad) in dot.iter_mut().zip(quads) {
                    let quad = _mm512_set1_epi32(i32::from_ne_bytes(quad.map(i8::cast_unsigned)));
                    *dot = _mm512_dpbusd_epi32(*dot, positive, quad);
                }
            }
            for i in 0..N {
                let scale = _mm512_set1_ps(block.scale[i]);
                total[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[i]), scale, total[i]);
            }
        }
        for (i, total) in total.into_iter().enumerate() {
            let (token, at) = tile.place(i);
            // SAFETY: sixteen values of `A` and sixteen sums.
            unsafe {
                let a = _mm512_cvtph_ps(_mm256_loadu_si256(tile.group.left.as_ptr().add(at).cast()));
                let y = y.get_unchecked_mut(token).as_mut_ptr();
                _mm512_storeu_ps(y, _mm512_fmadd_ps(a, total, _mm512_loadu_ps(y)));
            }
        }
    }

    /// AVX2: eight rows in the lanes of a vector, a group in two halves, four columns at a time.
    ///
    /// # Safety
    /// As [`tile512`].
    pub(super) unsafe fn tile256(tile: Tile<'_>, n: usize, y: &mut Sums) {
        for half in 0..2 {
            // SAFETY: passed on from the caller.
            unsafe {
                match n {
                    1 => columns256::<1, 0>(tile, half, y),
                    2 => columns256::<2, 0>(tile, half, y),
                    3 => columns256::<3, 0>(tile, half, y),
                    _ => columns256::<4, 0>(tile, half, y),
                }
                match n {
                    ..=4 => {}
                    5 => columns256::<1, 4>(tile, half, y),
                    6 => columns256::<2, 4>(tile, half, y),
                    7 => columns256::<3, 4>(tile, half, y),
                    _ => columns256::<4, 4>(tile, half, y),
                }
            }
        }
    }

    /// The `N` columns from `FIRST` on. Pair sums stay in i16 for a whole block: 8 · 2 · 2 · 127 = 4,064 < 2¹⁵.
    ///
    /// # Safety
    /// As [`tile512`], with `half` 0 or 1 and `FIRST + N` columns in the tile.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn columns256<const N: usize, const FIRST: usize>(tile: Tile<'_>, half: usize, y: &mut Sums) {
        // Byte `8i + k` of a vector looks at bit `k` of byte `i` of its 32 signs.
        let spread =
            _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
        let bits = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64.cast_signed());
        let (two, ones) = (_mm256_set1_epi8(2), _mm256_set1_epi16(1));
        let mut total = [_mm256_setzero_ps(); N];
        for (block, signs) in tile.tile.iter().zip(tile.group.signs.chunks_exact(8)) {
            let mut pairs = [_mm256_setzero_si256(); N];
            for (&signs, quads) in signs.iter().zip(&block.q) {
                let bytes = _mm256_set1_epi32((signs >> (32 * half)) as i32);
                let bytes = _mm256_and_si256(_mm256_shuffle_epi8(bytes, spread), bits);
                let positive = _mm256_and_si256(_mm256_cmpeq_epi8(bytes, bits), two);
                for (i, pairs) in pairs.iter_mut().enumerate() {
                    let quad = i32::from_ne_bytes(quads[FIRST + i].map(i8::cast_unsigned));
                    let sums = _mm256_maddubs_epi16(positive, _mm256_set1_epi32(quad));
                    *pairs = _mm256_add_epi16(*pairs, sums);
                }
            }
            for i in 0..N {
                let start = _mm256_set1_epi32(block.start[FIRST + i]);
                let dot = _mm256_add_epi32(_mm256_madd_epi16(pairs[i], ones), start);
                let scale = _mm256_set1_ps(block.scale[FIRST + i]);
                total[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scale, total[i]);
            }
        }
        for (i, total) in total.into_iter().enumerate() {
            let (token, at) = tile.place(FIRST + i);
            // SAFETY: eight of sixteen values of `A` and of sixteen sums, from 0 or 8 on.
            unsafe {
                let a = tile.group.left.as_ptr().add(at + 8 * half);
                let a = _mm256_cvtph_ps(_mm_loadu_si128(a.cast()));
                let y = y.get_unchecked_mut(token).as_mut_ptr().add(8 * half);
                _mm256_storeu_ps(y, _mm256_fmadd_ps(a, total, _mm256_loadu_ps(y)));
            }
        }
    }
}
