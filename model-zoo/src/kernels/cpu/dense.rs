//! Unquantized weight matrices (F32, F16, BF16) times f32 activations.

use super::convert::{widen_bf16, widen_f16};
use super::isa::Isa;
use super::packed::Write;
use super::pool::{Disjoint, Pool};
use super::vector::multiversion;

/// Columns that are multiplied at once: the lanes of the accumulators.
const LANES: usize = 16;
/// Tokens that share a converted weight row.
const TILE: usize = 4;

/// A row-major matrix `[rows, cols]` in the precision of its file.
#[derive(Debug)]
pub struct DenseMatrix {
    rows: usize,
    cols: usize,
    values: Values,
}

/// Weights as stored.
#[derive(Debug)]
pub enum Values {
    /// f32
    F32(Vec<f32>),
    /// IEEE half precision, raw bits
    F16(Vec<u16>),
    /// bfloat16, raw bits
    Bf16(Vec<u16>),
}

impl DenseMatrix {
    /// A matrix over `values`, `rows · cols` of them.
    pub fn new([rows, cols]: [usize; 2], values: Values) -> Self {
        let len = match &values {
            Values::F32(v) => v.len(),
            Values::F16(v) | Values::Bf16(v) => v.len(),
        };
        assert_eq!(len, rows * cols, "invariant: the loader checked the tensor's length");
        Self { rows, cols, values }
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
        match &self.values {
            Values::F32(v) => 4 * v.len(),
            Values::F16(v) | Values::Bf16(v) => 2 * v.len(),
        }
    }

    /// Writes `row` as f32 to `out`, `[cols]`.
    pub fn dequantize_row(&self, isa: Isa, row: usize, out: &mut [f32]) {
        let range = row * self.cols..(row + 1) * self.cols;
        match &self.values {
            Values::F32(v) => out.copy_from_slice(&v[range]),
            Values::F16(v) => widen_f16(isa, &v[range], out),
            Values::Bf16(v) => widen_bf16(isa, &v[range], out),
        }
    }

    /// `out = x·Wᵀ` or `out += x·Wᵀ`: `x` is `[n, cols]`, `out` is `[n, rows]`.
    pub fn matmul(&self, pool: &Pool, isa: Isa, x: &[f32], (write, out): (Write, &mut [f32])) {
        let (rows, cols) = (self.rows, self.cols);
        let tokens = x.len() / cols;
        assert_eq!(out.len(), tokens * rows, "invariant: the output fits the product");
        let out = Disjoint::new(out);
        let per_chunk = rows.div_ceil(8 * pool.threads()).max(1);
        pool.run(rows.div_ceil(per_chunk), |chunk| {
            let mut w = vec![0f32; cols];
            for row in chunk * per_chunk..((chunk + 1) * per_chunk).min(rows) {
                self.dequantize_row(isa, row, &mut w);
                for first in (0..tokens).step_by(TILE) {
                    let count = TILE.min(tokens - first);
                    let mut sums = [0f32; TILE];
                    dot_tile(isa, &w, &x[first * cols..(first + count) * cols], &mut sums);
                    for (i, sum) in sums[..count].iter().enumerate() {
                        // SAFETY: a (token, row) pair is computed by one chunk.
                        let out = unsafe { out.part((first + i) * rows + row, 1) };
                        match write {
                            Write::Store => out[0] = *sum,
                            Write::Add => out[0] += sum,
                        }
                    }
                }
            }
        });
    }
}

multiversion! {
    /// Dot products of `w` with up to four rows of `x`, each in its own lanes.
    fn dot_tile(w: &[f32], x: &[f32], sums: &mut [f32; TILE]) {
        for (x, sum) in x.chunks_exact(w.len()).zip(sums) {
            let mut lanes = [0f32; LANES];
            let (wide, rest) = (w.chunks_exact(LANES), w.chunks_exact(LANES).remainder());
            let tail = w.len() - rest.len();
            for (w, x) in wide.zip(x.chunks_exact(LANES)) {
                for ((lane, w), x) in lanes.iter_mut().zip(w).zip(x) {
                    *lane += w * x;
                }
            }
            for ((lane, w), x) in lanes.iter_mut().zip(rest).zip(&x[tail..]) {
                *lane += w * x;
            }
            *sum = lanes.iter().sum();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};
    use rand::{Rng, SeedableRng};

    #[test]
    fn products_equal_the_formula_in_every_precision() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(9);
        let (rows, cols, tokens) = (37, 83, 6);
        let w: Vec<f32> = (0..rows * cols).map(|_| rng.random_range(-1.0..1.0)).collect();
        let x: Vec<f32> = (0..tokens * cols).map(|_| rng.random_range(-1.0..1.0)).collect();
        let f16s: Vec<u16> = w.iter().map(|&v| f16::from_f32(v).to_bits()).collect();
        let bf16s: Vec<u16> = w.iter().map(|&v| bf16::from_f32(v).to_bits()).collect();
        for values in [Values::F32(w.clone()), Values::F16(f16s), Values::Bf16(bf16s)] {
            let matrix = DenseMatrix::new([rows, cols], values);
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; tokens * rows];
                matrix.matmul(&Pool::new(2), isa, &x, (Write::Store, &mut out));
                let mut row_values = vec![0f32; cols];
                for row in 0..rows {
                    matrix.dequantize_row(isa, row, &mut row_values);
                    for token in 0..tokens {
                        let truth: f64 = (0..cols)
                            .map(|c| f64::from(row_values[c]) * f64::from(x[token * cols + c]))
                            .sum();
                        assert!((f64::from(out[token * rows + row]) - truth).abs() < 1e-5);
                    }
                }
            }
        }
    }
}
