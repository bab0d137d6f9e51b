//! Products of f32 matrices with many rows, for encoders, whose tokens come all at once.
//!
//! The decoder's own kernels give a row the same bits whatever else is in its step. Here nothing is batched
//! with anything, and the `gemm` crate's kernels, which candle uses too, are several times as fast.

use super::pool::{Disjoint, Pool};

/// Rows of the left side that a thread takes at least.
const ROWS: usize = 16;

/// A matrix inside a slice.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// Where its values are, the first one at 0.
    pub values: &'a [f32],
    /// From a row to the next, in values.
    pub row_stride: usize,
    /// From a column to the next, in values.
    pub col_stride: usize,
}

impl<'a> View<'a> {
    /// Row-major, `[.., width]`.
    pub fn rows(values: &'a [f32], width: usize) -> Self {
        Self { values, row_stride: width, col_stride: 1 }
    }

    /// The same matrix with rows and columns exchanged.
    pub fn transposed(self) -> Self {
        Self { row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    fn holds(&self, [rows, cols]: [usize; 2]) -> bool {
        rows == 0
            || cols == 0
            || (rows - 1) * self.row_stride + (cols - 1) * self.col_stride < self.values.len()
    }
}

/// Where a product goes: rows of `stride` values, of which the first `n` are written.
#[derive(Debug)]
pub struct Target<'a> {
    /// The values, the first one at 0.
    pub values: &'a mut [f32],
    /// From a row to the next, in values.
    pub stride: usize,
    /// Add to what is there instead of replacing it.
    pub add: bool,
}

/// `out = a·b` or `out += a·b`, with `a` `[m, k]` and `b` `[k, n]`, the rows shared among the pool's threads.
///
/// # Panics
/// When a matrix does not lie within its slice.
pub fn matmul(pool: &Pool, [m, k, n]: [usize; 3], (a, b): (View<'_>, View<'_>), out: Target<'_>) {
    assert!(a.holds([m, k]) && b.holds([k, n]), "invariant: the factors lie in their slices");
    assert!(
        m == 0 || (m - 1) * out.stride + n <= out.values.len() && n <= out.stride,
        "invariant: the product fits"
    );
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    let per_chunk = m.div_ceil(pool.threads()).max(ROWS);
    let (stride, add) = (out.stride, out.add);
    let values = Disjoint::new(out.values);
    pool.run(m.div_ceil(per_chunk), |chunk| {
        let first = chunk * per_chunk;
        let rows = per_chunk.min(m - first);
        // SAFETY: chunks have different rows, and a row's `stride` values are its own.
        let out = unsafe { values.part(first * stride, (rows - 1) * stride + n) };
        // SAFETY: the assertions above say that every element of `a`, `b` and `out` lies in its slice; `out`
        // is exclusive, and initialised, as every slice is.
        unsafe {
            gemm::gemm(
                rows,
                n,
                k,
                out.as_mut_ptr(),
                1,
                stride as isize,
                add,
                a.values.as_ptr().add(first * a.row_stride),
                a.col_stride as isize,
                a.row_stride as isize,
                b.values.as_ptr(),
                b.col_stride as isize,
                b.row_stride as isize,
                1.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    });
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};

    use super::*;

    #[test]
    fn products_equal_the_formula_whatever_the_layout() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
        for [m, k, n] in [[1, 1, 1], [5, 7, 3], [37, 64, 33], [100, 20, 1]] {
            let mut values = |len: usize| (0..len).map(|_| rng.random_range(-1.0..1.0)).collect::<Vec<f32>>();
            let (a, b, before) = (values(m * (k + 2)), values(n * k), values(m * (n + 3)));
            for add in [false, true] {
                let mut out = before.clone();
                let factors = (View::rows(&a, k + 2), View::rows(&b, k).transposed());
                matmul(&Pool::new(3), [m, k, n], factors, Target { values: &mut out, stride: n + 3, add });
                for (i, &found) in out.iter().enumerate() {
                    let (row, col) = (i / (n + 3), i % (n + 3));
                    if col >= n {
                        assert_eq!(found, before[i], "beyond the product nothing is written");
                        continue;
                    }
                    let sum: f64 =
                        (0..k).map(|c| f64::from(a[row * (k + 2) + c]) * f64::from(b[col * k + c])).sum();
                    let truth = sum + if add { f64::from(before[i]) } else { 0.0 };
                    assert!((f64::from(found) - truth).abs() < 1e-5, "{found} {truth}");
                }
            }
        }
    }
}
