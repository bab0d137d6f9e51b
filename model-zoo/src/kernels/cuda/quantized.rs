//! Quantized weights (GGUF's formats) on a device: how they lie there, and products with them (`quantized.cuh`).

use half::f16;

use super::device::{Device, Part};
use super::ops::{After, Matrix, Norm, Tokens, after_params, need, run};
use super::params::{
    QuantizedMatrixParams, QuantizedParams, QuantizedPartParams, QuantizedWholeParams, SkinnyParams,
};
use crate::kernels::cpu::packed::UnpackedBlock;
use crate::kernels::cpu::quantize::BLOCK;
use crate::weights::GgmlDType;
use crate::{Result, ZooError};

/// Tokens above which a product goes faster with the matrix made whole.
pub const QUANTIZED_TOKENS: usize = 64;

/// Matrices of different formats that a joint one has at most.
const PARTS: usize = 3;
/// Rows and columns of a unit.
const UNIT: [usize; 2] = [16, 64];
/// Bytes of a unit's scales and of its codes' low bits.
const SCALES: usize = 128;
const LOW: usize = 512;
const THREADS: u32 = 256;

/// How weights lie in memory: `WeightFormat` in `quantized.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Format {
    /// 4-bit codes, a scale and a minimum for 32 columns: Q4_0, Q4_1, Q4_K.
    Affine4 = 1,
    /// 6-bit codes, of which five bits are used, a scale and a minimum for 32 columns: Q5_0, Q5_1, Q5_K.
    Affine6,
    /// 6-bit codes, a scale for 16 columns: Q6_K.
    Fine6,
    /// 8-bit codes, a scale for 32 columns: Q8_0.
    Symmetric8,
}

impl Format {
    /// The format that holds `dtype`'s weights as they are, but for scales and minima of `_K` types, which are rounded to
    /// f16; `None` for types that are not quantized or not served so.
    pub fn of(dtype: GgmlDType) -> Option<Self> {
        match dtype {
            GgmlDType::Q4_0 | GgmlDType::Q4_1 | GgmlDType::Q4K => Some(Self::Affine4),
            GgmlDType::Q5_0 | GgmlDType::Q5_1 | GgmlDType::Q5K => Some(Self::Affine6),
            GgmlDType::Q6K => Some(Self::Fine6),
            GgmlDType::Q8_0 => Some(Self::Symmetric8),
            _ => None,
        }
    }

    fn high(self) -> usize {
        match self {
            Self::Affine4 => 0,
            Self::Affine6 | Self::Fine6 => 256,
            Self::Symmetric8 => 512,
        }
    }

    fn unit_bytes(self) -> usize {
        SCALES + LOW + self.high()
    }

    /// Bytes of a matrix.
    pub fn bytes(self, rows: usize, cols: usize) -> usize {
        rows.div_ceil(UNIT[0]) * self.tile_bytes(cols)
    }

    /// Bytes of sixteen rows.
    pub fn tile_bytes(self, cols: usize) -> usize {
        cols.div_ceil(UNIT[1]) * self.unit_bytes()
    }

    /// Puts a block of 32 columns, the `index`-th of its row, where it belongs in the tile that its row is in; the bits
    /// there are zero before. `row` is below 16.
    ///
    /// # Panics
    /// When the tile has no such place.
    pub fn put(self, tile: &mut [u8], (row, index): (usize, usize), block: &UnpackedBlock) {
        let unit = &mut tile[index / 2 * self.unit_bytes()..][..self.unit_bytes()];
        // What makes the lowest code zero. Q5_0's are signed, which has no minimum.
        let middle = match self {
            Self::Affine4 => 0,
            Self::Affine6 => i32::from(block.min == 0.0) * 16,
            Self::Fine6 => 32,
            Self::Symmetric8 => 128,
        };
        let second = match self {
            Self::Affine4 | Self::Affine6 => block.min - middle as f32 * block.scale[0],
            Self::Fine6 => block.scale[1],
            Self::Symmetric8 => 0.0,
        };
        let at = row % 8 * 16 + row / 8 * 8 + index % 2 * 4;
        unit[at..at + 2].copy_from_slice(&f16::from_f32(block.scale[0]).to_le_bytes());
        unit[at + 2..at + 4].copy_from_slice(&f16::from_f32(second).to_le_bytes());
        for (i, &q) in block.q.iter().enumerate() {
            let code = (i32::from(q) + middle) as u32;
            let (group, lane) = (index % 2 * 2 + i % 8 / 4, row % 8 * 4 + i / 8);
            let (pair, upper) = (i % 4 / 2 * 2 + row / 8, i % 2);
            set(unit, SCALES + lane * 16 + group * 4, (code & 15) << (4 * pair + 16 * upper));
            let high = SCALES + LOW;
            match self.high() {
                0 => {}
                256 => {
                    let shift = 2 * (group % 2 * 4 + pair) + 16 * upper;
                    set(unit, high + lane * 8 + group / 2 * 4, (code >> 4) << shift);
                }
                _ => set(unit, high + lane * 16 + group * 4, (code >> 4) << (4 * pair + 16 * upper)),
            }
        }
    }
}

/// Sets bits of the word at `at`.
fn set(bytes: &mut [u8], at: usize, bits: u32) {
    bytes[at..at + 4].iter_mut().zip(bits.to_le_bytes()).for_each(|(byte, bits)| *byte |= bits);
}

/// Rows of a joint matrix in one format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuantizedPart {
    /// How they lie in memory.
    pub format: Format,
    /// How many: a multiple of 16 but for the last part's.
    pub rows: usize,
}

