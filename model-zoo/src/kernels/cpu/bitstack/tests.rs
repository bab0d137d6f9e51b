use half::f16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::packed::Write;
use crate::kernels::cpu::pool::Pool;
use crate::kernels::cpu::quantize::QuantizedRows;

/// A matrix of some levels and its formula in f64.
struct Case {
    shape: LevelShape,
    levels: Vec<Level>,
    parts: Vec<(Vec<u8>, Vec<u16>, Vec<u16>)>,
}

impl Case {
    /// Factors as decompositions have them: the first of each level positive, later ones and levels smaller.
    fn new(shape: LevelShape, num_levels: usize, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let LevelShape { rows, cols, rank } = shape;
        let mut parts = Vec::new();
        for level in 0..num_levels {
            let mut factor = |len: usize, c: &dyn Fn(usize) -> usize| -> Vec<u16> {
                let value = |i: usize| {
                    let c = c(i);
                    let noise = rng.random_range(if c == 0 { 0.3f32..1.0 } else { -0.4..0.4 });
                    f16::from_f32(noise / (1 << level) as f32).to_bits()
                };
                (0..len).map(value).collect()
            };
            let left = factor(rows * rank, &|i| i % rank);
            let right = factor(rank * cols, &|i| i / cols);
            let signs = (0..rows * cols / 8).map(|_| rng.random()).collect();
            parts.push((signs, left, right));
        }
        let level = |(signs, left, right): &(Vec<u8>, Vec<u16>, Vec<u16>)| {
            Level::new(shape, &LevelParts { signs, left, right }).unwrap()
        };
        Self { shape, levels: parts.iter().map(level).collect(), parts }
    }

    /// `(A, B, S)` of a level, read from the artefact's form, at `(row, column)`.
    fn term(&self, level: usize, c: usize, (row, col): (usize, usize)) -> (f64, f64, f64) {
        let (signs, left, right) = &self.parts[level];
        let LevelShape { cols, rank, .. } = self.shape;
        let bit = row * cols + col;
        let sign = if signs[bit / 8] >> (7 - bit % 8) & 1 == 1 { 1.0 } else { -1.0 };
        let value = |bits: u16| f64::from(f16::from_bits(bits).to_f32());
        (value(left[row * rank + c]), value(right[c * cols + col]), sign)
    }

    fn weight(&self, levels: usize, place: (usize, usize)) -> f64 {
        let terms = (0..levels).flat_map(|level| (0..self.shape.rank).map(move |c| (level, c)));
        terms.map(|(level, c)| self.term(level, c, place)).map(|(a, b, s)| a * b * s).sum()
    }

    /// `W·x` in f64, and how far int8 may be from it by the bounds of the module's documentation.
    fn expected(&self, x: &[f32], row: usize, (levels, many): (usize, bool)) -> (f64, f64) {
        let LevelShape { cols, rank, .. } = self.shape;
        let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        let weights: Vec<f64> = (0..cols).map(|col| self.weight(levels, (row, col))).collect();
        let truth = weights.iter().zip(&x).map(|(w, x)| w * x).sum();
        let mut bound = 0.0;
        if many {
            for (w, x) in weights.chunks_exact(32).zip(x.chunks_exact(32)) {
                let (w_step, x_step) = (step(w) * 1.001 + 6e-8, step(x));
                let sum = |values: &[f64]| values.iter().map(|value| value.abs()).sum::<f64>();
                bound += sum(w) * x_step / 2.0 + sum(x) * w_step / 2.0 + 32.0 * x_step * w_step / 4.0;
            }
        } else {
            for (level, c) in (0..levels).flat_map(|level| (0..rank).map(move |c| (level, c))) {
                let a = self.term(level, c, (row, 0)).0.abs();
                let column: Vec<f64> = (0..cols).map(|j| self.term(level, c, (row, j)).1 * x[j]).collect();
                bound += column.chunks_exact(32).map(|block| 32.0 * a * step(block) / 2.0).sum::<f64>();
            }
        }
        (truth, bound * 1.001 + 1e-5)
    }

    fn run(&self, isa: Isa, x: &[f32], (used, many): (&[usize], &[bool]), threads: usize) -> Vec<f32> {
        let (pool, tokens) = (Pool::new(threads), used.len());
        let mut out = vec![f32::NAN; tokens * self.shape.rows];
        let mut quantized = QuantizedRows::default();
        quantized.quantize(&pool, x, self.shape.cols);
        let mut few: Vec<usize> = (0..tokens).filter(|&token| !many[token]).collect();
        few.sort_by_key(|&token| std::cmp::Reverse(used[token]));
        let many: Vec<usize> = (0..tokens).filter(|&token| many[token]).collect();
        let rows = Rows { x, channels: self.shape.cols, few: &few, many: &many };
        let mut products = [StackProduct { levels: &self.levels, used, write: Write::Store, out: &mut out }];
        matmul_many((&pool, isa), rows, (&quantized, &mut Columns::default()), &mut products);
        out
    }
}

/// The int8 step of a block.
fn step(block: &[f64]) -> f64 {
    block.iter().fold(0f64, |max, v| max.max(v.abs())) / 127.0
}

fn activations(tokens: usize, cols: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // Some channels stand out, as they do in models.
    let value = |i: usize| rng.random_range(-1.0f32..1.0) * if i % cols % 61 == 5 { 20.0 } else { 1.0 };
    (0..tokens * cols).map(value).collect()
}

