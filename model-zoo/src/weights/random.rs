//! Weights of a model's shape that were never trained: for measurements of speed.

use std::borrow::Cow;

use candle_core::quantized::GgmlDType;
use half::{bf16, f16};

use super::blocks::BlockFormat;
use super::{RawTensor, WeightSource};
use crate::config::{Activation, DecoderConfig, RopeConfig, RopeScaling, RopeStyle};
use crate::{Result, ZooError};

/// Values that repeat: large beside any cache.
const BLOCK: usize = (16 << 20) + 7;

/// The sizes of a plain Llama.
#[derive(Debug, Clone, Copy)]
pub struct LlamaShape {
    /// Channels of the residual stream.
    pub hidden: usize,
    /// Channels of the FFN.
    pub ffn: usize,
    /// Layers.
    pub layers: usize,
    /// Query and KV heads.
    pub heads: [usize; 2],
    /// Channels of a head.
    pub head_dim: usize,
    /// Tokens.
    pub vocab: usize,
    /// Whether the head is the embedding.
    pub tied: bool,
}

impl LlamaShape {
    /// A model of these sizes, of 8,192 positions.
    pub fn config(&self) -> DecoderConfig {
        DecoderConfig {
            architecture: "llama".into(),
            hidden_size: self.hidden,
            intermediate_size: self.ffn,
            num_layers: self.layers,
            num_heads: self.heads[0],
            num_kv_heads: self.heads[1],
            head_dim: self.head_dim,
            vocab_size: self.vocab,
            max_context: 8192,
            rms_norm_eps: 1e-5,
            rope: RopeConfig { theta: 500_000.0, scaling: RopeScaling::None },
            rope_style: RopeStyle::Half,
            sliding_window: None,
            activation: Activation::Silu,
            qk_norm: false,
            sandwich_norms: false,
            norm_offset: 0.0,
            embedding_scale: 1.0,
            attention_scale: 1.0 / (self.head_dim as f32).sqrt(),
            tie_word_embeddings: self.tied,
        }
    }
}

/// Noise in the shapes of a decoder without biases, bf16 or quantized; norms are 1.
#[derive(Debug)]
pub struct RandomWeights {
    config: DecoderConfig,
    noise: Vec<u16>,
    /// What matrices are quantized to, where their columns are whole blocks of it.
    quantized: Option<GgmlDType>,
}

impl RandomWeights {
    /// Noise from `-scale` to `scale`, the same each time.
    pub fn of(config: &DecoderConfig, scale: f32) -> Self {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let value = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
            bf16::from_f32(value * scale).to_bits()
        };
        Self { config: config.clone(), noise: (0..BLOCK).map(|_| next()).collect(), quantized: None }
    }

    /// The same with matrices of random codes of this type, or in bf16 where it is not served or their columns are not
    /// whole blocks of it.
    pub fn quantized(self, dtype: GgmlDType) -> Self {
        Self { quantized: Some(dtype), ..self }
    }

    /// Random codes of a matrix; its scales and minima are so small that no value is out of proportion.
    fn codes(&self, dtype: GgmlDType, shape: &[usize]) -> Option<Vec<u8>> {
        let [rows, cols] = *shape else { return None };
        let format = BlockFormat::of(dtype).filter(|format| cols.is_multiple_of(format.stored_columns()))?;
        let noise: &[u8] = bytemuck::cast_slice(&self.noise);
        let mut data: Vec<u8> = noise.iter().copied().cycle().take(rows * format.stored_len(cols)).collect();
        let small = f16::from_f32(2e-5).to_le_bytes();
        for block in data.chunks_exact_mut(format.stored_len(format.stored_columns())) {
            format.halves().iter().for_each(|&at| block[at..at + 2].copy_from_slice(&small));
        }
        Some(data)
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let c = &self.config;
        let (hidden, ffn) = (c.hidden_size, c.intermediate_size);
        let (queries, kv) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        let part = name.strip_suffix(".weight")?.rsplit('.').next()?;
        Some(match part {
            "embed_tokens" | "lm_head" => vec![c.vocab_size, hidden],
            "q_proj" => vec![queries, hidden],
            "k_proj" | "v_proj" => vec![kv, hidden],
            "o_proj" => vec![hidden, queries],
            "gate_proj" | "up_proj" => vec![ffn, hidden],
            "down_proj" => vec![hidden, ffn],
            "q_norm" | "k_norm" => vec![c.head_dim],
            part if part.contains("norm") => vec![hidden],
            _ => return None,
        })
    }
}

impl WeightSource for RandomWeights {
    fn contains(&self, name: &str) -> bool {
        self.shape(name).is_some()
    }

    fn tensor(&self, name: &str) -> Result<RawTensor<'_>> {
        let unknown = || ZooError::Unsupported(format!("no random weights for {name:?}"));
        let shape = self.shape(name).ok_or_else(unknown)?;
        if let Some(dtype) = self.quantized
            && let Some(data) = self.codes(dtype, &shape)
        {
            return Ok(RawTensor { dtype, shape, data: Cow::Owned(data) });
        }
        let count: usize = shape.iter().product();
        let mut data = Vec::with_capacity(2 * count);
        if shape.len() == 1 {
            data.extend((0..count).flat_map(|_| bf16::ONE.to_le_bytes()));
        } else {
            // Each tensor begins at another place of the noise.
            let start =
                name.bytes().fold(7usize, |hash, byte| (hash ^ byte as usize).wrapping_mul(16_777_619))
                    % BLOCK;
            while data.len() < 2 * count {
                let from = if data.is_empty() { start } else { 0 };
                let len = (BLOCK - from).min(count - data.len() / 2);
                data.extend_from_slice(bytemuck::cast_slice(&self.noise[from..from + len]));
            }
        }
        Ok(RawTensor { dtype: GgmlDType::BF16, shape, data: Cow::Owned(data) })
    }
}
