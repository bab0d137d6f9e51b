//! The decomposition that sees the inputs of its matrix.
//!
//! It makes blocks of the published form, which are served alike, but chooses them for a small error of the outputs:
//!
//! 1. Errors count by the inputs that they meet ([`Inputs`]). A column's weight goes into `B` when it is stored: signs
//!    do not change, and no other layer has to be scaled, so that every matrix can have its own.
//! 2. Signs are chosen column after column against a target that takes back the errors made so far (LDLQ).
//! 3. `B` is fitted to the target of each column before its signs are final, `A` to all targets between two sweeps;
//!    the published step takes both from the singular vectors of the magnitudes.
//! 4. Levels of one group are chosen together: a matrix at the end of its group is as good as these signs and ranks
//!    can make it, at the cost of the levels inside the group, which alone are worse than greedy ones.

use half::f16;

use super::inputs::{Inputs, TILE};
use super::linalg::{solve, truncated_svd};
use super::{Block, LinearId, Shape};

/// Times that the signs of a matrix are chosen; `A` is fitted between them.
const SWEEPS: usize = 3;
/// Times that the signs of a column are chosen; `B` is fitted between them.
const TURNS: usize = 2;

/// What is left of a matrix `[rows, cols]`, as [`Inputs::columns_of`] gives it.
#[derive(Debug)]
pub struct Residual {
    columns: Vec<f32>,
    shape: Shape,
}

impl Residual {
    /// Nothing has been taken out of `weight` `[rows, cols]` yet.
    pub fn new(weight: &[f32], shape: Shape, inputs: &Inputs) -> Self {
        Self { columns: inputs.columns_of(weight), shape }
    }

    /// Its columns in the order of rounding, `[cols, rows]`.
    pub fn columns(&self) -> &[f32] {
        &self.columns
    }

    /// Takes out the next `count` levels of `linear`, the first of which is `first`.
    pub fn take_group(
        &mut self,
        inputs: &Inputs,
        linear: LinearId,
        (first, count): (usize, usize),
    ) -> Vec<Block> {
        let mut group = Group::greedy(&self.columns, self.shape, count);
        let mut best: Option<(f64, Group, Vec<f32>)> = None;
        for sweep in 0..SWEEPS {
            if sweep > 0 {
                group.fit_a(&inputs.weight);
            }
            group.round_a();
            let (error, errors) = group.sweep(&self.columns, inputs);
            if best.as_ref().is_none_or(|(least, ..)| error < *least) {
                best = Some((error, group.clone(), errors));
            }
        }
        let Some((_, group, errors)) = best else { return Vec::new() };
        self.columns = errors;
        (0..count).map(|level| group.block(level, inputs, (linear, first + level))).collect()
    }
}

/// Levels that are chosen together. A *term* is a level's component: term `level · rank + component`.
#[derive(Debug, Clone)]
struct Group {
    shape: Shape,
    count: usize,
    /// `[terms, rows]`
    a: Vec<f32>,
    /// `[cols, terms]`, in the order of rounding and in multiples of the inputs' scales.
    b: Vec<f32>,
    /// ±1, `[cols, levels, rows]`
    signs: Vec<i8>,
    /// What each column was to be, `[cols, rows]`.
    targets: Vec<f32>,
}

impl Group {
    /// Factors of `count` published steps; signs are left open.
    fn greedy(columns: &[f32], shape: Shape, count: usize) -> Self {
        let Shape { rows, cols, rank } = shape;
        let mut residual = columns.to_vec();
        let mut a = Vec::with_capacity(count * rank * rows);
        let mut b = vec![0f32; cols * count * rank];
        for level in 0..count {
            let magnitudes: Vec<f32> = residual.iter().map(|value| value.abs()).collect();
            let found = truncated_svd(&magnitudes, [cols, rows], rank);
            for (col, residual) in residual.chunks_exact_mut(rows).enumerate() {
                let mut sums = vec![0f32; rows];
                for (c, right) in found.right.chunks_exact(rows).enumerate() {
                    let left = found.left[c * cols + col];
                    b[(col * count + level) * rank + c] = left;
                    sums.iter_mut().zip(right).for_each(|(sum, right)| *sum += left * right);
                }
                residual.iter_mut().zip(sums).for_each(|(r, sum)| *r -= if *r >= 0.0 { sum } else { -sum });
            }
            a.extend(found.right);
        }
        let signs = vec![1; cols * count * rows];
        Self { shape, count, a, b, signs, targets: vec![0.0; cols * rows] }
    }

