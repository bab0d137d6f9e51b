//! Scores and weighted sums of sixteen slots for any number of queries, on the best instructions there are.

use half::f16;

use super::SLOTS;
#[cfg(target_arch = "x86_64")]
use super::x86::{self, Scores, Sums};
use crate::kernels::cpu::isa::Isa;

/// Queries that share a conversion from f16.
const TILE: usize = 4;

/// Sixteen slots of a page, as f16 bits.
#[derive(Clone, Copy)]
pub(super) struct Slots<'a> {
    /// `[dim, stride]`, beginning at the first of the sixteen slots.
    pub(super) keys: &'a [u16],
    /// Slots from one channel's keys to the next's.
    pub(super) stride: usize,
    /// `[written slots, dim]`
    pub(super) values: &'a [u16],
    /// Channels of a head.
    pub(super) dim: usize,
}

/// `scores[query] = Σ_c q[query][c] · keys[c]`, `[queries, 16]`. Scores of slots that are not written mean
/// nothing.
pub(super) fn score(isa: Isa, q: &[f32], slots: Slots<'_>, scores: &mut [f32]) {
    let Slots { keys, stride, dim, .. } = slots;
    for (q, out) in q.chunks(TILE * dim).zip(scores.chunks_mut(TILE * SLOTS)) {
        // SAFETY: an `Isa` other than `Portable` comes from run-time detection; extents are checked inside.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            let s = Scores { q, keys, stride, dim };
            match (isa, q.len() / dim) {
                (Isa::Avx512Vnni, 1) => x86::score512::<1>(s, out),
                (Isa::Avx512Vnni, 2) => x86::score512::<2>(s, out),
                (Isa::Avx512Vnni, 3) => x86::score512::<3>(s, out),
                (Isa::Avx512Vnni, _) => x86::score512::<4>(s, out),
                (Isa::Avx2, 1) => x86::score256::<1>(s, out),
                (Isa::Avx2, 2) => x86::score256::<2>(s, out),
                (Isa::Avx2, 3) => x86::score256::<3>(s, out),
                (Isa::Avx2, _) => x86::score256::<4>(s, out),
                (Isa::Portable, _) => score_plain(q, slots, out),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        score_plain(q, slots, out);
    }
}

/// `acc[query] += Σ_s weights[query][s] · values[s]` over the written slots, in order.
pub(super) fn accumulate(isa: Isa, weights: &[f32], slots: Slots<'_>, acc: &mut [f32]) {
    let Slots { values, dim, .. } = slots;
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    for (weights, acc) in weights.chunks(TILE * SLOTS).zip(acc.chunks_mut(TILE * dim)) {
        let s = Sums { weights, values, dim };
        // SAFETY: as in `score`.
        unsafe {
            match (isa, weights.len() / SLOTS) {
                (Isa::Avx512Vnni, 1) => x86::accumulate512::<1>(s, acc),
                (Isa::Avx512Vnni, 2) => x86::accumulate512::<2>(s, acc),
                (Isa::Avx512Vnni, 3) => x86::accumulate512::<3>(s, acc),
                (Isa::Avx512Vnni, _) => x86::accumulate512::<4>(s, acc),
                (Isa::Avx2, 1) => x86::accumulate256::<1>(s, acc),
                (Isa::Avx2, 2) => x86::accumulate256::<2>(s, acc),
                (Isa::Avx2, 3) => x86::accumulate256::<3>(s, acc),
                (Isa::Avx2, _) => x86::accumulate256::<4>(s, acc),
                (Isa::Portable, _) => {}
            }
        }
        done = match isa {
            Isa::Avx512Vnni => dim / 16 * 16,
            Isa::Avx2 => dim / 8 * 8,
            Isa::Portable => 0,
        };
    }
    if done < dim {
        accumulate_plain(weights, slots, (done, acc));
    }
}

fn widen(bits: u16) -> f32 {
    f16::from_bits(bits).to_f32()
}

/// The plain twin: even and odd channels apart, then together.
fn score_plain(q: &[f32], slots: Slots<'_>, out: &mut [f32]) {
    for (q, out) in q.chunks_exact(slots.dim).zip(out.chunks_exact_mut(SLOTS)) {
        for (slot, out) in out.iter_mut().enumerate() {
            let mut sums = [0f32; 2];
            for (c, q) in q.iter().enumerate() {
                sums[c % 2] += q * widen(slots.keys[c * slots.stride + slot]);
            }
            *out = sums[0] + sums[1];
        }
    }
}

/// The plain twin, for channels from `first`.
fn accumulate_plain(weights: &[f32], slots: Slots<'_>, (first, acc): (usize, &mut [f32])) {
    for (weights, acc) in weights.chunks_exact(SLOTS).zip(acc.chunks_exact_mut(slots.dim)) {
        for (weight, values) in weights.iter().zip(slots.values.chunks_exact(slots.dim)) {
            for (acc, &value) in acc[first..].iter_mut().zip(&values[first..]) {
                *acc += weight * widen(value);
            }
        }
    }
}
