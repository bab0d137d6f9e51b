//! The plain twin of the packed products: what the vector kernels are tested against, and what machines
//! without them run.

use std::ops::Range;

use half::f16;

use super::{GROUP, GroupView, Packing};
use crate::kernels::cpu::quantize::{BLOCK, QuantizedRows};

fn scale(w: &GroupView<'_>, at: usize) -> f32 {
    f16::from_bits(w.scales[at]).to_f32()
}

/// The value of `lane` at `column` of block `b`.
fn value(w: &GroupView<'_>, b: usize, lane: usize, column: usize) -> i32 {
    let block = &w.values[b * w.packing.block_bytes()..];
    let (vector, byte) = (column / 4, column % 4);
    if w.packing == Packing::Affine4 {
        let pair = block[(vector % 4) * 64 + lane * 4 + byte];
        i32::from(if vector < 4 { pair & 15 } else { pair >> 4 })
    } else {
        i32::from(block[vector * 64 + lane * 4 + byte] as i8)
    }
}

pub(super) fn dequantize_lane(w: GroupView<'_>, lane: usize, out: &mut [f32]) {
    let n = w.packing.scales_per_block();
    for (b, out) in out.chunks_exact_mut(BLOCK).enumerate() {
        let min = w.mins.get(b * GROUP + lane).map_or(0.0, |&m| f16::from_bits(m).to_f32());
        for (column, out) in out.iter_mut().enumerate() {
            let part = column * n / BLOCK;
            *out = scale(&w, (b * n + part) * GROUP + lane) * value(&w, b, lane, column) as f32 + min;
        }
    }
}

pub(super) fn product(
    w: GroupView<'_>,
    (x, tokens): (&QuantizedRows, Range<usize>),
    mut sink: impl FnMut(usize, &[f32; GROUP]),
) {
    let n = w.packing.scales_per_block();
    let width = BLOCK / n;
    for token in tokens {
        let q = &x.q[token * x.channels()..];
        let mut sums = [0f32; GROUP];
        for b in 0..w.blocks {
            let at = token * w.blocks + b;
            for (lane, sum) in sums.iter_mut().enumerate() {
                for part in 0..n {
                    let columns = part * width..(part + 1) * width;
                    let dot: i32 = columns.map(|c| value(&w, b, lane, c) * i32::from(q[b * BLOCK + c])).sum();
                    *sum += dot as f32 * (scale(&w, (b * n + part) * GROUP + lane) * x.scale[at]);
                }
                if let Some(&min) = w.mins.get(b * GROUP + lane) {
                    *sum += f16::from_bits(min).to_f32() * x.scaled_sum[at];
                }
            }
        }
        sink(token, &sums);
    }
}
