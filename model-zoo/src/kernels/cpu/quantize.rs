//! int8 quantization of activations, per block of 32 channels: the left side of integer dot products.

use super::pool::{Disjoint, Pool};

/// Channels in a quantization block.
pub const BLOCK: usize = 32;
/// Channels whose integer sum is kept apart: the finest granularity of weight scales (Q6_K's).
pub const SUB_BLOCK: usize = 16;

/// Rows of activations quantized symmetrically to int8: `x ≈ scale · q`.
#[derive(Debug, Default, Clone)]
pub struct QuantizedRows {
    channels: usize,
    rows: usize,
    /// `[rows, channels]`
    pub(super) q: Vec<i8>,
    /// `[rows, channels / 32]`
    pub(super) scale: Vec<f32>,
    /// Σq over 16 channels, `[rows, channels / 16]`
    pub(super) sum: Vec<i32>,
    /// scale · Σq over 32 channels, `[rows, channels / 32]`: what a weight block's minimum is multiplied by
    pub(super) scaled_sum: Vec<f32>,
}

impl QuantizedRows {
    /// Rows held.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Channels of a row.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Makes room for `rows` of `channels`, a multiple of 32, keeping memory from call to call.
    fn resize(&mut self, rows: usize, channels: usize) {
        assert!(channels.is_multiple_of(BLOCK), "invariant: packed weights have whole blocks");
        self.rows = rows;
        self.channels = channels;
        self.q.resize(rows * channels, 0);
        self.scale.resize(rows * channels / BLOCK, 0.0);
        self.sum.resize(rows * channels / SUB_BLOCK, 0);
        self.scaled_sum.resize(rows * channels / BLOCK, 0.0);
    }

    /// Quantizes `x`, `[rows, channels]`.
    pub fn quantize(&mut self, pool: &Pool, x: &[f32], channels: usize) {
        let rows = x.len() / channels;
        self.resize(rows, channels);
        let (blocks, subs) = (channels / BLOCK, channels / SUB_BLOCK);
        let (q, scale) = (Disjoint::new(&mut self.q), Disjoint::new(&mut self.scale));
        let (sum, scaled_sum) = (Disjoint::new(&mut self.sum), Disjoint::new(&mut self.scaled_sum));
        let rows_per_chunk = rows.div_ceil(4 * pool.threads()).max(1);
        // A few rows cost less than waking a second thread.
        let chunks = if rows * channels < 8192 { 1 } else { rows.div_ceil(rows_per_chunk) };
        let per_chunk = rows.div_ceil(chunks.max(1));
        pool.run(chunks, |chunk| {
            for row in chunk * per_chunk..((chunk + 1) * per_chunk).min(rows) {
                // SAFETY: a row belongs to one chunk, and the parts of different rows do not overlap.
                let out = unsafe {
                    RowParts {
                        q: q.part(row * channels, channels),
                        scale: scale.part(row * blocks, blocks),
                        sum: sum.part(row * subs, subs),
                        scaled_sum: scaled_sum.part(row * blocks, blocks),
                    }
                };
                quantize_row(&x[row * channels..(row + 1) * channels], out);
            }
        });
    }
}

/// Where a row's quantized form goes.
struct RowParts<'a> {
    q: &'a mut [i8],
    scale: &'a mut [f32],
    sum: &'a mut [i32],
    scaled_sum: &'a mut [f32],
}

/// One row. `q = round(x / scale)` with `scale = max|x| / 127`; a block of zeros has scale 0.
fn quantize_row(x: &[f32], out: RowParts<'_>) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the features are there; the function is safe code compiled with them.
        unsafe { quantize_row_avx2(x, out) };
        return;
    }
    quantize_row_plain(x, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn quantize_row_avx2(x: &[f32], out: RowParts<'_>) {
    quantize_row_plain(x, out);
}

/// Written so that the compiler vectorises it: no branches, fixed trip counts.
#[inline(always)]
fn quantize_row_plain(x: &[f32], out: RowParts<'_>) {
    for (block, (x, q)) in x.chunks_exact(BLOCK).zip(out.q.chunks_exact_mut(BLOCK)).enumerate() {
        let mut lanes = [0f32; 8];
        for part in x.chunks_exact(8) {
            for (lane, v) in lanes.iter_mut().zip(part) {
                *lane = lane.max(v.abs());
            }
        }
        let max = lanes.iter().fold(0f32, |a, &b| a.max(b));
        let inverse = if max > 0.0 { 127.0 / max } else { 0.0 };
        let scale = max / 127.0;
        let mut sums = [0i32; 2];
        for ((x, q), sum) in x.chunks_exact(SUB_BLOCK).zip(q.chunks_exact_mut(SUB_BLOCK)).zip(&mut sums) {
            for (v, q) in x.iter().zip(q) {
                // Adding 1.5·2²³ rounds to nearest even into the mantissa's low bits.
                let rounded = (v * inverse + 12_582_912.0).to_bits() as i32 - 0x4B40_0000;
                *q = rounded as i8;
                *sum += rounded;
            }
        }
        out.scale[block] = scale;
        out.sum[2 * block..2 * block + 2].copy_from_slice(&sums);
        out.scaled_sum[block] = scale * (sums[0] + sums[1]) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};

    #[test]
    fn error_is_half_a_step_and_sums_agree() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let (rows, channels) = (37, 608);
        let mut x: Vec<f32> =
            (0..rows * channels).map(|_| rng.random_range(-3.0f32..3.0) * rng.random::<f32>()).collect();
        x[..32].fill(0.0);
        let mut out = QuantizedRows::default();
        out.quantize(&Pool::new(2), &x, channels);
        for (i, v) in x.iter().enumerate() {
            let step = out.scale[i / BLOCK];
            assert!((v - step * f32::from(out.q[i])).abs() <= 0.5001 * step + 1e-12);
        }
        for (s, q) in out.sum.iter().zip(out.q.chunks_exact(SUB_BLOCK)) {
            assert_eq!(*s, q.iter().map(|&q| i32::from(q)).sum::<i32>());
        }
    }
}
