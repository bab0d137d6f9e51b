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

/// What was seen of the inputs of some layers.
#[derive(Debug)]
pub struct Measured {
    layers: Range<usize>,
    /// Layer by layer, input by input.
    sums: Vec<Sums>,
}

/// Sums up what it is shown.
#[derive(Debug)]
pub struct Moments {
    measured: Measured,
    threads: usize,
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
        Self { measured: Measured { layers, sums }, threads }
    }

    /// What was seen.
    pub fn into_measured(self) -> Measured {
        self.measured
    }

    /// Bytes that one layer takes.
    pub fn bytes_of_layer(config: &DecoderConfig) -> usize {
        LinearInput::ALL.iter().map(|input| 4 * input.width(config).pow(2)).sum()
    }
}

impl Measured {
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

    /// Adds a window. Who computes a tile does not change what it is.
    fn add(&mut self, threads: usize, x: &[f32]) {
        let width = self.width;
        let tokens = x.len() / width;
        let mut shares: Vec<Vec<_>> = (0..threads.max(1)).map(|_| Vec::new()).collect();
        for (index, tile) in self.products.chunks_mut(TILE * width).enumerate() {
            shares[index % threads.max(1)].push((index * TILE, tile));
        }
        std::thread::scope(|scope| {
            for share in shares {
                scope.spawn(move || share.into_iter().for_each(|tile| add_tile(tile, x, [tokens, width])));
            }
        });
        let mut squares = vec![0f64; width];
        for token in x.chunks_exact(width) {
            squares.iter_mut().zip(token).for_each(|(sum, &x)| *sum += f64::from(x).powi(2));
        }
        self.norms.iter_mut().zip(squares).for_each(|(norm, sum)| *norm += sum.sqrt());
        self.tokens += tokens;
        self.windows += 1;
    }
}

/// Adds the products of the channels from `first` on, as many as the tile has rows, with those not before them.
fn add_tile((first, tile): (usize, &mut [f32]), x: &[f32], [tokens, width]: [usize; 2]) {
    let rows = tile.len() / width;
    let left = View::rows(&x[first..], width).transposed();
    let target = Target { values: &mut tile[first..], stride: width, add: true };
    matmul(&Pool::new(1), [rows, tokens, width - first], (left, View::rows(&x[first..], width)), target);
}

impl Probe for Moments {
    fn sublayer(&mut self, _: (usize, Sublayer), _: &[f32], _: &[f32]) {}

    fn attention(&mut self, _: usize, _: &[f32], _: &[f32]) {}

    fn linear_input(&mut self, (layer, input): (usize, LinearInput), x: &[f32]) {
        let Measured { layers, sums } = &mut self.measured;
        if layers.contains(&layer) {
            sums[(layer - layers.start) * LinearInput::ALL.len() + input as usize].add(self.threads, x);
        }
    }
}
