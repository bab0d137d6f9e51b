//! The linear algebra of a decomposition: truncated singular values, triangular factors, small systems.
//!
//! Everything is deterministic: random starts are seeded, and no sum depends on the number of threads.

use crate::kernels::cpu::gemm::{Target, View, matmul};
use crate::kernels::cpu::pool::Pool;

/// Vectors iterated beyond those that are wanted.
const OVERSAMPLING: usize = 8;
/// Power iterations. The spectrum of magnitudes is one large value above a flat rest, of which any part serves as
/// well as the next.
const ITERATIONS: usize = 4;

/// The leading singular triplets of a matrix `[rows, cols]`: `values ≈ Σ left[c] · right[c]ᵀ`, each side scaled by
/// the root of its singular value.
#[derive(Debug)]
pub struct Truncated {
    /// `[rank, rows]`
    pub left: Vec<f32>,
    /// `[rank, cols]`
    pub right: Vec<f32>,
    /// Descending.
    pub singular: Vec<f64>,
}

/// The best approximation of `values` of rank `rank`, by subspace iteration with a Rayleigh-Ritz step (Halko,
/// Martinsson and Tropp 2011, algorithm 4.4). The product of the sides is the projection of `values` on the
/// subspace found, so that its energy is the sum of the squared singular values exactly.
pub fn truncated_svd(values: &[f32], [rows, cols]: [usize; 2], rank: usize) -> Truncated {
    let pool = Pool::new(1);
    let width = (rank + OVERSAMPLING).min(rows).min(cols);
    let rank = rank.min(width);
    let matrix = View::rows(values, cols);
    // [width, cols] to [width, rows] and back.
    let forth = |x: &[f32]| product(&pool, [width, cols, rows], (View::rows(x, cols), matrix.transposed()));
    let back = |y: &[f32]| product(&pool, [width, rows, cols], (View::rows(y, rows), matrix));
    let mut basis = forth(&start(width, cols));
    orthonormalize(&mut basis, rows);
    for _ in 0..ITERATIONS {
        let mut other = back(&basis);
        orthonormalize(&mut other, cols);
        basis = forth(&other);
        orthonormalize(&mut basis, rows);
    }
    let projected = back(&basis);
    let gram = gram(&projected, width);
    let (energies, vectors) = symmetric_eigen(gram, width);
    let mut found =
        Truncated { left: vec![0.0; rank * rows], right: vec![0.0; rank * cols], singular: Vec::new() };
    for (c, vector) in vectors.chunks_exact(width).take(rank).enumerate() {
        let singular = energies[c].max(0.0).sqrt();
        let root = singular.sqrt();
        let inverse = if root > 0.0 { root.recip() } else { 0.0 };
        combine(vector, (&basis, root), &mut found.left[c * rows..(c + 1) * rows]);
        combine(vector, (&projected, inverse), &mut found.right[c * cols..(c + 1) * cols]);
        found.singular.push(singular);
    }
    found
}

fn product(pool: &Pool, [m, k, n]: [usize; 3], factors: (View<'_>, View<'_>)) -> Vec<f32> {
    let mut out = vec![0.0; m * n];
    matmul(pool, [m, k, n], factors, Target { values: &mut out, stride: n, add: false });
    out
}

/// A constant vector, which is near the leading one of magnitudes, and seeded noise.
fn start(width: usize, len: usize) -> Vec<f32> {
    let mut state = 0x2410_2391_8000_0001u64;
    let noise = (0..width * len).map(|i| {
        if i < len {
            return 1.0;
        }
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    });
    noise.collect()
}

/// Makes the rows of `vectors`, each of `len` values, orthonormal (Gram-Schmidt, twice). One that depends on those
/// before it becomes zero.
fn orthonormalize(vectors: &mut [f32], len: usize) {
    for index in 0..vectors.len() / len {
        let (before, rest) = vectors.split_at_mut(index * len);
        let vector = &mut rest[..len];
        let original = dot(vector, vector).sqrt();
        for _ in 0..2 {
            for other in before.chunks_exact(len) {
                let along = dot(vector, other) as f32;
                vector.iter_mut().zip(other).for_each(|(v, o)| *v -= along * o);
            }
        }
        let norm = dot(vector, vector).sqrt();
        let inverse = if norm > 1e-6 * original { norm.recip() as f32 } else { 0.0 };
        vector.iter_mut().for_each(|v| *v *= inverse);
    }
}

