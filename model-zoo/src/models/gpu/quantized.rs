//! Products with quantized weights, and what comes before and after them.
//!
//! Up to [`QUANTIZED_TOKENS`] tokens take the codes as they are; of more the matrix is made whole in bf16 and multiplied by
//! cuBLASLt, as matrices are that lie so.

use super::{GpuDecoder, Linear};
use crate::Result;
use crate::config::Activation;
use crate::kernels::cuda::device::Part;
use crate::kernels::cuda::ops::{After, Matrix, Norm, Places, Tokens, add_rows, place_rows};
use crate::kernels::cuda::quantized::{Operand, QUANTIZED_TOKENS, Quantized, few, whole};

impl Linear {
    pub(super) fn bias(&self) -> Part {
        self.bias.as_ref().map_or(Part::NONE, Part::all)
    }

    /// Its codes, where it is quantized.
    pub(super) fn quantized(&self) -> Option<Quantized<'_>> {
        match self.operand() {
            Ok(Operand::Quantized(quantized)) => Some(quantized),
            _ => None,
        }
    }
}

impl GpuDecoder {
    /// `linear`, where it is quantized and `tokens` are so few that codes are multiplied.
    pub(super) fn few_quantized<'a>(&self, linear: &'a Linear, tokens: Tokens) -> Option<Quantized<'a>> {
        linear.quantized().filter(|_| tokens.count <= QUANTIZED_TOKENS)
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

    /// The joint Q, K and V product of `norm(x)`, its heads normed and turned, to where it belongs.
    pub(super) fn place_quantized(
        &self,
        qkv: &Quantized<'_>,
        (tokens, norm): (Tokens, Norm),
        (norms, places): (Option<[Norm; 2]>, &Places),
    ) -> Result<()> {
        let input = (self.normed(tokens, norm)?, tokens);
        if norms.is_none() {
            return few(&*self.device, qkv, input, After::Place(*places));
        }
        let wide = Part::all(&self.scratch.wide);
        few(&*self.device, qkv, input, After::Half(wide))?;
        place_rows(&*self.device, (wide, Part::NONE, tokens), norms, places)
    }

    /// `gated = act(gate(norm(x))) · up(norm(x))`
    pub(super) fn gate_quantized(
        &self,
        gate_up: &Quantized<'_>,
        (tokens, norm): (Tokens, Norm),
        (gated, activation): (Part, Activation),
    ) -> Result<()> {
        let normed = self.normed(tokens, norm)?;
        few(&*self.device, gate_up, (normed, tokens), After::Gate(gated, activation))
    }

    /// `x += post(matrix · input)`, summed over the devices that share the model.
    pub(super) fn project_quantized(
        &self,
        matrix: &Quantized<'_>,
        (input, tokens): (Part, Tokens),
        post: Option<Norm>,
    ) -> Result<()> {
        let (device, x) = (&*self.device, Part::all(&self.scratch.x));
        if self.adds_at_once(post.as_ref()) {
            return few(device, matrix, (input, tokens), After::Add(x));
        }
        let width = matrix.rows();
        let sum = Part::all(&self.scratch.sum).slice(0, 4 * tokens.count * width)?;
        few(device, &Quantized { bias: Part::NONE, ..*matrix }, (input, tokens), After::Float(sum))?;
        device.all_reduce(sum)?;
        add_rows(device, (sum, matrix.bias, post), (x, tokens), width)
    }
}
