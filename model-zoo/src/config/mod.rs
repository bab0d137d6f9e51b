//! A decoder's hyper-parameters, whatever file they came from.

mod gguf;
mod hf;
mod hf_rope;
pub(crate) mod json;
pub mod llava;
mod validate;

use serde::{Deserialize, Serialize};

/// Everything that distinguishes the decoders of the Llama family (Llama 1–3, SmolLM2, Mistral,
/// Qwen2/2.5, Qwen3) and Gemma 3 from one another. Made from `config.json` or GGUF metadata.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DecoderConfig {
    /// `llama`, `mistral`, `qwen2`, `qwen3`, `gemma3`.
    pub architecture: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward block.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// KV heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Channels of a head; not always `hidden_size / num_heads`.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Longest sequence, in tokens.
    pub max_context: usize,
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f32,
    /// Rotary embedding of (global) attention layers.
    pub rope: RopeConfig,
    /// Pairing of rotated channels in this file's Q and K weights.
    pub rope_style: RopeStyle,
    /// Sliding-window attention, if any.
    pub sliding_window: Option<SlidingWindow>,
    /// Gate activation of the feed-forward block.
    pub activation: Activation,
    /// RMSNorm over each head's query and key before RoPE (Qwen3, Gemma 3).
    pub qk_norm: bool,
    /// Norms after attention and FFN as well as before (Gemma 3).
    pub sandwich_norms: bool,
    /// Norm weights are stored as `w - 1` (Gemma in Hugging Face files; GGUF stores `w`).
    pub norm_offset: f32,
    /// Embeddings are multiplied by this (Gemma: √hidden_size).
    pub embedding_scale: f32,
    /// Attention scores are multiplied by this (usually 1/√head_dim).
    pub attention_scale: f32,
    /// The output matrix is the embedding.
    pub tie_word_embeddings: bool,
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f32,
    /// Change of the frequencies for longer contexts.
    pub scaling: RopeScaling,
}

/// Frequency scaling for contexts longer than the model was pre-trained on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum RopeScaling {
    /// Plain RoPE.
    None,
    /// All frequencies divided by `factor` (position interpolation).
    Linear {
        /// Stretch of the context.
        factor: f32,
    },
    /// Llama 3.1's wavelength-dependent scaling.
    Llama3 {
        /// Stretch of low frequencies.
        factor: f32,
        /// Wavelengths above `original / low_freq_factor` are stretched fully.
        low_freq_factor: f32,
        /// Wavelengths below `original / high_freq_factor` are left alone.
        high_freq_factor: f32,
        /// Context of the pre-training.
        original_max_position: f32,
    },
    /// YaRN (arXiv 2309.00071), as Qwen2.5 uses it.
    Yarn {
        /// Stretch of low frequencies.
        factor: f32,
        /// Context of the pre-training.
        original_max_position: f32,
        /// Ramp end for high frequencies (rotations).
        beta_fast: f32,
        /// Ramp end for low frequencies (rotations).
        beta_slow: f32,
        /// Multiplies cos and sin; `None` means `0.1·ln(factor) + 1`.
        attention_factor: Option<f32>,
    },
    /// One divisor a frequency, as GGUF's `rope_freqs.weight` stores Llama 3's scaling.
    Factors(Vec<f32>),
}

impl RopeScaling {
    /// The context that a model pre-trained on `context` tokens reaches with this scaling. Llama 3's files
    /// give the stretched context already.
    fn stretched_context(&self, context: usize) -> usize {
        match self {
            Self::None | Self::Llama3 { .. } | Self::Factors(_) => context,
            Self::Linear { factor } => (context as f32 * factor) as usize,
            Self::Yarn { factor, original_max_position, .. } => {
                context.max((original_max_position * factor) as usize)
            }
        }
    }
}

/// Which channels RoPE rotates together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RopeStyle {
    /// `(j, j + d/2)`: Hugging Face files, and GGUF of Qwen and Gemma.
    Half,
    /// `(2j, 2j + 1)`: GGUF of `llama` and `mistral`, whose Q and K rows are permuted.
    Interleaved,
}

/// Sliding-window attention.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SlidingWindow {
    /// A query sees this many positions, itself included.
    pub window: usize,
    /// For each layer, whether it uses the window.
    pub layers: Vec<bool>,
    /// RoPE of windowed layers where it differs (Gemma 3).
    pub rope: Option<RopeConfig>,
}

/// Gate activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// GELU, tanh approximation.
    GeluTanh,
}