    fn terms(&self) -> usize {
        self.count * self.shape.rank
    }

    fn round_a(&mut self) {
        self.a.iter_mut().for_each(|a| *a = f16::from_f32(*a).to_f32());
    }

    /// Chooses all signs and `B`, column by column. Returns the error of the outputs, and the errors of the weights.
    fn sweep(&mut self, columns: &[f32], inputs: &Inputs) -> (f64, Vec<f32>) {
        let Shape { rows, cols, .. } = self.shape;
        let mut targets = std::mem::take(&mut self.targets);
        targets.copy_from_slice(columns);
        let mut errors = vec![0f32; cols * rows];
        let mut total = 0f64;
        let mut column = Column::new(self);
        for first in (0..cols).step_by(TILE) {
            let count = TILE.min(cols - first);
            let tile = &mut targets[first * rows..(first + count) * rows];
            inputs.feed_back((&errors, rows), (first, count), tile);
            for k in first..first + count {
                let target = &mut targets[k * rows..(k + 1) * rows];
                for i in first..k {
                    inputs.add_one(&errors[i * rows..(i + 1) * rows], (i, k), target);
                }
                let scale = inputs.scale[inputs.order[k]];
                let own = self.choose(&mut column, (k, scale), target);
                total += f64::from(inputs.weight[k]) * own;
                let from = k * rows..(k + 1) * rows;
                let kept = columns[from.clone()].iter().zip(&column.sum);
                errors[from].iter_mut().zip(kept).for_each(|(error, (value, sum))| *error = value - sum);
            }
        }
        self.targets = targets;
        (total, errors)
    }

    /// Chooses the signs and `B` of column `k`; `column` has what it has become. Returns its squared error.
    fn choose(&mut self, column: &mut Column, (k, scale): (usize, f32), target: &[f32]) -> f64 {
        let terms = self.terms();
        let b = &mut self.b[k * terms..(k + 1) * terms];
        for _ in 0..TURNS {
            column.choose_signs((&self.a, b), target);
            column.fit_b(&self.a, target, b);
        }
        // As it will be stored.
        b.iter_mut().for_each(|b| *b = f16::from_f32(*b / scale).to_f32() * scale);
        let error = column.choose_signs((&self.a, b), target);
        let signs = &mut self.signs[k * column.signs.len()..(k + 1) * column.signs.len()];
        signs.iter_mut().zip(&column.signs).for_each(|(sign, &chosen)| *sign = chosen as i8);
        error
    }

    /// Fits `A`, row by row, to the targets that the last sweep met, with its signs and `B`.
    fn fit_a(&mut self, weight: &[f32]) {
        let (rows, terms) = (self.shape.rows, self.terms());
        let mut products = vec![0f32; terms * terms * rows];
        let mut right = vec![0f32; terms * rows];
        let mut factors = vec![0f32; terms * rows];
        for (k, &weight) in weight.iter().enumerate() {
            for (term, factor) in factors.chunks_exact_mut(rows).enumerate() {
                let b = self.b[k * terms + term];
                let signs = &self.signs[(k * self.count + term / self.shape.rank) * rows..][..rows];
                factor.iter_mut().zip(signs).for_each(|(factor, &sign)| *factor = b * f32::from(sign));
            }
            let target = &self.targets[k * rows..(k + 1) * rows];
            for p in 0..terms {
                let one = &factors[p * rows..(p + 1) * rows];
                add_products(weight, (one, target), &mut right[p * rows..(p + 1) * rows]);
                for q in p..terms {
                    let at = (p * terms + q) * rows;
                    let other = &factors[q * rows..(q + 1) * rows];
                    add_products(weight, (one, other), &mut products[at..at + rows]);
                }
            }
        }
        let mut m = vec![0f64; terms * terms];
        for row in 0..rows {
            for p in 0..terms {
                for q in p..terms {
                    let value = f64::from(products[(p * terms + q) * rows + row]);
                    (m[p * terms + q], m[q * terms + p]) = (value, value);
                }
            }
            let mut y: Vec<f64> = (0..terms).map(|p| f64::from(right[p * rows + row])).collect();
            solve(&mut m, &mut y);
            y.iter().enumerate().for_each(|(term, &y)| self.a[term * rows + row] = y as f32);
        }
    }

