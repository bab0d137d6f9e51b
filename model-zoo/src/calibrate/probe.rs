//! What calibration sees of a forward pass.

use crate::compression::Sublayer;
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::vector::cosine;
use crate::models::ModelDims;
use crate::step::Probe;

/// Last queries of a window that score key channels (ThinK's observation window).
const OBSERVED: usize = 32;
/// Share of the channels whose score is reported.
const KEPT: f64 = 0.6;

/// Sums over all windows.
#[derive(Debug)]
pub(super) struct Measured {
    hidden_size: usize,
    heads: (usize, usize),
    head_dim: usize,
    /// `[attention, ffn][layer]`: Σ cosine.
    cosines: [Vec<f64>; 2],
    tokens: [Vec<u64>; 2],
    /// `[layer]`: Σ over windows of the share of the score that the best channels hold.
    kept: Vec<f64>,
    windows: Vec<u64>,
}

impl Measured {
    pub(super) fn new(dims: &ModelDims) -> Self {
        let layers = dims.num_layers;
        Self {
            hidden_size: dims.hidden_size,
            heads: (dims.num_heads, dims.num_kv_heads),
            head_dim: dims.head_dim,
            cosines: [vec![0.0; layers], vec![0.0; layers]],
            tokens: [vec![0; layers], vec![0; layers]],
            kept: vec![0.0; layers],
            windows: vec![0; layers],
        }
    }

    /// `[layer]`: mean cosine of the stream before and after the sublayer.
    pub(super) fn similarity(&self, sublayer: Sublayer) -> Vec<f64> {
        let (sums, counts) = (&self.cosines[sublayer as usize], &self.tokens[sublayer as usize]);
        sums.iter().zip(counts).map(|(sum, &count)| rounded(sum / count.max(1) as f64)).collect()
    }

    /// `[layer]`: mean share of the score that the best channels hold.
    pub(super) fn kept_score(&self) -> Vec<f64> {
        self.kept.iter().zip(&self.windows).map(|(sum, &count)| rounded(sum / count.max(1) as f64)).collect()
    }

    /// Share of Σ_j ‖q_j‖²‖k_j‖² that the best channels of one KV head hold; queries by group mean.
    fn kept_share(&self, kv_head: usize, queries: &[f32], keys: &[f32]) -> f64 {
        let (num_heads, num_kv_heads) = self.heads;
        let (d, group) = (self.head_dim, num_heads / num_kv_heads);
        let mut scores: Vec<f64> = (0..d)
            .map(|channel| {
                let q = queries.chunks_exact(num_heads * d).rev().take(OBSERVED).map(|heads| {
                    let of_group = (0..group).map(|g| heads[(kv_head * group + g) * d + channel]);
                    of_group.map(|q| f64::from(q).powi(2)).sum::<f64>() / group as f64
                });
                let k = keys
                    .chunks_exact(num_kv_heads * d)
                    .map(|heads| f64::from(heads[kv_head * d + channel]).powi(2));
                q.sum::<f64>() * k.sum::<f64>()
            })
            .collect();
        scores.sort_by(|a, b| b.total_cmp(a));
        let kept = (KEPT * d as f64).round() as usize;
        scores[..kept].iter().sum::<f64>() / scores.iter().sum::<f64>().max(f64::MIN_POSITIVE)
    }
}

impl Probe for Measured {
    fn sublayer(&mut self, (layer, sublayer): (usize, Sublayer), before: &[f32], after: &[f32]) {
        let isa = Isa::detect();
        let half = sublayer as usize;
        for (before, after) in before.chunks_exact(self.hidden_size).zip(after.chunks_exact(self.hidden_size))
        {
            self.cosines[half][layer] += f64::from(cosine(isa, before, after));
            self.tokens[half][layer] += 1;
        }
    }

    fn attention(&mut self, layer: usize, queries: &[f32], keys: &[f32]) {
        let heads = self.heads.1;
        let shares = (0..heads).map(|head| self.kept_share(head, queries, keys));
        self.kept[layer] += shares.sum::<f64>() / heads as f64;
        self.windows[layer] += 1;
    }
}

/// To six digits: what repeats from machine to machine.
pub(super) fn rounded(x: f64) -> f64 {
    (x * 1e6).round() / 1e6
}
