//! What a matrix's inputs say about which errors of its weights matter.
//!
//! An error `E` of the weights makes an error `‖E·x‖²` of the output, on average `tr(E·H·Eᵀ)` with `H = E[x·xᵀ]`. With
//! `H = (I + U)·D·(I + U)ᵀ`, `U` strictly upper triangular, that is `Σ d_k ‖e_k + Σ_{i<k} e_i·u_ik‖²`: when column `k` is
//! rounded, the errors of the columns before it can be taken back (LDLQ of Chee et al. 2023, which is GPTQ's rule).

use super::linalg::ldl;
use crate::kernels::cpu::gemm::{Target, View, matmul};
use crate::kernels::cpu::pool::Pool;

/// Columns whose feedback is computed at once.
pub(super) const TILE: usize = 32;
/// Added to the diagonal, as a share of its mean: inputs of the served model are not quite those measured.
const DAMPING: f64 = 0.01;
/// Least root mean square of an input, as a share of the mean: an input that was never seen is not free.
const FLOOR: f64 = 0.01;

/// The second moments of a matrix's inputs, factored.
#[derive(Debug)]
pub struct Inputs {
    /// Columns in the order in which they are rounded: those of the largest inputs first.
    pub(super) order: Vec<usize>,
    /// Root mean square of each input, by column: errors are measured in its multiples.
    pub(super) scale: Vec<f32>,
    /// `d_k` `[cols]`, in the order of rounding.
    pub(super) weight: Vec<f32>,
    /// Row `k` has `u_ik` for `i < k`, `[cols, cols]`, in the order of rounding; nothing where inputs are independent.
    pub(super) feedback: Vec<f32>,
}

impl Inputs {
    /// Inputs of which nothing is known.
    pub fn unknown(cols: usize) -> Self {
        Self {
            order: (0..cols).collect(),
            scale: vec![1.0; cols],
            weight: vec![1.0; cols],
            feedback: Vec::new(),
        }
    }

    /// Independent inputs of the root mean squares `scale`.
    pub fn independent(scale: &[f32]) -> Self {
        Self { scale: floored(scale.iter().map(|&s| f64::from(s)).collect()), ..Self::unknown(scale.len()) }
    }

    /// Inputs of the second moments `moments` `[cols, cols]`, of which the upper half counts.
    pub fn measured(moments: &[f32], cols: usize) -> Self {
        let at = |i: usize, j: usize| f64::from(moments[i.min(j) * cols + i.max(j)]);
        let scale = floored((0..cols).map(|j| at(j, j).max(0.0).sqrt()).collect());
        let mut order: Vec<usize> = (0..cols).collect();
        order.sort_by(|&i, &j| scale[j].total_cmp(&scale[i]).then(i.cmp(&j)));
        // The factors of the reversed matrix, read backwards, are those with U in the upper half.
        let correlation = |i: usize, j: usize| {
            let (i, j) = (order[cols - 1 - i], order[cols - 1 - j]);
            let damping = if i == j { DAMPING } else { 0.0 };
            at(i, j) / (f64::from(scale[i]) * f64::from(scale[j])) + damping
        };
        let mut factors: Vec<f64> = (0..cols * cols).map(|at| correlation(at / cols, at % cols)).collect();
        if !ldl(&mut factors, cols) {
            return Self::independent(&scale);
        }
        let back = |i: usize| cols - 1 - i;
        let weight = (0..cols).map(|k| factors[back(k) * cols + back(k)] as f32).collect();
        let mut feedback = vec![0f32; cols * cols];
        for (k, row) in feedback.chunks_exact_mut(cols).enumerate() {
            for (i, value) in row[..k].iter_mut().enumerate() {
                *value = factors[back(i) * cols + back(k)] as f32;
            }
        }
        Self { order, scale, weight, feedback }
    }

    /// Number of inputs.
    pub fn cols(&self) -> usize {
        self.scale.len()
    }