    /// The level `level` of the group, as it is stored.
    fn block(&self, level: usize, inputs: &Inputs, (linear, number): (LinearId, usize)) -> Block {
        let Shape { rows, cols, rank } = self.shape;
        let terms = self.terms();
        let mut signs = vec![0u8; self.shape.sign_bytes()];
        let mut vt = vec![0u16; rank * cols];
        for (k, &col) in inputs.order.iter().enumerate() {
            for (row, &sign) in self.signs[(k * self.count + level) * rows..][..rows].iter().enumerate() {
                let at = row * cols + col;
                signs[at / 8] |= u8::from(sign > 0) << (7 - at % 8);
            }
            for c in 0..rank {
                let b = self.b[k * terms + level * rank + c] / inputs.scale[col];
                vt[c * cols + col] = f16::from_f32(b).to_bits();
            }
        }
        let a = |at: usize| self.a[(level * rank + at % rank) * rows + at / rank];
        let u = (0..rows * rank).map(|at| f16::from_f32(a(at)).to_bits()).collect();
        Block { linear, level: number, signs, u, vt }
    }
}

/// `sum += weight · a · b`, element by element.
fn add_products(weight: f32, (a, b): (&[f32], &[f32]), sum: &mut [f32]) {
    for ((sum, a), b) in sum.iter_mut().zip(a).zip(b) {
        *sum += weight * a * b;
    }
}

/// A column on its way.
#[derive(Debug)]
struct Column {
    rows: usize,
    rank: usize,
    /// ±1, `[levels, rows]`
    signs: Vec<f32>,
    /// What the levels add up to, `[rows]`.
    sum: Vec<f32>,
    /// One level's magnitudes, `[rows]`.
    magnitudes: Vec<f32>,
    /// `A` with the column's signs, `[terms, rows]`.
    signed: Vec<f32>,
}

impl Column {
    fn new(group: &Group) -> Self {
        let rows = group.shape.rows;
        Self {
            rows,
            rank: group.shape.rank,
            signs: vec![1.0; group.count * rows],
            sum: vec![0.0; rows],
            magnitudes: vec![0.0; rows],
            signed: vec![0.0; group.a.len()],
        }
    }

    /// Signs that bring the levels nearest to `target`, level after level. Returns the squared distance.
    fn choose_signs(&mut self, (a, b): (&[f32], &[f32]), target: &[f32]) -> f64 {
        let Self { rows, rank, .. } = *self;
        self.sum.fill(0.0);
        for (level, signs) in self.signs.chunks_exact_mut(rows).enumerate() {
            self.magnitudes.fill(0.0);
            for c in level * rank..(level + 1) * rank {
                let a = &a[c * rows..(c + 1) * rows];
                self.magnitudes.iter_mut().zip(a).for_each(|(magnitude, a)| *magnitude += b[c] * a);
            }
            let both = self.sum.iter_mut().zip(&self.magnitudes);
            for ((sign, (sum, magnitude)), target) in signs.iter_mut().zip(both).zip(target) {
                // A magnitude of low rank can be negative: then the sign turns with it.
                *sign = if (target - *sum) * magnitude >= 0.0 { 1.0 } else { -1.0 };
                *sum += *sign * magnitude;
            }
        }
        self.sum.iter().zip(target).map(|(sum, target)| f64::from(sum - target).powi(2)).sum()
    }

    /// Least squares of the column's `b` with its signs.
    fn fit_b(&mut self, a: &[f32], target: &[f32], b: &mut [f32]) {
        let (rows, terms) = (self.rows, b.len());
        for (term, signed) in self.signed.chunks_exact_mut(rows).enumerate() {
            let signs = &self.signs[term / self.rank * rows..][..rows];
            let a = &a[term * rows..(term + 1) * rows];
            signed.iter_mut().zip(a.iter().zip(signs)).for_each(|(signed, (a, sign))| *signed = a * sign);
        }
        let term = |p: usize| &self.signed[p * rows..(p + 1) * rows];
        let mut m = vec![0f64; terms * terms];
        for p in 0..terms {
            for q in p..terms {
                let value = dot(term(p), term(q));
                (m[p * terms + q], m[q * terms + p]) = (value, value);
            }
        }
        let mut y: Vec<f64> = (0..terms).map(|p| dot(term(p), target)).collect();
        solve(&mut m, &mut y);
        b.iter_mut().zip(y).for_each(|(b, y)| *b = y as f32);
    }
}

