//! Signs from rows of bits to groups of rows.

use super::LevelShape;
use crate::kernels::cpu::packed::GROUP;
use crate::kernels::cpu::vector::multiversion;

multiversion! {
    /// In squares of 16 rows by 64 columns, of which the nibbles are transposed.
    pub(super) fn lay_signs(from: (LevelShape, &[u8]), to: &mut [u64]) {
        let (shape, signs) = from;
        let (row_bytes, quads) = (shape.cols / 8, shape.cols / 4);
        for (group, to) in to.chunks_exact_mut(quads).enumerate() {
            let rows = GROUP.min(shape.rows - group * GROUP);
            let from = &signs[group * GROUP * row_bytes..][..rows * row_bytes];
            for (index, to) in to.chunks_mut(16).enumerate() {
                let mut square = [0u64; GROUP];
                for (word, row) in square.iter_mut().zip(from.chunks_exact(row_bytes)) {
                    let part = &row[8 * index..row_bytes.min(8 * index + 8)];
                    let mut bytes = [0u8; 8];
                    match part.try_into() {
                        Ok(whole) => bytes = whole,
                        Err(_) => bytes[..part.len()].copy_from_slice(part),
                    }
                    *word = u64::from_le_bytes(bytes);
                }
                for word in &mut square {
                    *word = reverse_bytes(*word);
                }
                transpose::<8>(&mut square, 0x0000_0000_FFFF_FFFF);
                transpose::<4>(&mut square, 0x0000_FFFF_0000_FFFF);
                transpose::<2>(&mut square, 0x00FF_00FF_00FF_00FF);
                transpose::<1>(&mut square, 0x0F0F_0F0F_0F0F_0F0F);
                to.copy_from_slice(&square[..to.len()]);
            }
        }
    }
}

/// Turns the bits of each byte round: the artefact has the first column in the highest.
#[inline(always)]
fn reverse_bytes(word: u64) -> u64 {
    let word = (word >> 1 & 0x5555_5555_5555_5555) | (word & 0x5555_5555_5555_5555) << 1;
    let word = (word >> 2 & 0x3333_3333_3333_3333) | (word & 0x3333_3333_3333_3333) << 2;
    (word >> 4 & 0x0F0F_0F0F_0F0F_0F0F) | (word & 0x0F0F_0F0F_0F0F_0F0F) << 4
}

/// One of four steps that transpose sixteen words of sixteen nibbles: exchanges the off-diagonal quarters of squares
/// of `2 · HALF` words.
#[inline(always)]
fn transpose<const HALF: usize>(words: &mut [u64; GROUP], mask: u64) {
    for square in words.chunks_exact_mut(2 * HALF) {
        let (low, high) = square.split_at_mut(HALF);
        for (low, high) in low.iter_mut().zip(high) {
            let swapped = (*low >> (4 * HALF) ^ *high) & mask;
            *high ^= swapped;
            *low ^= swapped << (4 * HALF);
        }
    }
}