    /// `values` `[rows, cols]` in multiples of the inputs' scales, column after column in the order of rounding.
    pub fn columns_of(&self, values: &[f32]) -> Vec<f32> {
        let cols = self.cols();
        let rows = values.len() / cols;
        let mut columns = Vec::with_capacity(values.len());
        for &col in &self.order {
            columns.extend((0..rows).map(|row| values[row * cols + col] * self.scale[col]));
        }
        columns
    }

    /// Adds to the columns `first..first + count` in `targets` what the errors of the columns before `first` ask of them.
    pub(super) fn feed_back(
        &self,
        (errors, rows): (&[f32], usize),
        (first, count): (usize, usize),
        targets: &mut [f32],
    ) {
        if self.feedback.is_empty() || first == 0 {
            return;
        }
        let factors =
            (View::rows(&self.feedback[first * self.cols()..], self.cols()), View::rows(errors, rows));
        let target = Target { values: targets, stride: rows, add: true };
        matmul(&Pool::new(1), [count, first, rows], factors, target);
    }

    /// `tr(E·H·Eᵀ)` of errors as [`Inputs::columns_of`] gives them.
    pub fn error(&self, errors: &[f32]) -> f64 {
        let rows = errors.len() / self.cols();
        let mut sum = 0.0;
        for first in (0..self.cols()).step_by(TILE) {
            let count = TILE.min(self.cols() - first);
            let mut tile = errors[first * rows..(first + count) * rows].to_vec();
            // Of the tile itself too: its part of U is strictly upper, so that only columns before count.
            self.feed_back((errors, rows), (first, count), &mut tile);
            for k in 0..count {
                let column = &mut tile[k * rows..(k + 1) * rows];
                for i in 0..k {
                    self.add_one(
                        &errors[(first + i) * rows..(first + i + 1) * rows],
                        (first + i, first + k),
                        column,
                    );
                }
                sum += f64::from(self.weight[first + k]) * super::linalg::dot(column, column);
            }
        }
        sum
    }

    /// Adds to `target`, the column `k`, what the error of the column `i` before it asks.
    pub(super) fn add_one(&self, error: &[f32], (i, k): (usize, usize), target: &mut [f32]) {
        if !self.feedback.is_empty() {
            let factor = self.feedback[k * self.cols() + i];
            target.iter_mut().zip(error).for_each(|(target, error)| *target += factor * error);
        }
    }
}

fn floored(scale: Vec<f64>) -> Vec<f32> {
    let mean = scale.iter().sum::<f64>() / scale.len().max(1) as f64;
    let least = if mean > 0.0 { FLOOR * mean } else { 1.0 };
    scale.into_iter().map(|s| s.max(least) as f32).collect()
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn the_error_is_that_of_the_outputs() {
        let (rows, cols, tokens) = (5, 150, 400);
        let mut rng = ChaCha8Rng::seed_from_u64(17);
        let mut values = |len: usize| (0..len).map(|_| rng.random_range(-1.0..1.0)).collect::<Vec<f32>>();
        let (mut x, e) = (values(tokens * cols), values(rows * cols));
        // Inputs that depend on each other and differ in size.
        for token in x.chunks_exact_mut(cols) {
            let first = token[0];
            token.iter_mut().enumerate().for_each(|(j, x)| *x = (*x + first) * (1.0 + j as f32 / 20.0));
        }
        let moment = |at: usize| {
            let term = |t: usize| f64::from(x[t * cols + at / cols]) * f64::from(x[t * cols + at % cols]);
            ((0..tokens).map(term).sum::<f64>() / tokens as f64) as f32
        };
        let moments: Vec<f32> = (0..cols * cols).map(moment).collect();
        let inputs = Inputs::measured(&moments, cols);
        assert!(!inputs.feedback.is_empty());
        let mut truth = 0f64;
        for row in e.chunks_exact(cols) {
            for token in x.chunks_exact(cols) {
                truth += super::super::linalg::dot(row, token).powi(2) / tokens as f64;
            }
            truth +=
                row.iter().zip(&inputs.scale).map(|(e, s)| f64::from(e * s).powi(2)).sum::<f64>() * DAMPING;
        }
        let found = inputs.error(&inputs.columns_of(&e));
        assert!((found / truth - 1.0).abs() < 1e-4, "{found} {truth}");
    }
}
