//! Sixteen rows of `W`, made block by block of 32 columns, level by level, and quantized to int8.

use half::f16;

use super::{Level, LevelShape, MAX_RANK};
use crate::kernels::cpu::convert::widen_f16;
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::packed::GROUP;
use crate::kernels::cpu::quantize::BLOCK;
use crate::kernels::cpu::vector::multiversion;

/// A block of a group: `[column][row]`.
pub(super) type Block = [[f32; GROUP]; BLOCK];

/// The factors of a group in f32, kept from group to group.
pub(super) struct Factors {
    /// `A` of every level in turn, `[levels, rank]`
    left: Vec<[f32; GROUP]>,
    /// A block of `B`, `[rank]`
    right: [[f32; BLOCK]; MAX_RANK],
}

impl Factors {
    pub(super) fn new() -> Self {
        Self { left: Vec::new(), right: [[0.0; BLOCK]; MAX_RANK] }
    }

    /// Widens `A` of `levels` for a group.
    pub(super) fn load(&mut self, isa: Isa, levels: &[Level], group: usize) {
        self.left.clear();
        for level in levels {
            for a in level.group(group).left.chunks_exact(GROUP) {
                let mut wide = [0f32; GROUP];
                widen_f16(isa, a, &mut wide);
                self.left.push(wide);
            }
        }
    }

    /// Adds block `b` of level `index` of those that were loaded, `S ⊙ (A·B)`, to `block`.
    pub(super) fn add_level(
        &mut self,
        isa: Isa,
        (level, index): (&Level, usize),
        (group, b): (usize, usize),
        block: &mut Block,
    ) {
        let LevelShape { cols, rank, .. } = level.shape();
        for (wide, b_row) in self.right.iter_mut().zip(level.right().chunks_exact(cols)) {
            widen_f16(isa, &b_row[b * BLOCK..(b + 1) * BLOCK], wide);
        }
        let factors = (&self.left[index * rank..(index + 1) * rank], &self.right[..rank]);
        let signs = &level.group(group).signs[8 * b..8 * b + 8];
        match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the instruction set was detected; a block has eight words of signs, factors one rank.
            Isa::Avx512Vnni => unsafe { x86::add_level(signs, factors, block) },
            _ => add_level_plain(isa, signs, factors, block),
        }
    }
}

multiversion! {
    /// The plain twin.
    fn add_level_plain(signs: &[u64], factors: (&[[f32; GROUP]], &[[f32; BLOCK]]), block: &mut Block) {
        for (j, (&quad, columns)) in signs.iter().zip(block.chunks_exact_mut(4)).enumerate() {
            let mut bits = [0u32; GROUP];
            for (lane, bits) in bits.iter_mut().enumerate() {
                *bits = (quad >> (4 * lane)) as u32;
            }
            for (i, column) in columns.iter_mut().enumerate() {
                let mut sum = [0f32; GROUP];
                for (a, b) in factors.0.iter().zip(factors.1) {
                    for (sum, a) in sum.iter_mut().zip(a) {
                        *sum += a * b[4 * j + i];
                    }
                }
                for ((w, sum), bits) in column.iter_mut().zip(sum).zip(bits) {
                    let minus = (!bits >> i & 1) << 31;
                    *w += f32::from_bits(sum.to_bits() ^ minus);
                }
            }
        }
    }
}

/// Quantizes `block` to the values, `[512]`, and scales, `[16]`, of a packed block of eight bits. The scale is
/// rounded up to f16, so that no value passes 127.
pub(super) fn quantize(isa: Isa, block: &Block, values: &mut [u8], scales: &mut [u16]) {
    assert!(values.len() == GROUP * BLOCK && scales.len() == GROUP);
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set was detected, and the lengths were checked.
        Isa::Avx512Vnni => unsafe { x86::quantize(block, values, scales) },
        _ => quantize_plain(isa, block, values, scales),
    }
}

multiversion! {
    /// The plain twin.
    fn quantize_plain(block: &Block, values: &mut [u8], scales: &mut [u16]) {
        let mut max = [0f32; GROUP];
        for column in block {
            for (max, w) in max.iter_mut().zip(column) {
                *max = max.max(w.abs());
            }
        }
        let mut inverse = [0f32; GROUP];
        for ((max, inverse), scale) in max.iter().zip(&mut inverse).zip(scales) {
            *scale = scale_above(max / 127.0);
            let held = f16::from_bits(*scale).to_f32_const();
            *inverse = if held > 0.0 { 1.0 / held } else { 0.0 };
        }
        for (columns, values) in block.chunks_exact(4).zip(values.chunks_exact_mut(64)) {
            for (lane, (values, inverse)) in values.chunks_exact_mut(4).zip(inverse).enumerate() {
                for (value, column) in values.iter_mut().zip(columns) {
                    *value = (column[lane] * inverse).round_ties_even() as i8 as u8;
                }
            }
        }
    }
}

