//! Products with matrices in one piece, in bf16 or in codes, and these made whole.
//!
//! Few tokens are multiplied, and what follows is done, by one kernel: up to [`SKINNY_TOKENS`] with weights in bf16, up to
//! [`QUANTIZED_TOKENS`] with codes. Of more a quantized matrix is made whole in bf16 and multiplied by cuBLASLt, as matrices
//! are that lie so.

use super::{GpuDecoder, Linear, Weight};
use crate::Result;
use crate::kernels::cuda::device::Part;
use crate::kernels::cuda::ops::{After, Matrix, Norm, SKINNY_TOKENS, Tokens, skinny};
use crate::kernels::cuda::quantized::{Operand, QUANTIZED_TOKENS, few, whole};

impl Linear {
    pub(super) fn bias(&self) -> Part {
        self.bias.as_ref().map_or(Part::NONE, Part::all)
    }

    pub(super) fn is_quantized(&self) -> bool {
        matches!(self.weight, Weight::Quantized { .. })
    }

    /// Whether so many tokens are few.
    pub(super) fn are_few(&self, tokens: Tokens) -> bool {
        tokens.count <= if self.is_quantized() { QUANTIZED_TOKENS } else { SKINNY_TOKENS }
    }
}

impl GpuDecoder {
    /// The product of `matrix` with few tokens, of the stream where it is normed or else of dense rows, and what follows.
    pub(super) fn few(
        &self,
        matrix: &Operand<'_>,
        (x, tokens, norm): (Part, Tokens, Option<Norm>),
        after: After,
    ) -> Result<()> {
        match (matrix, norm) {
            (Operand::Dense(matrix), _) => skinny(&*self.device, matrix, (x, tokens, norm), after),
            (Operand::Quantized(matrix), Some(norm)) => {
                few(&*self.device, matrix, (self.normed(tokens, norm)?, tokens), after)
            }
            (Operand::Quantized(matrix), None) => few(&*self.device, matrix, (x, tokens), after),
        }
    }

    /// `linear` in bf16: itself, or in scratch memory until the next one is made whole.
    pub(super) fn whole(&self, linear: &Linear) -> Result<Matrix> {
        match linear.operand()? {
            Operand::Dense(matrix) => Ok(matrix),
            Operand::Quantized(quantized) => {
                let weight = Part::all(&self.scratch.whole);
                whole(&*self.device, &quantized, weight)?;
                Ok(Matrix { weight, bias: quantized.bias, rows: linear.rows, cols: linear.cols })
            }
        }
    }
}