/// `a·b`, in sixteen partial sums of f32: at most some thousand rows are added.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut sums = [0f32; 16];
    let (a_chunks, b_chunks) = (a.chunks_exact(16), b.chunks_exact(16));
    let tail: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
    }
    f64::from(sums.iter().sum::<f32>() + tail)
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::super::Projection;
    use super::super::avd::take_level;
    use super::super::dense::sum_of;
    use super::*;

    const UP: LinearId = LinearId { layer: 0, projection: Projection::Up };

    /// A weight, and inputs of which some are large and all depend on each other.
    fn case(shape: Shape) -> (Vec<f32>, Inputs) {
        let mut rng = ChaCha8Rng::seed_from_u64(23);
        let mut values = |len: usize| (0..len).map(|_| rng.random_range(-1.0..1.0)).collect::<Vec<f32>>();
        let (weight, mut x) = (values(shape.rows * shape.cols), values(300 * shape.cols));
        for token in x.chunks_exact_mut(shape.cols) {
            let shared = token[0] + token[1];
            let scale = |j: usize| if j % 10 == 3 { 9.0 } else { 1.0 };
            token.iter_mut().enumerate().for_each(|(j, x)| *x = (*x + shared) * scale(j));
        }
        let moments: Vec<f32> = (0..shape.cols * shape.cols)
            .map(|at| {
                (0..300)
                    .map(|t| {
                        x[t * shape.cols + at / shape.cols] * x[t * shape.cols + at % shape.cols] / 300.0
                    })
                    .sum()
            })
            .collect();
        (weight, Inputs::measured(&moments, shape.cols))
    }

    #[test]
    fn blocks_are_what_was_taken_out_of_the_residual() {
        for (rank, count) in [(1, 3), (2, 1), (3, 2), (8, 1), (16, 1)] {
            let shape = Shape { rows: 40, cols: 72, rank };
            let (weight, inputs) = case(shape);
            let mut residual = Residual::new(&weight, shape, &inputs);
            let mut blocks = residual.take_group(&inputs, UP, (0, count));
            blocks.extend(residual.take_group(&inputs, UP, (count, 1)));
            assert!(blocks.iter().map(|block| block.level).eq(0..=count));
            let sum = sum_of(&blocks, shape);
            let left: Vec<f32> = weight.iter().zip(&sum).map(|(weight, sum)| weight - sum).collect();
            for (left, kept) in inputs.columns_of(&left).iter().zip(residual.columns()) {
                assert!((left - kept).abs() < 1e-3 * (1.0 + kept.abs()), "rank {rank}: {left} {kept}");
            }
        }
    }

    #[test]
    fn outputs_are_nearer_than_with_the_published_blocks_of_the_same_size() {
        let shape = Shape { rows: 64, cols: 96, rank: 2 };
        let (weight, inputs) = case(shape);
        let scaled: Vec<f32> =
            weight.iter().enumerate().map(|(at, weight)| weight * inputs.scale[at % shape.cols]).collect();
        let mut published = scaled;
        let mut fitted = Residual::new(&weight, shape, &inputs);
        let mut last = inputs.error(fitted.columns());
        for level in 0..4 {
            take_level(&mut published, shape, (UP, level));
            let unscaled: Vec<f32> =
                published.iter().enumerate().map(|(at, left)| left / inputs.scale[at % shape.cols]).collect();
            fitted.take_group(&inputs, UP, (level, 1));
            let (theirs, ours) =
                (inputs.error(&inputs.columns_of(&unscaled)), inputs.error(fitted.columns()));
            assert!(ours < 0.9 * theirs && ours < last, "level {level}: {ours} {theirs}");
            last = ours;
        }
        // Three levels that are chosen together are better than three that are chosen one by one.
        let (mut together, mut single) =
            (Residual::new(&weight, shape, &inputs), Residual::new(&weight, shape, &inputs));
        together.take_group(&inputs, UP, (0, 3));
        (0..3).for_each(|level| drop(single.take_group(&inputs, UP, (level, 1))));
        assert!(inputs.error(together.columns()) < inputs.error(single.columns()));
    }
}
