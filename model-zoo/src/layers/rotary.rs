//! Rotary position embedding (RoFormer, arXiv 2104.09864) with the scalings of longer contexts.

use std::f32::consts::PI;

use crate::config::{RopeConfig, RopeScaling, RopeStyle};

/// The angles' frequencies of one kind of layer.
#[derive(Debug, Clone)]
pub struct Rotary {
    /// Radians a position, `[head_dim / 2]`
    frequencies: Vec<f32>,
    /// Multiplies cos and sin (YaRN's attention factor).
    magnitude: f32,
    style: RopeStyle,
}

/// cos and sin of the positions of a step, `[num_tokens, head_dim / 2]` each.
#[derive(Debug, Default)]
pub struct RotaryTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rotary {
    /// Frequencies of heads of `head_dim` channels.
    pub fn new(config: &RopeConfig, head_dim: usize, style: RopeStyle) -> Self {
        let plain = |j: usize| config.theta.powf(-2.0 * j as f32 / head_dim as f32);
        let half = head_dim / 2;
        let mut magnitude = 1.0;
        let frequencies = match &config.scaling {
            RopeScaling::None => (0..half).map(plain).collect(),
            RopeScaling::Linear { factor } => (0..half).map(|j| plain(j) / factor).collect(),
            RopeScaling::Factors(factors) => {
                (0..half).map(|j| plain(j) / factors.get(j).copied().unwrap_or(1.0)).collect()
            }
            scaling @ RopeScaling::Llama3 { .. } => (0..half).map(|j| llama3(scaling, plain(j))).collect(),
            RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, attention_factor } => {
                magnitude =
                    attention_factor.unwrap_or(if *factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 });
                let bound = |rotations: f32| {
                    head_dim as f32 * (original_max_position / (rotations * 2.0 * PI)).ln()
                        / (2.0 * config.theta.ln())
                };
                let low = bound(*beta_fast).floor().max(0.0);
                let high = bound(*beta_slow).ceil().min(head_dim as f32 - 1.0);
                let width = if high > low { high - low } else { 0.001 };
                let blend = |j: usize| {
                    let interpolated = ((j as f32 - low) / width).clamp(0.0, 1.0);
                    plain(j) * (1.0 - interpolated) + plain(j) / factor * interpolated
                };
                (0..half).map(blend).collect()
            }
        };
        Self { frequencies, magnitude, style }
    }

    /// Radians a position, `[head_dim / 2]`, and what multiplies cos and sin.
    pub fn frequencies(&self) -> (&[f32], f32) {
        (&self.frequencies, self.magnitude)
    }

    /// Fills `table` for tokens at `positions`.
    pub fn fill(&self, positions: &[usize], table: &mut RotaryTable) {
        table.half = self.frequencies.len();
        table.cos.clear();
        table.sin.clear();
        for &position in positions {
            for &frequency in &self.frequencies {
                let (sin, cos) = (position as f32 * frequency).sin_cos();
                table.cos.push(cos * self.magnitude);
                table.sin.push(sin * self.magnitude);
            }
        }
    }

    /// Rotates one head of the table's `token` in place, `[head_dim]`.
    pub fn apply(&self, table: &RotaryTable, token: usize, head: &mut [f32]) {
        let range = token * table.half..(token + 1) * table.half;
        let (cos, sin) = (&table.cos[range.clone()], &table.sin[range]);
        match self.style {
            RopeStyle::Half => {
                let (first, second) = head.split_at_mut(table.half);
                for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                    (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                }
            }
            RopeStyle::Interleaved => {
                for ((pair, c), s) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
                    (pair[0], pair[1]) = (pair[0] * c - pair[1] * s, pair[1] * c + pair[0] * s);
                }
            }
        }
    }
}

/// Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended.
fn llama3(scaling: &RopeScaling, frequency: f32) -> f32 {
    let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } = *scaling
    else {
        return frequency;
    };
    let wavelength = 2.0 * PI / frequency;
    if wavelength < original_max_position / high_freq_factor {
        return frequency;
    }
    if wavelength > original_max_position / low_freq_factor {
        return frequency / factor;
    }
    let kept = (original_max_position / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
    (1.0 - kept) * frequency / factor + kept * frequency
}
