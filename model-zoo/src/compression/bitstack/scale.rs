//! What the inputs of linear operators are: their second moments, measured while the dense model reads a text.

use std::ops::Range;

use super::Projection;
use crate::compression::Sublayer;
use crate::config::DecoderConfig;
use crate::kernels::cpu::gemm::{Target, View, matmul};
use crate::kernels::cpu::pool::Pool;
use crate::step::{LinearInput, Probe};

/// Columns whose products are summed at once.
const TILE: usize = 128;

impl LinearInput {
    /// All of them, in the order of a forward pass.
    pub const ALL: [Self; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];

    /// The matrices that share it.
    pub fn projections(self) -> &'static [Projection] {
        match self {
            Self::Qkv => &[Projection::Q, Projection::K, Projection::V],
            Self::O => &[Projection::O],
            Self::GateUp => &[Projection::Gate, Projection::Up],
            Self::Down => &[Projection::Down],
        }
    }

    /// Its channels in a decoder of `config`.
    pub fn width(self, config: &DecoderConfig) -> usize {
        self.projections()[0].size(config)[1]
    }
}

/// Sums over the tokens of some layers.
#[derive(Debug)]
pub struct Moments {
    layers: Range<usize>,
    /// Layer by layer, input by input.
    sums: Vec<Sums>,
    pool: Pool,
}

/// Of one input.
#[derive(Debug)]
pub struct Sums {
    /// Its channels.
    pub width: usize,
    /// Σ x·xᵀ, `[width, width]`, the upper half.
    pub products: Vec<f32>,
    /// For each channel, Σ over windows of its norm over the window: the published scale (methods.md §1b, step 1).
    pub norms: Vec<f64>,
    /// Tokens seen.
    pub tokens: usize,
    /// Windows seen.
    pub windows: usize,
}

impl Moments {
    /// Nothing is seen yet of `layers`.
    pub fn new(config: &DecoderConfig, layers: Range<usize>, threads: usize) -> Self {
        let sums = |input: LinearInput| {
            let width = input.width(config);
            Sums { width, products: vec![0.0; width * width], norms: vec![0.0; width], tokens: 0, windows: 0 }
        };
        let sums = layers.clone().flat_map(|_| LinearInput::ALL.map(sums)).collect();
        Self { layers, sums, pool: Pool::new(threads) }
    }

    /// Bytes that one layer takes.
    pub fn bytes_of_layer(config: &DecoderConfig) -> usize {
        LinearInput::ALL.iter().map(|input| 4 * input.width(config).pow(2)).sum()
    }

    /// The sums of `input` of `layer`.
    ///
    /// # Panics
    /// When the layer is none of those looked at.
    pub fn of(&self, layer: usize, input: LinearInput) -> &Sums {
        &self.sums[(layer - self.layers.start) * LinearInput::ALL.len() + input as usize]
    }
}

impl Sums {
    /// Mean second moments, of which the upper half counts.
    pub fn moments(&self) -> Vec<f32> {
        let inverse = 1.0 / self.tokens.max(1) as f32;
        self.products.iter().map(|sum| sum * inverse).collect()
    }

    /// The published scales: the mean over windows of a channel's norm, and a thousandth.
    pub fn published_scale(&self) -> Vec<f32> {
        self.norms.iter().map(|sum| (sum / self.windows.max(1) as f64) as f32 + 1e-3).collect()
    }

    fn add(&mut self, pool: &Pool, x: &[f32]) {
        let width = self.width;
        let tokens = x.len() / width;
        for first in (0..width).step_by(TILE) {
            let rows = TILE.min(width - first);
            let left = View::rows(&x[first..], width).transposed();
            let values = &mut self.products[first * width + first..];
            let target = Target { values, stride: width, add: true };
            matmul(pool, [rows, tokens, width - first], (left, View::rows(&x[first..], width)), target);
        }
        let mut squares = vec![0f64; width];
        for token in x.chunks_exact(width) {
            squares.iter_mut().zip(token).for_each(|(sum, &x)| *sum += f64::from(x).powi(2));
        }
        self.norms.iter_mut().zip(squares).for_each(|(norm, sum)| *norm += sum.sqrt());
        self.tokens += tokens;
        self.windows += 1;
    }
}

impl Probe for Moments {
    fn sublayer(&mut self, _: (usize, Sublayer), _: &[f32], _: &[f32]) {}

    fn attention(&mut self, _: usize, _: &[f32], _: &[f32]) {}

    fn linear_input(&mut self, (layer, input): (usize, LinearInput), x: &[f32]) {
        if self.layers.contains(&layer) {
            let index = (layer - self.layers.start) * LinearInput::ALL.len() + input as usize;
            self.sums[index].add(&self.pool, x);
        }
    }
}