/// A quantized matrix `[rows, cols]`, and its bias in f32.
#[derive(Debug, Clone, Copy)]
pub struct Quantized<'a> {
    /// Tiles of sixteen rows of all parts, one after the other.
    pub units: Part,
    /// Its rows, up to three parts.
    pub parts: &'a [QuantizedPart],
    /// `[rows]`, or [`Part::NONE`].
    pub bias: Part,
    /// Inputs, a multiple of 32.
    pub cols: usize,
}

impl Quantized<'_> {
    /// Outputs.
    pub fn rows(&self) -> usize {
        self.parts.iter().map(|part| part.rows).sum()
    }

    /// As kernels take it, checked.
    pub(super) fn params(&self) -> Result<QuantizedMatrixParams> {
        let whole = |parts: &[QuantizedPart]| {
            parts.split_last().is_some_and(|(_, first)| first.iter().all(|p| p.rows.is_multiple_of(UNIT[0])))
        };
        if self.parts.len() > PARTS
            || !whole(self.parts)
            || !self.cols.is_multiple_of(BLOCK)
            || self.cols == 0
        {
            return Err(ZooError::Device(format!("no kernel for quantized weights {self:?}")));
        }
        let mut params: QuantizedMatrixParams = bytemuck::Zeroable::zeroed();
        params.count = self.parts.len() as u32;
        let (mut row, mut bytes) = (0, 0);
        for (params, part) in params.parts.iter_mut().zip(self.parts) {
            let len = part.format.bytes(part.rows, self.cols);
            *params = QuantizedPartParams {
                units: self.units.slice(bytes, len)?.pointer(),
                first_row: row as u32,
                format: part.format as u32,
            };
            row += part.rows;
            bytes += len;
        }
        Ok(params)
    }

    /// What kernels of few tokens are told beside [`Quantized::params`], checked: of `x` normed, f32 rows of the step, or of
    /// dense bf16 rows.
    pub(super) fn skinny(
        &self,
        (x, tokens, norm): (Part, Tokens, Option<Norm>),
        after: After,
    ) -> Result<SkinnyParams> {
        if norm.is_none() {
            need("x", x, 2 * tokens.count * self.cols)?;
        }
        Ok(SkinnyParams {
            x: x.pointer(),
            norm: norm.map_or(0, |norm| norm.weight.pointer()),
            eps: norm.map_or(0.0, |norm| norm.eps),
            cols: self.cols as u32,
            ..after_params((self.rows(), self.bias), tokens, after)?
        })
    }
}

/// A weight matrix in one of the forms that joint steps and embeddings take.
#[derive(Debug, Clone, Copy)]
pub enum Operand<'a> {
    /// In bf16.
    Dense(Matrix),
    /// In codes.
    Quantized(Quantized<'a>),
}

impl Operand<'_> {
    /// The same without its bias.
    pub fn without_bias(mut self) -> Self {
        match &mut self {
            Self::Dense(matrix) => matrix.bias = Part::NONE,
            Self::Quantized(matrix) => matrix.bias = Part::NONE,
        }
        self
    }

    /// The memory and the number of the format of a matrix that is all of one.
    pub(super) fn table(&self) -> Result<(Part, u32)> {
        match self {
            Self::Dense(matrix) => Ok((matrix.weight, 0)),
            Self::Quantized(Quantized { units, parts: [part], .. }) => Ok((*units, part.format as u32)),
            Self::Quantized(matrix) => {
                Err(ZooError::Device(format!("embeddings of several formats: {matrix:?}")))
            }
        }
    }
}

/// The product of `matrix` with dense bf16 rows `x` of up to some hundreds of tokens; then `after`.
///
/// # Errors
/// [`ZooError::Device`].
pub fn few(
    device: &dyn Device,
    matrix: &Quantized<'_>,
    (x, tokens): (Part, Tokens),
    after: After,
) -> Result<()> {
    let after_kind = match after {
        After::Float(_) => 0,
        After::Half(_) => 1,
        After::Add(_) => 2,
        After::Gate(..) => 3,
        After::Place(_) => 4,
    };
    let params = QuantizedParams {
        skinny: matrix.skinny((x, tokens, None), after)?,
        matrix: matrix.params()?,
        after: after_kind,
        pad: 0,
    };
    let (kernel, tile) = if tokens.count <= 8 { ("quantized_8", 8) } else { ("quantized_32", 32) };
    // Sums of eight warps, twenty floats a token.
    let shared = 4 * 8 * tile * 20;
    let grid = [tokens.count.div_ceil(tile) as u32, matrix.rows().div_ceil(UNIT[0]) as u32, 1];
    run(device, (kernel, THREADS, shared), grid, &params)
}

/// `matrix` in bf16, `[rows, cols]`, to `out`.
///
/// # Errors
/// [`ZooError::Device`].
pub fn whole(device: &dyn Device, matrix: &Quantized<'_>, out: Part) -> Result<()> {
    let rows = matrix.rows();
    need("matrix", out, 2 * rows * matrix.cols)?;
    let params = QuantizedWholeParams {
        out: out.pointer(),
        rows: rows as u32,
        cols: matrix.cols as u32,
        matrix: matrix.params()?,
    };
    let units = matrix.cols.div_ceil(UNIT[1]);
    let grid = [units.div_ceil(8) as u32, rows.div_ceil(UNIT[0]) as u32, 1];
    run(device, ("quantized_whole", THREADS, 0), grid, &params)
}
