use rand::{Rng, SeedableRng};

use super::*;
use crate::kernels::cpu::pool::Pool;

const PACKINGS: [Packing; 4] = [Packing::Affine4, Packing::Symmetric8, Packing::Affine8, Packing::Fine8];

/// A random matrix and its blocks; extremes of the value range are frequent.
fn random_matrix(
    rows: usize,
    cols: usize,
    packing: Packing,
    seed: u64,
) -> (PackedMatrix, Vec<UnpackedBlock>) {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let blocks: Vec<UnpackedBlock> = (0..rows * cols / BLOCK)
        .map(|_| UnpackedBlock {
            q: std::array::from_fn(|_| match (packing, rng.random_range(0..4)) {
                (Packing::Affine4, 0) => 15,
                (Packing::Affine4, _) => rng.random_range(0..16),
                (_, 0) => [-127, 127][rng.random_range(0..2)],
                _ => rng.random_range(-127..=127),
            }),
            scale: [
                f16::from_f32(rng.random_range(-0.1..0.1)).to_f32(),
                f16::from_f32(rng.random_range(0.0..0.1)).to_f32(),
            ],
            min: if packing.is_affine() { f16::from_f32(rng.random_range(-1.0..1.0)).to_f32() } else { 0.0 },
        })
        .collect();
    let pack = |row: usize, block: usize| blocks[row * cols / BLOCK + block];
    (PackedMatrix::pack(&Pool::new(2), [rows, cols], packing, pack), blocks)
}

fn random_rows(rows: usize, cols: usize, seed: u64) -> (Vec<f32>, QuantizedRows) {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let x: Vec<f32> = (0..rows * cols).map(|_| rng.random_range(-2.0f32..2.0)).collect();
    let mut quantized = QuantizedRows::default();
    quantized.quantize(&Pool::new(1), &x, cols);
    (x, quantized)
}

#[test]
fn dequantized_rows_are_what_was_packed() {
    for packing in PACKINGS {
        let (rows, cols) = (37, 96);
        let (matrix, blocks) = random_matrix(rows, cols, packing, 3);
        let mut out = vec![f32::NAN; cols];
        for row in 0..rows {
            matrix.dequantize_row(row, &mut out);
            for (column, &value) in out.iter().enumerate() {
                let block = &blocks[row * cols / BLOCK + column / BLOCK];
                let scale = block.scale[column % BLOCK * packing.scales_per_block() / BLOCK];
                assert_eq!(value, scale * f32::from(block.q[column % BLOCK]) + block.min, "{packing:?}");
            }
        }
    }
}

#[test]
fn every_kernel_equals_the_formula() {
    for packing in PACKINGS {
        for (rows, cols, tokens) in [(16, 32, 1), (33, 96, 3), (100, 576, 15), (48, 1536, 9)] {
            let (matrix, _) = random_matrix(rows, cols, packing, 5);
            let (_, x) = random_rows(tokens, cols, 6);
            let mut w = vec![0f32; cols];
            let mut expected = vec![0f64; tokens * rows];
            for row in 0..rows {
                matrix.dequantize_row(row, &mut w);
                for token in 0..tokens {
                    expected[token * rows + row] = (0..cols)
                        .map(|c| {
                            let at = token * cols + c;
                            f64::from(w[c]) * f64::from(x.scale[at / BLOCK]) * f64::from(x.q[at])
                        })
                        .sum();
                }
            }
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; tokens * rows];
                matrix.matmul(&Pool::new(2), isa, &x, (Write::Store, &mut out));
                for (a, b) in out.iter().zip(&expected) {
                    assert!(
                        (f64::from(*a) - b).abs() < 2e-4 * (1.0 + b.abs()),
                        "{packing:?} {isa:?}: {a} {b}"
                    );
                }
                let stored = out.clone();
                matrix.matmul(&Pool::new(2), isa, &x, (Write::Add, &mut out));
                assert!(out.iter().zip(&stored).all(|(a, b)| *a == b + b));
            }
        }
    }
}

#[test]
fn a_token_gets_the_same_bits_alone_and_in_a_batch() {
    for packing in PACKINGS {
        for isa in Isa::available() {
            let (rows, cols, tokens) = (50, 288, 23);
            let (matrix, _) = random_matrix(rows, cols, packing, 7);
            let (values, batch) = random_rows(tokens, cols, 8);
            let mut together = vec![0f32; tokens * rows];
            matrix.matmul(&Pool::new(3), isa, &batch, (Write::Store, &mut together));
            for token in 0..tokens {
                let mut solo = QuantizedRows::default();
                solo.quantize(&Pool::new(1), &values[token * cols..(token + 1) * cols], cols);
                let mut alone = vec![0f32; rows];
                matrix.matmul(&Pool::new(1), isa, &solo, (Write::Store, &mut alone));
                assert_eq!(alone, together[token * rows..(token + 1) * rows], "{packing:?} {isa:?}");
            }
        }
    }
}
