//! GGUF's block formats, read 32 columns at a time: the input of the packed matrices.
//!
//! Layouts are those of ggml's `block_q*` structures, little-endian. Super-block formats (`_K`) have 256
//! columns, that is eight of these blocks.

use candle_core::quantized::GgmlDType;
use half::f16;

use crate::kernels::cpu::packed::{Packing, UnpackedBlock};
use crate::kernels::cpu::quantize::BLOCK;

/// A format's packing and how its blocks are read.
#[derive(Debug, Clone, Copy)]
pub struct BlockFormat {
    /// The packed form that holds its values exactly, but for scales rounded to f16 in `_K` formats.
    pub packing: Packing,
    /// Bytes of a stored block or super-block.
    stored_bytes: usize,
    /// Blocks of 32 columns in a stored block.
    blocks: usize,
    read: fn(&[u8], usize) -> UnpackedBlock,
}

impl BlockFormat {
    /// The format of a quantized `dtype`, or `None` for types that are not served in blocks.
    pub fn of(dtype: GgmlDType) -> Option<Self> {
        let (packing, stored_bytes, blocks, read): (_, _, _, fn(&[u8], usize) -> UnpackedBlock) = match dtype
        {
            GgmlDType::Q4_0 => (Packing::Affine4, 18, 1, q4_0),
            GgmlDType::Q4_1 => (Packing::Affine4, 20, 1, q4_1),
            GgmlDType::Q5_0 => (Packing::Symmetric8, 22, 1, q5_0),
            GgmlDType::Q5_1 => (Packing::Affine8, 24, 1, q5_1),
            GgmlDType::Q8_0 => (Packing::Symmetric8, 34, 1, q8_0),
            GgmlDType::Q4K => (Packing::Affine4, 144, 8, q4_k),
            GgmlDType::Q5K => (Packing::Affine8, 176, 8, q5_k),
            GgmlDType::Q6K => (Packing::Fine8, 210, 8, q6_k),
            _ => return None,
        };
        Some(Self { packing, stored_bytes, blocks, read })
    }

    /// Columns in a stored block: rows are whole numbers of it.
    pub fn stored_columns(self) -> usize {
        self.blocks * BLOCK
    }

    /// Bytes of `columns` stored columns.
    pub fn stored_len(self, columns: usize) -> usize {
        columns / self.stored_columns() * self.stored_bytes
    }

    /// Where a stored block has its scales and minima in f16.
    pub fn halves(self) -> &'static [usize] {
        match self.stored_bytes {
            210 => &[208],
            20 | 24 | 144 | 176 => &[0, 2],
            _ => &[0],
        }
    }

    /// Block `index` (of 32 columns) of a row stored in `row`.
    pub fn block(self, row: &[u8], index: usize) -> UnpackedBlock {
        let stored = &row[index / self.blocks * self.stored_bytes..][..self.stored_bytes];
        (self.read)(stored, index % self.blocks)
    }
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Sixteen bytes hold columns 0–15 in their low and 16–31 in their high nibbles.
fn nibbles(bytes: &[u8]) -> [i8; BLOCK] {
    std::array::from_fn(|i| (if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 }) as i8)
}

fn q4_0(b: &[u8], _: usize) -> UnpackedBlock {
    let d = half_at(b, 0);
    UnpackedBlock { q: nibbles(&b[2..18]), scale: [d; 2], min: -8.0 * d }
}

fn q4_1(b: &[u8], _: usize) -> UnpackedBlock {
    UnpackedBlock { q: nibbles(&b[4..20]), scale: [half_at(b, 0); 2], min: half_at(b, 2) }
}

/// The fifth bits, one a column.
fn with_high_bits(low: [i8; BLOCK], bits: &[u8]) -> [i8; BLOCK] {
    std::array::from_fn(|i| low[i] | (((bits[i / 8] >> (i % 8)) & 1) << 4) as i8)
}

fn q5_0(b: &[u8], _: usize) -> UnpackedBlock {
    let q = with_high_bits(nibbles(&b[6..22]), &b[2..6]).map(|q| q - 16);
    UnpackedBlock { q, scale: [half_at(b, 0); 2], min: 0.0 }
}

fn q5_1(b: &[u8], _: usize) -> UnpackedBlock {
    let q = with_high_bits(nibbles(&b[8..24]), &b[4..8]);
    UnpackedBlock { q, scale: [half_at(b, 0); 2], min: half_at(b, 2) }
}

