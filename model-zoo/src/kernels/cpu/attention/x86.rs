//! Scores and weighted sums of sixteen slots straight from a page, with AVX2 and AVX-512.
//!
//! Up to four queries share each conversion from f16. A query's sums have one order whatever the tile:
//! scores add even and odd channels apart and then together, weighted sums add slots in order.

use std::arch::x86_64::*;

use super::SLOTS;

/// Keys `[dim, stride]`, of which sixteen slots are used, and the tile's queries `[n, dim]`.
#[derive(Clone, Copy)]
pub(super) struct Scores<'a> {
    pub(super) q: &'a [f32],
    pub(super) keys: &'a [u16],
    pub(super) stride: usize,
    pub(super) dim: usize,
}

/// Values `[slots, dim]` of the written slots, and the tile's weights `[n, 16]`.
#[derive(Clone, Copy)]
pub(super) struct Sums<'a> {
    pub(super) weights: &'a [f32],
    pub(super) values: &'a [u16],
    pub(super) dim: usize,
}

impl Scores<'_> {
    fn check(&self, n: usize, out: &[f32]) {
        assert!(self.q.len() == n * self.dim && out.len() == n * SLOTS && self.stride >= SLOTS);
        assert!(self.dim == 0 || self.keys.len() >= (self.dim - 1) * self.stride + SLOTS);
    }
}

impl Sums<'_> {
    fn check(&self, n: usize, acc: &[f32]) {
        assert!(self.weights.len() == n * SLOTS && acc.len() == n * self.dim);
        assert!(
            self.dim > 0
                && self.values.len().is_multiple_of(self.dim)
                && self.values.len() <= SLOTS * self.dim
        );
    }
}

/// `out[query] = Σ_c q[query][c] · keys[c]`
///
/// # Safety
/// The machine has AVX-512 F/VL and F16C; `N` is the number of queries.
#[target_feature(enable = "avx512f,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn score512<const N: usize>(s: Scores<'_>, out: &mut [f32]) {
    s.check(N, out);
    let mut even = [_mm512_setzero_ps(); N];
    let mut odd = [_mm512_setzero_ps(); N];
    for c in (0..s.dim).step_by(2) {
        // SAFETY: `check` bounds channel c's sixteen keys; c + 1 is looked at only when it is a channel.
        unsafe {
            let keys = _mm512_cvtph_ps(_mm256_loadu_si256(s.keys.as_ptr().add(c * s.stride).cast()));
            for (i, even) in even.iter_mut().enumerate() {
                *even = _mm512_fmadd_ps(_mm512_set1_ps(*s.q.get_unchecked(i * s.dim + c)), keys, *even);
            }
            if c + 1 < s.dim {
                let keys =
                    _mm512_cvtph_ps(_mm256_loadu_si256(s.keys.as_ptr().add((c + 1) * s.stride).cast()));
                for (i, odd) in odd.iter_mut().enumerate() {
                    *odd = _mm512_fmadd_ps(_mm512_set1_ps(*s.q.get_unchecked(i * s.dim + c + 1)), keys, *odd);
                }
            }
        }
    }
    for i in 0..N {
        // SAFETY: sixteen floats a query.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(i * SLOTS), _mm512_add_ps(even[i], odd[i])) };
    }
}

/// `acc[query] += Σ_s weights[query][s] · values[s]`; channels after the last whole vector are left alone.
///
/// # Safety
/// The machine has AVX-512 F/VL and F16C; `N` is the number of queries.
#[target_feature(enable = "avx512f,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn accumulate512<const N: usize>(s: Sums<'_>, acc: &mut [f32]) {
    s.check(N, acc);
    let slots = s.values.len() / s.dim;
    for c in (0..s.dim / 16 * 16).step_by(16) {
        // SAFETY: c + 16 <= dim, and `check` bounds slots and queries.
        unsafe {
            let mut sums: [__m512; N] =
                std::array::from_fn(|i| _mm512_loadu_ps(acc.as_ptr().add(i * s.dim + c)));
            for slot in 0..slots {
                let values = _mm256_loadu_si256(s.values.as_ptr().add(slot * s.dim + c).cast());
                let values = _mm512_cvtph_ps(values);
                for (i, sum) in sums.iter_mut().enumerate() {
                    let weight = _mm512_set1_ps(*s.weights.get_unchecked(i * SLOTS + slot));
                    *sum = _mm512_fmadd_ps(weight, values, *sum);
                }
            }
            for (i, sum) in sums.iter().enumerate() {
                _mm512_storeu_ps(acc.as_mut_ptr().add(i * s.dim + c), *sum);
            }
        }
    }
}

/// [`score512`] in two halves of eight slots.
///
/// # Safety
/// The machine has AVX2, FMA and F16C; `N` is the number of queries.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn score256<const N: usize>(s: Scores<'_>, out: &mut [f32]) {
    s.check(N, out);
    for half in [0, 8] {
        let mut sums = [[_mm256_setzero_ps(); 2]; N];
        for c in 0..s.dim {
            // SAFETY: `check` bounds channel c's sixteen keys.
            unsafe {
                let keys = _mm_loadu_si128(s.keys.as_ptr().add(c * s.stride + half).cast());
                let keys = _mm256_cvtph_ps(keys);
                for (i, sums) in sums.iter_mut().enumerate() {
                    let q = _mm256_set1_ps(*s.q.get_unchecked(i * s.dim + c));
                    sums[c % 2] = _mm256_fmadd_ps(q, keys, sums[c % 2]);
                }
            }
        }
        for (i, [even, odd]) in sums.into_iter().enumerate() {
            // SAFETY: eight of sixteen floats a query.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(i * SLOTS + half), _mm256_add_ps(even, odd)) };
        }
    }
}

/// [`accumulate512`] with eight channels a vector.
///
/// # Safety
/// The machine has AVX2, FMA and F16C; `N` is the number of queries.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn accumulate256<const N: usize>(s: Sums<'_>, acc: &mut [f32]) {
    s.check(N, acc);
    let slots = s.values.len() / s.dim;
    for c in (0..s.dim / 8 * 8).step_by(8) {
        // SAFETY: c + 8 <= dim, and `check` bounds slots and queries.
        unsafe {
            let mut sums: [__m256; N] =
                std::array::from_fn(|i| _mm256_loadu_ps(acc.as_ptr().add(i * s.dim + c)));
            for slot in 0..slots {
                let values = _mm_loadu_si128(s.values.as_ptr().add(slot * s.dim + c).cast());
                let values = _mm256_cvtph_ps(values);
                for (i, sum) in sums.iter_mut().enumerate() {
                    let weight = _mm256_set1_ps(*s.weights.get_unchecked(i * SLOTS + slot));
                    *sum = _mm256_fmadd_ps(weight, values, *sum);
                }
            }
            for (i, sum) in sums.iter().enumerate() {
                _mm256_storeu_ps(acc.as_mut_ptr().add(i * s.dim + c), *sum);
            }
        }
    }
}