/// The least f16 that is not below `scale`, as bits.
fn scale_above(scale: f32) -> u16 {
    let nearest = f16::from_f32_const(scale);
    nearest.to_bits() + u16::from(nearest.to_f32_const() < scale)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{BLOCK, Block, GROUP};

    /// # Safety
    /// The machine has AVX-512 F and BW; `signs` has eight words, `left` and `weights` are equally long.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq")]
    pub(super) unsafe fn add_level(
        signs: &[u64],
        (left, weights): (&[[f32; GROUP]], &[[f32; BLOCK]]),
        block: &mut Block,
    ) {
        let sign_bit = _mm512_set1_epi32(i32::MIN);
        for pair in 0..4 {
            let mut sum = [_mm512_setzero_ps(); 8];
            for (a, b) in left.iter().zip(weights) {
                // SAFETY: sixteen floats of `a`.
                let a = unsafe { _mm512_loadu_ps(a.as_ptr()) };
                for (i, sum) in sum.iter_mut().enumerate() {
                    *sum = _mm512_fmadd_ps(a, _mm512_set1_ps(b[8 * pair + i]), *sum);
                }
            }
            for half in 0..2 {
                // All ones where a sign is minus; column `i` of four in byte `i` of each lane.
                let minus = _mm512_movm_epi8(!signs[2 * pair + half]);
                let shifted = [
                    _mm512_slli_epi32::<24>(minus),
                    _mm512_slli_epi32::<16>(minus),
                    _mm512_slli_epi32::<8>(minus),
                    minus,
                ];
                for (i, minus) in shifted.into_iter().enumerate() {
                    let column = block[8 * pair + 4 * half + i].as_mut_ptr();
                    let sum = _mm512_castps_si512(sum[4 * half + i]);
                    // sum ^ (minus & sign_bit)
                    let signed = _mm512_ternarylogic_epi32::<0x78>(sum, minus, sign_bit);
                    // SAFETY: sixteen floats of a column.
                    unsafe {
                        let w = _mm512_add_ps(_mm512_loadu_ps(column), _mm512_castsi512_ps(signed));
                        _mm512_storeu_ps(column, w);
                    }
                }
            }
        }
    }

    /// # Safety
    /// The machine has AVX-512 F, DQ and F16C; `values` has 512 bytes, `scales` sixteen.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
    pub(super) unsafe fn quantize(block: &Block, values: &mut [u8], scales: &mut [u16]) {
        // SAFETY: sixteen floats a column.
        let column = |i: usize| unsafe { _mm512_loadu_ps(block[i].as_ptr()) };
        let mut max = [_mm512_setzero_ps(); 2];
        for i in (0..BLOCK).step_by(2) {
            max[0] = _mm512_max_ps(max[0], _mm512_abs_ps(column(i)));
            max[1] = _mm512_max_ps(max[1], _mm512_abs_ps(column(i + 1)));
        }
        let exact = _mm512_div_ps(_mm512_max_ps(max[0], max[1]), _mm512_set1_ps(127.0));
        let held = _mm512_cvtps_ph::<{ _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC }>(exact);
        let scale = _mm512_cvtph_ps(held);
        let is_positive = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(scale, _mm512_setzero_ps());
        let inverse = _mm512_maskz_div_ps(is_positive, _mm512_set1_ps(1.0), scale);
        let low = _mm512_set1_epi32(0xFF);
        for j in 0..8 {
            let q = |i: usize| _mm512_cvtps_epi32(_mm512_mul_ps(column(4 * j + i), inverse));
            let byte = |i: usize| _mm512_and_si512(q(i), low);
            let first = _mm512_or_si512(byte(0), _mm512_slli_epi32::<8>(byte(1)));
            let second = _mm512_or_si512(_mm512_slli_epi32::<16>(byte(2)), _mm512_slli_epi32::<24>(q(3)));
            // SAFETY: the 64 bytes of four columns.
            unsafe {
                let to = values.as_mut_ptr().add(64 * j);
                _mm512_storeu_si512(to.cast(), _mm512_or_si512(first, second));
            }
        }
        // SAFETY: sixteen scales.
        unsafe { _mm256_storeu_si256(scales.as_mut_ptr().cast(), held) };
    }
}
