//! Products with weights in levels, and what comes before and after them.
//!
//! Up to [`STACK_TOKENS`] tokens are one product, whatever levels each of them uses. Of more, long runs of tokens that use
//! the same levels of a matrix have it made whole and multiplied by cuBLASLt; those between are taken as few.

use std::ops::Range;

use super::levels::{Joint, Levels};
use super::{GpuDecoder, Weight};
use crate::Result;
use crate::config::Activation;
use crate::kernels::cuda::device::{Output, Part};
use crate::kernels::cuda::ops::{
    After, Matrix, Norm, Places, Tokens, activate_rows, add_rows, place_rows, product, rms_norm,
};
use crate::kernels::cuda::stack::{Input, STACK_TOKENS, few, whole};

/// Tokens that are computed together.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Tile {
    /// Each with its own levels.
    Few(Range<usize>),
    /// All with those of so many blocks.
    Many(Range<usize>, u32),
}

/// Cuts tokens into tiles by the blocks that each uses.
fn tiles(blocks: &[u32]) -> Vec<Tile> {
    let mut tiles: Vec<Tile> = Vec::new();
    let mut start = 0;
    for run in blocks.chunk_by(|a, b| a == b) {
        let end = start + run.len();
        if run.len() > STACK_TOKENS {
            tiles.push(Tile::Many(start..end, run[0]));
        } else {
            match tiles.last_mut() {
                Some(Tile::Few(range)) if end - range.start <= STACK_TOKENS => range.end = end,
                _ => tiles.push(Tile::Few(start..end)),
            }
        }
        start = end;
    }
    tiles
}

/// A matrix in levels as a product takes it.
#[derive(Debug, Clone, Copy)]
pub(super) struct InLevels<'a> {
    levels: &'a Levels,
    joint: &'a Joint,
    /// `[rows]`, or [`Part::NONE`].
    bias: Part,
}

impl GpuDecoder {
    /// `linear`, where it comes in levels.
    pub(super) fn in_levels<'a>(&'a self, linear: &'a super::Linear) -> Option<InLevels<'a>> {
        let Weight::Levels(joint) = &linear.weight else { return None };
        Some(InLevels { levels: self.levels.as_ref()?, joint, bias: linear.bias() })
    }

    /// The joint Q, K and V product of `norm(x)`, its heads normed and turned, to where it belongs.
    pub(super) fn place_by_levels(
        &self,
        qkv: InLevels<'_>,
        (tokens, norm): (Tokens, Norm),
        (norms, places): (Option<[Norm; 2]>, &Places),
    ) -> Result<()> {
        let normed = self.normed(tokens, norm)?;
        if tokens.count <= STACK_TOKENS && norms.is_none() {
            return self.few_by_levels(qkv, (normed, tokens), After::Place(*places));
        }
        let wide = Part::all(&self.scratch.wide);
        self.product_by_levels(qkv, (normed, tokens), (wide, Output::Half))?;
        place_rows(&*self.device, (wide, qkv.bias, tokens), norms, places)
    }

    /// `gated = act(gate(norm(x))) · up(norm(x))`
    pub(super) fn gate_by_levels(
        &self,
        gate_up: InLevels<'_>,
        (tokens, norm): (Tokens, Norm),
        (gated, activation): (Part, Activation),
    ) -> Result<()> {
        let normed = self.normed(tokens, norm)?;
        if tokens.count <= STACK_TOKENS {
            return self.few_by_levels(gate_up, (normed, tokens), After::Gate(gated, activation));
        }
        let wide = Part::all(&self.scratch.wide);
        self.product_by_levels(gate_up, (normed, tokens), (wide, Output::Half))?;
        let width = gate_up.joint.product(Part::NONE).rows() / 2;
        activate_rows(&*self.device, (wide, gate_up.bias), (gated, tokens, width), activation)
    }

