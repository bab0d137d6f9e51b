//! The tiny Llama in plain loops with whole attention matrices, in which dropping a token means that nobody sees it any
//! more: no slot moves, no row is left out, every token keeps its position.

use std::collections::HashMap;
use std::path::Path;

use candle_core::Device;
use half::f16;
use model_zoo::compression::must_drop::filter::{Gaze, VisualFilter};

const HIDDEN: usize = 64;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 16;
const EPS: f32 = 1e-5;
const THETA: f32 = 10000.0;

pub(crate) struct Oracle {
    weights: HashMap<String, Vec<f32>>,
    layers: usize,
}

/// `[layer][token]`: whether other tokens see it there.
pub(crate) type Seen = Vec<Vec<bool>>;

impl Oracle {
    pub(crate) fn open(folder: &Path, layers: usize) -> Self {
        let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
        let values = |tensor: &candle_core::Tensor| tensor.flatten_all().unwrap().to_vec1().unwrap();
        Self {
            weights: tensors.iter().map(|(name, tensor)| (name.clone(), values(tensor))).collect(),
            layers,
        }
    }

    pub(crate) fn embedding(&self, token: u32) -> Vec<f32> {
        self.weights["model.embed_tokens.weight"][token as usize * HIDDEN..][..HIDDEN].to_vec()
    }

    /// What the filter leaves of a prompt, layer by layer: what each layer sees while it is computed, and what went on to
    /// the end.
    pub(crate) fn filtered(
        &self,
        prompt: &[Vec<f32>],
        absent: &[usize],
        filter: &VisualFilter,
    ) -> (Seen, Vec<bool>) {
        let mut alive: Vec<bool> = (0..prompt.len()).map(|token| !absent.contains(&token)).collect();
        let mut seen = Vec::new();
        let mut x: Vec<Vec<f32>> = prompt.to_vec();
        for layer in 0..self.layers {
            seen.push(alive.clone());
            let here = alive.clone();
            let matrix = self.layer(layer, &mut x, &|_, key| here[key]);
            let Some(point) = filter.point(layer) else { continue };
            for image in &filter.images {
                let tokens: Vec<usize> = image.range.clone().filter(|&token| here[token]).collect();
                let is_text = |token: &usize| !filter.images.iter().any(|image| image.range.contains(token));
                let text: Vec<usize> = (image.range.end..prompt.len()).filter(is_text).collect();
                let looks =
                    |token| text.iter().map(|&query| mean_of(&matrix, query, token)).collect::<Vec<_>>();
                let sums: Vec<f32> = tokens.iter().map(|&token| looks(token).iter().sum()).collect();
                let maxima: Vec<f32> =
                    tokens.iter().map(|&token| looks(token).into_iter().fold(0.0, f32::max)).collect();
                let kept = filter.select(point, (image, &tokens), Gaze { sums: &sums, maxima: &maxima });
                tokens.iter().zip(kept).for_each(|(&token, kept)| alive[token] = kept);
            }
        }
        (seen, alive)
    }

    /// Logits of the tokens from `first` on, where token `query` sees `key` in `layer` if `sees(layer, query, key)`.
    pub(crate) fn logits(
        &self,
        inputs: &[Vec<f32>],
        first: usize,
        sees: &dyn Fn(usize, usize, usize) -> bool,
    ) -> Vec<Vec<f32>> {
        let mut x: Vec<Vec<f32>> = inputs.to_vec();
        for layer in 0..self.layers {
            self.layer(layer, &mut x, &|query, key| sees(layer, query, key));
        }
        let head = &self.weights["model.embed_tokens.weight"];
        x[first..].iter().map(|x| linear(&norm(x, &self.weights["model.norm.weight"]), head)).collect()
    }

    /// Runs a layer over all tokens and returns its attention, `[head][query][key]`.
    fn layer(
        &self,
        layer: usize,
        x: &mut [Vec<f32>],
        sees: &dyn Fn(usize, usize) -> bool,
    ) -> Vec<Vec<Vec<f32>>> {
        let weight = |part: &str| &self.weights[&format!("model.layers.{layer}.{part}.weight")];
        let normed: Vec<Vec<f32>> = x.iter().map(|x| norm(x, weight("input_layernorm"))).collect();
        let project = |part: &str| normed.iter().map(|x| linear(x, weight(part))).collect::<Vec<_>>();
        let (mut q, mut k, v) =
            (project("self_attn.q_proj"), project("self_attn.k_proj"), project("self_attn.v_proj"));
        for position in 0..x.len() {
            rotate(&mut q[position], position);
            rotate(&mut k[position], position);
        }
        // As the pages hold them.
        let [k, v] = [k, v].map(|rows| {
            rows.into_iter()
                .map(|row| row.into_iter().map(|v| f16::from_f32(v).to_f32()).collect())
                .collect::<Vec<Vec<f32>>>()
        });
        let mut matrix = vec![vec![vec![0f32; x.len()]; x.len()]; HEADS];
        for query in 0..x.len() {
            let mut mixed = vec![0f32; HEADS * DIM];
            for head in 0..HEADS {
                let kv = head * KV_HEADS / HEADS * DIM;
                let score = |key: usize| {
                    let products = q[query][head * DIM..][..DIM].iter().zip(&k[key][kv..kv + DIM]);
                    products.map(|(q, k)| q * k).sum::<f32>() / (DIM as f32).sqrt()
                };
                // A token sees itself, dropped or not: what becomes of a dropped one nobody sees.
                let keys: Vec<usize> = (0..=query).filter(|&key| key == query || sees(query, key)).collect();
                let exps: Vec<f64> = keys.iter().map(|&key| f64::from(score(key)).exp()).collect();
                let total: f64 = exps.iter().sum();
                for (&key, e) in keys.iter().zip(exps) {
                    let p = (e / total) as f32;
                    matrix[head][query][key] = p;
                    mixed[head * DIM..][..DIM].iter_mut().zip(&v[key][kv..]).for_each(|(m, v)| *m += p * v);
                }
            }
            add(&mut x[query], &linear(&mixed, weight("self_attn.o_proj")));
        }
        for x in x.iter_mut() {
            let normed = norm(x, weight("post_attention_layernorm"));
            let (gate, up) =
                (linear(&normed, weight("mlp.gate_proj")), linear(&normed, weight("mlp.up_proj")));
            let inner: Vec<f32> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            add(x, &linear(&inner, weight("mlp.down_proj")));
        }
        matrix
    }
}

fn mean_of(matrix: &[Vec<Vec<f32>>], query: usize, key: usize) -> f32 {
    matrix.iter().map(|head| head[query][key]).sum::<f32>() / matrix.len() as f32
}

fn norm(x: &[f32], weight: &[f32]) -> Vec<f32> {
    let scale = (x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32 + EPS).sqrt().recip();
    x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
}

fn linear(x: &[f32], weight: &[f32]) -> Vec<f32> {
    weight.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// RoPE on the halves of every head, as Hugging Face lays them.
fn rotate(heads: &mut [f32], position: usize) {
    for head in heads.chunks_exact_mut(DIM) {
        for i in 0..DIM / 2 {
            let angle = position as f32 * THETA.powf(-2.0 * i as f32 / DIM as f32);
            let (a, b) = (head[i], head[i + DIM / 2]);
            head[i] = a * angle.cos() - b * angle.sin();
            head[i + DIM / 2] = b * angle.cos() + a * angle.sin();
        }
    }
}
