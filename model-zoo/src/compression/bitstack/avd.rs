//! The published decomposition: iterated absolute value decomposition (paper §3.2; methods.md §1b, step 2).

use half::f16;

use super::linalg::truncated_svd;
use super::{Block, LinearId, Shape, signs};

/// Takes one level out of `residual` `[rows, cols]`: its signs, and the best approximation of rank `k` of its
/// magnitudes, rounded to f16. What is left in `residual` is what the level as it will be served does not say.
pub fn take_level(residual: &mut [f32], shape: Shape, (linear, level): (LinearId, usize)) -> Block {
    let magnitudes: Vec<f32> = residual.iter().map(|value| value.abs()).collect();
    let found = truncated_svd(&magnitudes, [shape.rows, shape.cols], shape.rank);
    let half = |value: f32| f16::from_f32(value).to_bits();
    let left = |at: usize| found.left[at % shape.rank * shape.rows + at / shape.rank];
    let block = Block {
        linear,
        level,
        signs: signs::pack(residual),
        u: (0..shape.rows * shape.rank).map(|at| half(left(at))).collect(),
        vt: found.right.iter().map(|&value| half(value)).collect(),
    };
    add_level(residual, shape, (&block, -1.0));
    block
}

/// Adds `factor` times a level's `S ⊙ (A·B)` to `values` `[rows, cols]`.
pub fn add_level(values: &mut [f32], shape: Shape, (block, factor): (&Block, f32)) {
    let widen = |bits: &u16| f16::from_bits(*bits).to_f32();
    let vt: Vec<f32> = block.vt.iter().map(widen).collect();
    let mut magnitudes = vec![0f32; shape.cols];
    for (row, values) in values.chunks_exact_mut(shape.cols).enumerate() {
        magnitudes.fill(0.0);
        let u = &block.u[row * shape.rank..(row + 1) * shape.rank];
        for (u, vt) in u.iter().map(widen).zip(vt.chunks_exact(shape.cols)) {
            magnitudes.iter_mut().zip(vt).for_each(|(magnitude, v)| *magnitude += u * v);
        }
        let first = row * shape.cols;
        for (at, (value, magnitude)) in values.iter_mut().zip(&magnitudes).enumerate() {
            *value += factor * signs::sign(&block.signs, first + at) * magnitude;
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::super::Projection;
    use super::*;

    const Q: LinearId = LinearId { layer: 0, projection: Projection::Q };

    fn gaussian(seed: u64, len: usize) -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut uniform = || rng.random_range(f32::MIN_POSITIVE..1.0);
        (0..len).map(|_| (-2.0 * uniform().ln()).sqrt() * (std::f32::consts::TAU * uniform()).cos()).collect()
    }

    fn energy(values: &[f32]) -> f64 {
        values.iter().map(|&value| f64::from(value).powi(2)).sum()
    }

    /// ‖R′‖² = ‖R‖² − Σσ²: exact for any subspace, so that what it lacks is the rounding of the factors.
    #[test]
    fn every_step_takes_out_the_energy_of_its_singular_values() {
        for rank in [1, 8, 16, 24, 32] {
            let shape = Shape { rows: 96, cols: 136, rank };
            let mut residual = gaussian(7, 96 * 136);
            for level in 0..5 {
                let before = energy(&residual);
                let magnitudes: Vec<f32> = residual.iter().map(|value| value.abs()).collect();
                let found = truncated_svd(&magnitudes, [96, 136], rank);
                let taken: f64 = found.singular.iter().map(|s| s * s).sum();
                // With the factors as found, in f64.
                let exact: f64 = (0..96 * 136)
                    .map(|at| {
                        let (row, col) = (at / 136, at % 136);
                        let term = |c: usize| {
                            f64::from(found.left[c * 96 + row]) * f64::from(found.right[c * 136 + col])
                        };
                        (f64::from(magnitudes[at]) - (0..rank).map(term).sum::<f64>()).powi(2)
                    })
                    .sum();
                assert!((exact - (before - taken)).abs() < 3e-6 * before, "rank {rank} level {level}");
                // As served.
                take_level(&mut residual, shape, (Q, level));
                let after = energy(&residual);
                assert!((after - (before - taken)).abs() < 2e-6 * before, "rank {rank} level {level}");
                assert!(after < before);
            }
        }
    }

    /// methods.md §1e3, computed there by another program.
    #[test]
    fn the_error_of_a_gaussian_falls_as_the_reference_says() {
        let shape = Shape { rows: 1024, cols: 1024, rank: 4 };
        let mut residual = gaussian(11, 1024 * 1024);
        let whole = energy(&residual);
        for (level, truth) in [0.600, 0.357, 0.237, 0.175, 0.143, 0.124].into_iter().enumerate() {
            take_level(&mut residual, shape, (Q, level));
            let error = (energy(&residual) / whole).sqrt();
            assert!((error / truth - 1.0).abs() < 0.01, "level {}: {error} {truth}", level + 1);
        }
    }

    #[test]
    fn one_level_of_full_rank_is_the_matrix() {
        let shape = Shape { rows: 48, cols: 40, rank: 40 };
        let weight = gaussian(13, 48 * 40);
        let block = take_level(&mut weight.clone(), shape, (Q, 0));
        let mut sum = vec![0.0; weight.len()];
        add_level(&mut sum, shape, (&block, 1.0));
        for (sum, weight) in sum.iter().zip(&weight) {
            assert!((sum - weight).abs() < 4e-3, "{sum} {weight}");
        }
    }
}