fn q8_0(b: &[u8], _: usize) -> UnpackedBlock {
    UnpackedBlock { q: std::array::from_fn(|i| b[2 + i] as i8), scale: [half_at(b, 0); 2], min: 0.0 }
}

/// The 6-bit scale and minimum of sub-block `j`, packed in twelve bytes.
fn k_scale_min(s: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        ((s[j + 4] & 15) | (s[j - 4] >> 6 << 4), (s[j + 4] >> 4) | (s[j] >> 6 << 4))
    };
    (f32::from(scale), f32::from(min))
}

fn k_affine(b: &[u8], j: usize, q: [i8; BLOCK]) -> UnpackedBlock {
    let (scale, min) = k_scale_min(&b[4..16], j);
    UnpackedBlock { q, scale: [half_at(b, 0) * scale; 2], min: -half_at(b, 2) * min }
}

/// Pairs of sub-blocks share 32 bytes: the even one in the low nibbles.
fn k_nibbles(qs: &[u8], j: usize) -> [i8; BLOCK] {
    let bytes = &qs[j / 2 * BLOCK..][..BLOCK];
    std::array::from_fn(|i| (if j.is_multiple_of(2) { bytes[i] & 15 } else { bytes[i] >> 4 }) as i8)
}

fn q4_k(b: &[u8], j: usize) -> UnpackedBlock {
    k_affine(b, j, k_nibbles(&b[16..144], j))
}

fn q5_k(b: &[u8], j: usize) -> UnpackedBlock {
    let (high, low) = (&b[16..48], k_nibbles(&b[48..176], j));
    k_affine(b, j, std::array::from_fn(|i| low[i] | (((high[i] >> j) & 1) << 4) as i8))
}

fn q6_k(b: &[u8], j: usize) -> UnpackedBlock {
    let (half, k) = (j / 4, j % 4);
    let low = &b[half * 64 + (k % 2) * 32..][..32];
    let high = &b[128 + half * 32..][..32];
    let q = std::array::from_fn(|i| {
        let nibble = if k < 2 { low[i] & 15 } else { low[i] >> 4 };
        (nibble | (((high[i] >> (2 * k)) & 3) << 4)) as i8 - 32
    });
    let d = half_at(b, 208);
    let scale = |part: usize| d * f32::from(b[192 + half * 8 + k * 2 + part] as i8);
    UnpackedBlock { q, scale: [scale(0), scale(1)], min: 0.0 }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::QTensor;
    use candle_core::{Device, Tensor};

    use super::*;

    #[test]
    fn blocks_equal_candles_dequantization() {
        let columns = 512;
        let values: Vec<f32> = (0..columns).map(|i| ((i * 7919 % 1009) as f32 - 500.0) / 173.0).collect();
        let tensor = Tensor::from_vec(values, (1, columns), &Device::Cpu).expect("a tensor");
        use GgmlDType::{Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
        for dtype in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4K, Q5K, Q6K] {
            let quantized = QTensor::quantize(&tensor, dtype).expect("candle quantizes");
            let bytes = quantized.data().expect("candle gives the bytes");
            let truth: Vec<f32> = quantized
                .dequantize(&Device::Cpu)
                .and_then(|t| t.flatten_all()?.to_vec1())
                .expect("candle dequantizes");
            let format = BlockFormat::of(dtype).expect("a served format");
            assert_eq!(bytes.len(), format.stored_len(columns));
            for (i, truth) in truth.iter().enumerate() {
                let block = format.block(&bytes, i / BLOCK);
                let ours = block.scale[i % BLOCK / 16] * f32::from(block.q[i % BLOCK]) + block.min;
                assert!((ours - truth).abs() <= 1e-6 * (1.0 + truth.abs()), "{dtype:?} {i}: {ours} {truth}");
            }
        }
    }

    #[test]
    fn where_halves_are_zeros_all_weights_are() {
        use GgmlDType::{Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
        for dtype in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4K, Q5K, Q6K] {
            let format = BlockFormat::of(dtype).expect("a served format");
            let columns = format.stored_columns();
            let mut stored = vec![0x5A; format.stored_len(columns)];
            format.halves().iter().for_each(|&at| stored[at..at + 2].fill(0));
            for index in 0..columns / BLOCK {
                let block = format.block(&stored, index);
                assert_eq!((block.scale, block.min), ([0.0; 2], 0.0), "{dtype:?}");
            }
        }
    }
}
