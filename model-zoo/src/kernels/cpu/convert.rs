//! Between f32 and the 16-bit floats.

use half::{bf16, f16};

use super::isa::Isa;
use super::vector::multiversion;

/// f16 bits as f32; `to` is as long as `from`.
pub fn widen_f16(isa: Isa, from: &[u16], to: &mut [f32]) {
    assert_eq!(from.len(), to.len(), "invariant: one value for one");
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if isa != Isa::Portable {
        // SAFETY: the instruction set was detected, and the lengths are equal.
        done = unsafe { x86::widen_f16(from, to) };
    }
    let _ = isa;
    for (to, &from) in to[done..].iter_mut().zip(&from[done..]) {
        *to = f16::from_bits(from).to_f32_const();
    }
}

/// f32 as f16 bits, rounded to nearest even; `to` is as long as `from`.
pub fn narrow_f16(isa: Isa, from: &[f32], to: &mut [u16]) {
    assert_eq!(from.len(), to.len(), "invariant: one value for one");
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if isa != Isa::Portable {
        // SAFETY: the instruction set was detected, and the lengths are equal.
        done = unsafe { x86::narrow_f16(from, to) };
    }
    let _ = isa;
    for (to, &from) in to[done..].iter_mut().zip(&from[done..]) {
        *to = f16::from_f32_const(from).to_bits();
    }
}

multiversion! {
    /// bfloat16 bits as f32.
    pub fn widen_bf16(from: &[u16], to: &mut [f32]) {
        for (to, &from) in to.iter_mut().zip(from) {
            *to = bf16::from_bits(from).to_f32_const();
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// Converts whole vectors of eight and returns how many values that were.
    ///
    /// # Safety
    /// The machine has AVX2 and F16C; `to` is as long as `from`.
    #[target_feature(enable = "avx2,f16c")]
    pub(super) unsafe fn widen_f16(from: &[u16], to: &mut [f32]) -> usize {
        let whole = from.len() / 8 * 8;
        for i in (0..whole).step_by(8) {
            // SAFETY: i + 8 <= both lengths.
            unsafe {
                let values = _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().add(i).cast()));
                _mm256_storeu_ps(to.as_mut_ptr().add(i), values);
            }
        }
        whole
    }

    /// As [`widen_f16`], the other way.
    ///
    /// # Safety
    /// As [`widen_f16`].
    #[target_feature(enable = "avx2,f16c")]
    pub(super) unsafe fn narrow_f16(from: &[f32], to: &mut [u16]) -> usize {
        let whole = from.len() / 8 * 8;
        for i in (0..whole).step_by(8) {
            // SAFETY: i + 8 <= both lengths.
            unsafe {
                let values =
                    _mm256_cvtps_ph(_mm256_loadu_ps(from.as_ptr().add(i)), _MM_FROUND_TO_NEAREST_INT);
                _mm_storeu_si128(to.as_mut_ptr().add(i).cast(), values);
            }
        }
        whole
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_survives_and_rounding_is_to_nearest_even() {
        let bits: Vec<u16> = (0..=u16::MAX).filter(|&b| !f16::from_bits(b).is_nan()).collect();
        for isa in Isa::available() {
            let mut wide = vec![0f32; bits.len()];
            widen_f16(isa, &bits, &mut wide);
            assert!(wide.iter().zip(&bits).all(|(w, &b)| *w == f16::from_bits(b).to_f32()));
            let mut back = vec![0u16; bits.len()];
            narrow_f16(isa, &wide, &mut back);
            assert_eq!(back, bits);
            let between: Vec<f32> = wide.windows(2).map(|w| w[0] * 0.37 + w[1] * 0.63).collect();
            let mut narrow = vec![0u16; between.len()];
            narrow_f16(isa, &between, &mut narrow);
            assert!(
                narrow.iter().zip(&between).all(|(n, &b)| *n == f16::from_f32(b).to_bits() || b.is_nan())
            );
        }
    }
}