/// `a·b`, in eight partial sums of f64.
pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut sums = [0f64; 8];
    let (a_chunks, b_chunks) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail = a_chunks.remainder().iter().zip(b_chunks.remainder());
    let tail: f64 = tail.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for (sum, (&a, &b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += f64::from(a) * f64::from(b);
        }
    }
    sums.iter().sum::<f64>() + tail
}

fn gram(vectors: &[f32], count: usize) -> Vec<f64> {
    let len = vectors.len() / count.max(1);
    let row = |i: usize| &vectors[i * len..(i + 1) * len];
    (0..count * count).map(|at| dot(row(at / count), row(at % count))).collect()
}

/// `out = scale · Σ weights[i] · vectors[i]`
fn combine(weights: &[f64], (vectors, scale): (&[f32], f64), out: &mut [f32]) {
    for (&weight, vector) in weights.iter().zip(vectors.chunks_exact(out.len())) {
        let weight = (weight * scale) as f32;
        out.iter_mut().zip(vector).for_each(|(out, v)| *out += weight * v);
    }
}

/// Eigenvalues, descending, and eigenvectors, one a row, of a symmetric matrix (cyclic Jacobi).
fn symmetric_eigen(mut a: Vec<f64>, n: usize) -> (Vec<f64>, Vec<f64>) {
    let mut v: Vec<f64> = (0..n * n).map(|at| f64::from(at / n == at % n)).collect();
    let total: f64 = a.iter().map(|x| x * x).sum();
    for _ in 0..60 {
        let off: f64 = (0..n * n).filter(|at| at / n != at % n).map(|at| a[at] * a[at]).sum();
        if off <= 1e-26 * total {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                rotate(&mut a, &mut v, n, (p, q));
            }
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| a[j * n + j].total_cmp(&a[i * n + i]));
    let values = order.iter().map(|&i| a[i * n + i]).collect();
    (values, order.iter().flat_map(|&i| v[i * n..(i + 1) * n].to_vec()).collect())
}

/// One Jacobi rotation, which makes `a[p][q]` zero.
fn rotate(a: &mut [f64], v: &mut [f64], n: usize, (p, q): (usize, usize)) {
    let apq = a[p * n + q];
    if apq == 0.0 {
        return;
    }
    let theta = (a[q * n + q] - a[p * n + p]) / (2.0 * apq);
    let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
    let t = if theta == 0.0 { 1.0 } else { t };
    let c = (t * t + 1.0).sqrt().recip();
    let s = t * c;
    for k in 0..n {
        let (x, y) = (a[k * n + p], a[k * n + q]);
        (a[k * n + p], a[k * n + q]) = (c * x - s * y, s * x + c * y);
    }
    for k in 0..n {
        let (x, y) = (a[p * n + k], a[q * n + k]);
        (a[p * n + k], a[q * n + k]) = (c * x - s * y, s * x + c * y);
    }
    for k in 0..n {
        let (x, y) = (v[p * n + k], v[q * n + k]);
        (v[p * n + k], v[q * n + k]) = (c * x - s * y, s * x + c * y);
    }
}

/// `H = L·D·Lᵀ` of a symmetric positive definite matrix `[n, n]`: the rows of the unit lower triangular `L` in place
/// of the lower half, `D` on the diagonal; the upper half is left alone. `false` when `H` is not positive definite.
pub fn ldl(h: &mut [f64], n: usize) -> bool {
    // Rows of G = L·√D while it runs: then each element is a difference and a dot product of two rows.
    for i in 0..n {
        let (done, rest) = h.split_at_mut(i * n);
        let row = &mut rest[..n];
        for j in 0..i {
            let other = &done[j * n..j * n + j + 1];
            row[j] = (row[j] - dot64(&row[..j], &other[..j])) / other[j];
        }
        let pivot = row[i] - dot64(&row[..i], &row[..i]);
        if pivot.is_nan() || pivot <= 0.0 {
            return false;
        }
        row[i] = pivot.sqrt();
    }
    let roots: Vec<f64> = (0..n).map(|i| h[i * n + i]).collect();
    for (i, row) in h.chunks_exact_mut(n).enumerate() {
        row[..i].iter_mut().zip(&roots).for_each(|(g, root)| *g /= root);
        row[i] = roots[i] * roots[i];
    }
    true
}