    /// `x += post(matrix · input)`
    pub(super) fn project_by_levels(
        &self,
        matrix: InLevels<'_>,
        (input, tokens): (Part, Tokens),
        post: Option<Norm>,
    ) -> Result<()> {
        let x = Part::all(&self.scratch.x);
        if tokens.count <= STACK_TOKENS && post.is_none() {
            return self.few_by_levels(matrix, (input, tokens), After::Add(x));
        }
        let (sum, width) = (Part::all(&self.scratch.sum), matrix.joint.product(Part::NONE).rows());
        self.product_by_levels(matrix, (input, tokens), (sum, Output::Float))?;
        add_rows(&*self.device, (sum, matrix.bias, post), (x, tokens), width)
    }

    pub(super) fn normed(&self, tokens: Tokens, norm: Norm) -> Result<Part> {
        let normed = Part::all(&self.scratch.normed);
        rms_norm(&*self.device, (Part::all(&self.scratch.x), tokens), norm, normed)?;
        Ok(normed)
    }

    fn few_by_levels(&self, matrix: InLevels<'_>, (x, tokens): (Part, Tokens), after: After) -> Result<()> {
        let input = Input { x, tokens, blocks: matrix.levels.blocks()? };
        let sums = Part::all(&matrix.levels.scratch.sums);
        few(&*self.device, &matrix.joint.product(matrix.bias), input, (sums, after))
    }

    /// `out = matrix · x` without its bias, bf16 or f32, of any number of tokens.
    fn product_by_levels(
        &self,
        matrix: InLevels<'_>,
        (x, tokens): (Part, Tokens),
        (out, output): (Part, Output),
    ) -> Result<()> {
        let stack = matrix.joint.product(Part::NONE);
        let (rows, cols) = (stack.rows(), stack.cols);
        let services = matrix.levels.services();
        let own: Vec<u32> = match self.tables.list(tokens.index) {
            Some(list) => list.iter().map(|&token| services[token as usize]).collect(),
            None => services[..tokens.count].to_vec(),
        };
        let own: Vec<u32> = own.into_iter().map(|blocks| matrix.joint.effective(blocks)).collect();
        let size = if output == Output::Half { 2 } else { 4 };
        for tile in tiles(&own) {
            let (Tile::Few(range) | Tile::Many(range, _)) = &tile;
            let x = x.slice(2 * range.start * cols, 2 * range.len() * cols)?;
            let out = out.slice(size * range.start * rows, size * range.len() * rows)?;
            if let Tile::Many(_, blocks) = tile {
                let weight = Part::all(&matrix.levels.scratch.whole);
                whole(&*self.device, &stack, blocks, weight)?;
                let whole = Matrix { weight, bias: Part::NONE, rows, cols };
                product(&*self.device, &whole, (x, range.len()), (out, output))?;
                continue;
            }
            let words = |words: Part| words.slice(4 * range.start, 4 * range.len());
            let blocks = matrix.levels.blocks()?;
            let (index, blocks) = match tokens.index.is_empty() {
                true => (Part::NONE, words(blocks)?),
                false => (words(tokens.index)?, blocks),
            };
            let input = Input { x, tokens: Tokens { count: range.len(), index, skips: None }, blocks };
            let after = if output == Output::Half { After::Half(out) } else { After::Float(out) };
            few(&*self.device, &stack, input, (Part::all(&matrix.levels.scratch.sums), after))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_runs_of_the_same_levels_are_taken_whole_and_what_is_between_as_few() {
        let runs = |lens: &[usize]| -> Vec<u32> {
            lens.iter().enumerate().flat_map(|(i, &len)| std::iter::repeat_n(i as u32, len)).collect()
        };
        assert_eq!(tiles(&[]), []);
        assert_eq!(tiles(&runs(&[5, 27])), [Tile::Few(0..32)]);
        assert_eq!(tiles(&runs(&[5, 28])), [Tile::Few(0..5), Tile::Few(5..33)]);
        assert_eq!(tiles(&runs(&[33])), [Tile::Many(0..33, 0)]);
        let expected = [
            Tile::Few(0..5),
            Tile::Many(5..45, 2),
            Tile::Few(45..77),
            Tile::Few(77..78),
            Tile::Many(78..140, 5),
        ];
        assert_eq!(tiles(&runs(&[1, 4, 40, 32, 1, 62])), expected);
    }
}
