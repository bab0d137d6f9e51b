//! Other quantizations of the same weights, to compare a stack with: GGUF's, and rounding in groups to fewer bits
//! than GGUF has types for in rows of any width.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::f16;

use crate::Result;
use crate::kernels::cpu::quantize::BLOCK;
use crate::weights::merged::q8_0;

/// A way to hold a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    /// So many bits a weight, with a scale and a minimum in f16 for each 32: what a `Q2_1` or `Q3_1` would be.
    Grouped(u32),
    /// GGUF's Q4_0, 4.5 bits.
    Q4_0,
    /// GGUF's Q4_1, 5 bits.
    Q4_1,
    /// GGUF's Q5_0, 5.5 bits.
    Q5_0,
    /// GGUF's Q5_1, 6 bits.
    Q5_1,
    /// GGUF's Q8_0, 8.5 bits.
    Q8_0,
}

impl Type {
    /// For tables.
    pub fn name(self) -> String {
        match self {
            Self::Grouped(bits) => format!("{bits} bits in groups of 32"),
            other => format!("{other:?}"),
        }
    }

    /// Bytes of `weights` weights.
    pub fn bytes(self, weights: usize) -> u64 {
        let of_block = match self {
            Self::Grouped(bits) => 4 * bits as usize + 4,
            other => other.dtype().type_size(),
        };
        (weights / BLOCK * of_block) as u64
    }

    fn dtype(self) -> GgmlDType {
        match self {
            Self::Q4_0 => GgmlDType::Q4_0,
            Self::Q4_1 => GgmlDType::Q4_1,
            Self::Q5_0 => GgmlDType::Q5_0,
            Self::Q5_1 => GgmlDType::Q5_1,
            Self::Grouped(_) | Self::Q8_0 => GgmlDType::Q8_0,
        }
    }
}

/// A matrix `[rows, cols]` in a type, as what is served of it: groups of few bits are held in Q8_0.
///
/// # Errors
/// [`crate::ZooError::Candle`] when its rows are no whole blocks.
pub fn quantize(kind: Type, values: &[f32], [rows, cols]: [usize; 2]) -> Result<(GgmlDType, Vec<u8>)> {
    if let Type::Grouped(bits) = kind {
        let rounded: Vec<f32> = values.chunks(BLOCK).flat_map(|group| round(group, bits)).collect();
        return Ok((GgmlDType::Q8_0, q8_0(&rounded)));
    }
    let tensor = Tensor::from_slice(values, (rows, cols), &Device::Cpu)?;
    let quantized = QTensor::quantize(&tensor, kind.dtype())?;
    Ok((kind.dtype(), quantized.data()?.into_owned()))
}

/// The nearest of 2ᵇⁱᵗˢ evenly spaced values from the least to the largest.
fn round(group: &[f32], bits: u32) -> Vec<f32> {
    let least = group.iter().copied().fold(f32::INFINITY, f32::min);
    let most = group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let half = |value: f32| f16::from_f32(value).to_f32();
    let steps = ((1u32 << bits) - 1) as f32;
    let (least, step) = (half(least), half((most - least) / steps));
    let inverse = if step > 0.0 { step.recip() } else { 0.0 };
    group.iter().map(|value| least + step * ((value - least) * inverse).round().clamp(0.0, steps)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_rounded_to_evenly_spaced_values() {
        let group: Vec<f32> = (0..32).map(|i| i as f32 / 31.0).collect();
        let rounded = round(&group, 2);
        for (value, rounded) in group.iter().zip(&rounded) {
            assert!((value - rounded).abs() <= 0.5 / 3.0 + 1e-3, "{value} {rounded}");
        }
        let mut distinct = rounded;
        distinct.dedup();
        assert_eq!(distinct.len(), 4);
        assert_eq!([Type::Grouped(2), Type::Q4_0, Type::Q8_0].map(|kind| kind.bytes(64)), [24, 36, 68]);
    }
}