fn dot64(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0f64; 8];
    let (a_chunks, b_chunks) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f64 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
    }
    sums.iter().sum::<f64>() + tail
}

/// Solves `(M + εI)·x = y` for a small symmetric positive semidefinite `m` `[n, n]`, by elimination; `ε` is a
/// millionth of the mean of the diagonal. What cannot be determined becomes zero.
pub fn solve(m: &mut [f64], y: &mut [f64]) {
    let n = y.len();
    let ridge = 1e-6 * (0..n).map(|i| m[i * n + i]).sum::<f64>() / n.max(1) as f64;
    (0..n).for_each(|i| m[i * n + i] += ridge);
    for i in 0..n {
        let pivot = m[i * n + i];
        let inverse = if pivot > 0.0 { pivot.recip() } else { 0.0 };
        for row in i + 1..n {
            let factor = m[row * n + i] * inverse;
            for col in i..n {
                m[row * n + col] -= factor * m[i * n + col];
            }
            y[row] -= factor * y[i];
        }
    }
    for i in (0..n).rev() {
        let known: f64 = (i + 1..n).map(|col| m[i * n + col] * y[col]).sum();
        let pivot = m[i * n + i];
        y[i] = if pivot > 0.0 { (y[i] - known) / pivot } else { 0.0 };
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn noise(seed: u64, len: usize) -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    #[test]
    fn singular_values_are_those_that_the_matrix_was_made_of() {
        let (rows, cols) = (60, 44);
        let truth: Vec<f64> = (0..44).map(|i| 100.0 * 0.7f64.powi(i)).collect();
        let (mut left, mut right) = (noise(1, 44 * rows), noise(2, 44 * cols));
        orthonormalize(&mut left, rows);
        orthonormalize(&mut right, cols);
        let value = |at: usize| {
            let (row, col) = (at / cols, at % cols);
            let term =
                |i: usize| truth[i] * f64::from(left[i * rows + row]) * f64::from(right[i * cols + col]);
            (0..44).map(term).sum::<f64>() as f32
        };
        let matrix: Vec<f32> = (0..rows * cols).map(value).collect();
        for rank in [1, 3, 16, 44] {
            let found = truncated_svd(&matrix, [rows, cols], rank);
            assert_eq!(found.singular.len(), rank);
            for (found, truth) in found.singular.iter().zip(&truth) {
                assert!((found - truth).abs() < 1e-4 * truth.max(1.0), "{found} {truth}");
            }
            let rest: f64 = truth[rank..].iter().map(|s| s * s).sum();
            let error: f64 = (0..rows * cols)
                .map(|at| {
                    let (row, col) = (at / cols, at % cols);
                    let sum: f32 =
                        (0..rank).map(|c| found.left[c * rows + row] * found.right[c * cols + col]).sum();
                    f64::from(matrix[at] - sum).powi(2)
                })
                .sum();
            assert!((error - rest).abs() < 1e-4 * rest + 1e-3, "{error} {rest}");
        }
    }

    #[test]
    fn triangular_factors_multiply_to_the_matrix() {
        let n = 37;
        let x = noise(5, 80 * n);
        let h: Vec<f64> = (0..n * n)
            .map(|at| (0..80).map(|t| f64::from(x[t * n + at / n]) * f64::from(x[t * n + at % n])).sum())
            .collect();
        let mut factors = h.clone();
        assert!(ldl(&mut factors, n));
        let l = |i: usize, j: usize| if i == j { 1.0 } else { factors[i * n + j] };
        for i in 0..n {
            for j in 0..=i {
                let product: f64 = (0..=j).map(|k| l(i, k) * factors[k * n + k] * l(j, k)).sum();
                assert!((product - h[i * n + j]).abs() < 1e-9, "{i} {j}");
            }
        }
        assert!(!ldl(&mut [1.0, 0.0, 2.0, 1.0], 2), "not positive definite");
    }

    #[test]
    fn small_systems_are_solved() {
        let mut y = vec![5.0, 11.0, 0.0];
        solve(&mut [2.0, 1.0, 0.0, 1.0, 3.0, 0.0, 0.0, 0.0, 0.0], &mut y);
        assert!((y[0] - 0.8).abs() < 1e-4 && (y[1] - 3.4).abs() < 1e-4 && y[2] == 0.0, "{y:?}");
    }
}
