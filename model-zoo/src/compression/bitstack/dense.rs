//! An artefact's prefix as dense weights: what a stack says, in the plainest form, for measurements and tests.

use std::borrow::Cow;

use candle_core::quantized::GgmlDType;

use super::avd::add_level;
use super::{Artefact, Block, LinearId, Shape};
use crate::Result;
use crate::kernels::cpu::quantize::BLOCK;
use crate::weights::merged::q8_0;
use crate::weights::{RawTensor, WeightSource};

/// The sum of some levels of a matrix, `[rows, cols]`.
pub fn sum_of<'a>(blocks: impl IntoIterator<Item = &'a Block>, shape: Shape) -> Vec<f32> {
    let mut values = vec![0f32; shape.rows * shape.cols];
    blocks.into_iter().for_each(|block| add_level(&mut values, shape, (block, 1.0)));
    values
}

/// A matrix in Q8_0, which is as good as dense beside a stack's own errors and runs on the fast kernels; in f32 where
/// its width is none of whole blocks.
pub fn eight_bit(values: &[f32], [rows, cols]: [usize; 2]) -> RawTensor<'static> {
    let (dtype, data) = if cols.is_multiple_of(BLOCK) {
        (GgmlDType::Q8_0, q8_0(values))
    } else {
        (GgmlDType::F32, bytemuck::cast_slice(values).to_vec())
    };
    RawTensor { dtype, shape: vec![rows, cols], data: Cow::Owned(data) }
}

/// The base and the first blocks of the stack, reconstructed as they are read, in f32.
#[derive(Debug, Clone, Copy)]
pub struct Prefix<'a> {
    artefact: &'a Artefact,
    blocks: usize,
}

impl<'a> Prefix<'a> {
    /// The first `blocks` of the stack over the base.
    pub fn new(artefact: &'a Artefact, blocks: usize) -> Self {
        Self { artefact, blocks: blocks.min(artefact.stack().len()) }
    }

    fn linear(&self, name: &str) -> Option<LinearId> {
        LinearId::of_weight(name).filter(|linear| linear.layer < self.artefact.config().num_layers)
    }

    /// A matrix's values, `[rows, cols]`.
    ///
    /// # Errors
    /// As [`Artefact::read_block`].
    pub fn matrix(&self, linear: LinearId) -> Result<Vec<f32>> {
        let shape = self.artefact.shape(linear);
        let mut values = vec![0f32; shape.rows * shape.cols];
        let held = self.artefact.base().iter().chain(&self.artefact.stack()[..self.blocks]);
        for entry in held.filter(|entry| entry.linear == linear) {
            add_level(&mut values, shape, (&self.artefact.read_block(entry)?, 1.0));
        }
        Ok(values)
    }
}

impl WeightSource for Prefix<'_> {
    fn contains(&self, name: &str) -> bool {
        self.linear(name).is_some() || self.artefact.tensors().contains(name)
    }

    fn tensor(&self, name: &str) -> Result<RawTensor<'_>> {
        let Some(linear) = self.linear(name) else {
            return Ok(self.artefact.tensors().tensor(name)?.owned());
        };
        let shape = self.artefact.shape(linear);
        let data = bytemuck::cast_slice(&self.matrix(linear)?).to_vec();
        Ok(RawTensor { dtype: GgmlDType::F32, shape: vec![shape.rows, shape.cols], data: Cow::Owned(data) })
    }
}

/// A prefix in Q8_0.
#[derive(Debug, Clone, Copy)]
pub struct EightBit<'a>(Prefix<'a>);

impl<'a> EightBit<'a> {
    /// The first `blocks` of the stack over the base.
    pub fn new(artefact: &'a Artefact, blocks: usize) -> Self {
        Self(Prefix::new(artefact, blocks))
    }
}

impl WeightSource for EightBit<'_> {
    fn contains(&self, name: &str) -> bool {
        self.0.contains(name)
    }

    fn tensor(&self, name: &str) -> Result<RawTensor<'_>> {
        match self.0.linear(name) {
            Some(linear) => {
                let shape = self.0.artefact.shape(linear);
                Ok(eight_bit(&self.0.matrix(linear)?, [shape.rows, shape.cols]))
            }
            None => self.0.tensor(name),
        }
    }
}