#[test]
fn both_ways_equal_the_formula_within_the_stated_bound() {
    for (rows, cols, rank, num_levels) in
        [(16, 32, 1, 1), (33, 96, 2, 3), (48, 576, 5, 4), (20, 160, 8, 2), (40, 64, 32, 2), (24, 128, 24, 3)]
    {
        let case = Case::new(LevelShape { rows, cols, rank }, num_levels, 11);
        let tokens = 5;
        let x = activations(tokens, cols, 12);
        let used: Vec<usize> = (0..tokens).map(|token| 1 + token * 7 % num_levels).collect();
        for many in [false, true] {
            let results = Isa::available().into_iter().map(|isa| {
                let out = case.run(isa, &x, (&used, &vec![many; tokens]), 2);
                let mut error = 0f64;
                for (i, &found) in out.iter().enumerate() {
                    let (token, row) = (i / rows, i % rows);
                    let x = &x[token * cols..(token + 1) * cols];
                    let (truth, bound) = case.expected(x, row, (used[token], many));
                    let difference = (f64::from(found) - truth).abs();
                    assert!(
                        difference <= bound,
                        "{isa:?} {:?} {many}: {found}, {truth} ± {bound}",
                        case.shape
                    );
                    error += difference / bound;
                }
                (isa, out, error / (tokens * rows) as f64)
            });
            let results: Vec<_> = results.collect();
            // The integers are the same everywhere; what differs is the rounding of f32.
            let most = results[0].1.iter().fold(0f32, |most, v| most.max(v.abs()));
            for (isa, out, error) in &results {
                let apart = out.iter().zip(&results[0].1).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
                // A weight that lies between two int8 values may fall to either side.
                let allowed = if many { 1e-2 } else { 1e-5 };
                assert!(apart <= allowed * most, "{isa:?} {:?} {many}: {apart} of {most}", case.shape);
                assert!(*error < 0.35, "{isa:?}: the mean error is far inside the bound, not {error}");
            }
        }
    }
}

#[test]
fn a_token_gets_the_same_bits_alone_and_among_others() {
    let shape = LevelShape { rows: 50, cols: 288, rank: 3 };
    let case = Case::new(shape, 4, 21);
    let tokens = 41;
    let x = activations(tokens, shape.cols, 22);
    let used: Vec<usize> = (0..tokens).map(|token| 1 + token * 5 % 4).collect();
    let many: Vec<bool> = (0..tokens).map(|token| token % 3 == 1).collect();
    for isa in Isa::available() {
        let together = case.run(isa, &x, (&used, &many), 3);
        for token in 0..tokens {
            let x = &x[token * shape.cols..(token + 1) * shape.cols];
            let alone = case.run(isa, x, (&used[token..=token], &many[token..=token]), 1);
            assert_eq!(alone, together[token * shape.rows..(token + 1) * shape.rows], "{isa:?} {token}");
        }
    }
}

#[test]
fn several_matrices_share_a_call_and_add_to_what_is_there() {
    let shapes =
        [(40, 64, 2), (16, 64, 5), (72, 64, 1)].map(|(rows, cols, rank)| LevelShape { rows, cols, rank });
    let cases = [Case::new(shapes[0], 2, 31), Case::new(shapes[1], 3, 32), Case::new(shapes[2], 2, 33)];
    let x = activations(3, 64, 34);
    let used = [2, 1, 2];
    let many = [false, true, false];
    for isa in Isa::available() {
        let pool = Pool::new(2);
        let mut quantized = QuantizedRows::default();
        quantized.quantize(&pool, &x, 64);
        let mut outs = shapes.map(|shape| vec![1f32; 3 * shape.rows]);
        let products = cases.iter().zip(&mut outs);
        let mut products: Vec<_> = products
            .map(|(case, out)| StackProduct { levels: &case.levels, used: &used, write: Write::Add, out })
            .collect();
        let rows = Rows { x: &x, channels: 64, few: &[0, 2], many: &[1] };
        matmul_many((&pool, isa), rows, (&quantized, &mut Columns::default()), &mut products);
        for (case, out) in cases.iter().zip(outs) {
            let alone = case.run(isa, &x, (&used, &many), 1);
            assert!(out.iter().zip(&alone).all(|(sum, part)| *sum == 1.0 + part), "{isa:?}");
        }
    }
}

#[test]
fn signs_lie_where_their_bytes_are_to_be() {
    // Golden byte of methods.md §1e: + − − − − − − + is 0x81.
    let shape = LevelShape { rows: 16, cols: 32, rank: 1 };
    let mut signs = vec![0u8; 64];
    signs[5 * 4 + 1] = 0x81;
    let ones = [f16::ONE.to_bits(); 32];
    let parts = LevelParts { signs: &signs, left: &ones[..16], right: &ones };
    let level = Level::new(shape, &parts).unwrap();
    // Columns 8 and 15 of row 5: bit 0 of quad 2 and bit 3 of quad 3, of lane 5.
    let mut expected = [0u64; 8];
    (expected[2], expected[3]) = (1 << 20, 1 << 23);
    assert_eq!(level.group(0).signs, expected);
}

#[test]
fn what_is_not_served_is_refused() {
    for (shape, says) in [
        (LevelShape { rows: 16, cols: 40, rank: 2 }, "multiple of 32"),
        (LevelShape { rows: 16, cols: 32, rank: 33 }, "rank 33"),
        (LevelShape { rows: 16, cols: 32, rank: 0 }, "rank 0"),
        (LevelShape { rows: 16, cols: 32, rank: 1 }, "signs and factors"),
    ] {
        let refused = Level::new(shape, &LevelParts { signs: &[], left: &[], right: &[] });
        let error = refused.expect_err(says).to_string();
        assert!(error.contains(says), "{error}");
    }
}
