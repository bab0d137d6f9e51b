//! Decoder hyper-parameters from GGUF metadata.
//!
//! GGUF differs from Hugging Face files in what it leaves unsaid: `llama` files have their Q and K rows
//! permuted for interleaved RoPE, Gemma's norms are stored with the 1 already added, and Gemma's window
//! pattern and local RoPE base are constants of the reader.

use candle_core::quantized::GgmlDType;

use super::{Activation, DecoderConfig, RopeConfig, RopeScaling, RopeStyle, SlidingWindow};
use crate::weights::WeightSource;
use crate::weights::gguf::{FromValue, GgufFile, Metadata};
use crate::{Result, ZooError};

/// `general.architecture` of the files that can be loaded. Mistral's files say `llama`.
const ARCHITECTURES: [&str; 4] = ["llama", "qwen2", "qwen3", "gemma3"];

/// Window layers of Gemma 3 between two global ones, plus one.
const GEMMA_PATTERN: usize = 6;

impl DecoderConfig {
    /// Reads the metadata of a GGUF file, and `rope_freqs.weight` where it has one.
    ///
    /// # Errors
    /// [`ZooError::Format`] when a value is missing, has the wrong type or contradicts another,
    /// [`ZooError::Unsupported`] when the file asks for an architecture or a feature that is not
    /// implemented.
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        let keys = Keys { metadata: file.metadata(), architecture: file.architecture() };
        if !ARCHITECTURES.contains(&keys.architecture) {
            return Err(keys.unsupported(&format!(
                "architecture {:?} is not implemented; these are: {}",
                keys.architecture,
                ARCHITECTURES.join(", ")
            )));
        }
        keys.refuse_unsupported()?;
        let config = assemble(file, &keys)?;
        config.validate(file.metadata().path())?;
        Ok(config)
    }
}

/// Metadata under the architecture's prefix.
struct Keys<'a> {
    metadata: &'a Metadata,
    architecture: &'a str,
}

impl<'a> Keys<'a> {
    fn get<T: FromValue<'a>>(&self, key: &str) -> Result<Option<T>> {
        self.metadata.get(&format!("{}.{key}", self.architecture))
    }

    fn require<T: FromValue<'a>>(&self, key: &str) -> Result<T> {
        self.metadata.require(&format!("{}.{key}", self.architecture))
    }

    fn malformed(&self, reason: String) -> ZooError {
        ZooError::format(self.metadata.path(), reason)
    }

    fn unsupported(&self, reason: &str) -> ZooError {
        ZooError::Unsupported(format!("{}: {reason}", self.metadata.path().display()))
    }

    fn refuse_unsupported(&self) -> Result<()> {
        if self.get::<usize>("expert_count")?.is_some_and(|experts| experts > 0) {
            return Err(self.unsupported("expert_count asks for a mixture of experts"));
        }
        for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
            if self.get::<f32>(key)?.is_some_and(|cap| cap != 0.0) {
                return Err(self.unsupported(&format!("{key} asks for softcapping")));
            }
        }
        if !self.get::<bool>("attention.causal")?.unwrap_or(true) {
            return Err(self.unsupported("attention.causal asks for attention to later tokens"));
        }
        Ok(())
    }
}

fn assemble(file: &GgufFile, keys: &Keys<'_>) -> Result<DecoderConfig> {
    let gemma = keys.architecture == "gemma3";
    let hidden_size = keys.require::<usize>("embedding_length")?;
    let num_layers = keys.require::<usize>("block_count")?;
    let num_heads = keys.require::<usize>("attention.head_count")?;
    let head_dim = head_dim(keys, hidden_size, num_heads)?;
    let theta = keys.get("rope.freq_base")?.unwrap_or(if gemma { 1e6 } else { 10_000.0 });
    let scaling = rope_scaling(file, keys, head_dim)?;
    let context = keys.require::<usize>("context_length")?;
    let embedding = file.shape("token_embd.weight");
    let &[vocab_size, _] = embedding.unwrap_or_default() else {
        return Err(keys.malformed("has no tensor \"token_embd.weight\" of two dimensions".to_owned()));
    };
    Ok(DecoderConfig {
        architecture: keys.architecture.to_owned(),
        hidden_size,
        intermediate_size: keys.require("feed_forward_length")?,
        num_layers,
        num_heads,
        num_kv_heads: keys.get("attention.head_count_kv")?.unwrap_or(num_heads),
        head_dim,
        vocab_size,
        max_context: if gemma { context } else { scaling.stretched_context(context) },
        rms_norm_eps: keys.require("attention.layer_norm_rms_epsilon")?,
        rope: RopeConfig { theta, scaling },
        rope_style: if keys.architecture == "llama" { RopeStyle::Interleaved } else { RopeStyle::Half },
        sliding_window: sliding_window(keys, num_layers)?,
        activation: if gemma { Activation::GeluTanh } else { Activation::Silu },
        qk_norm: matches!(keys.architecture, "qwen3" | "gemma3"),
        sandwich_norms: gemma,
        norm_offset: 0.0,
        embedding_scale: if gemma { (hidden_size as f32).sqrt() } else { 1.0 },
        attention_scale: attention_scale(keys, num_layers, hidden_size, head_dim)?,
        tie_word_embeddings: !file.contains("lm_head.weight"),
    })
}

fn head_dim(keys: &Keys<'_>, hidden_size: usize, num_heads: usize) -> Result<usize> {
    let head_dim = match keys.get::<usize>("attention.key_length")? {
        Some(head_dim) => head_dim,
        None if num_heads > 0 && hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
        None => {
            return Err(keys.malformed(format!(
                "embedding_length {hidden_size} is not divisible by attention.head_count {num_heads}"
            )));
        }
    };
    if keys.get::<usize>("attention.value_length")?.is_some_and(|value| value != head_dim) {
        return Err(keys.unsupported("attention.value_length differs from attention.key_length"));
    }
    if keys.get::<usize>("rope.dimension_count")?.is_some_and(|rotated| rotated != head_dim) {
        return Err(keys.unsupported("rope.dimension_count asks for RoPE on a part of each head"));
    }
    Ok(head_dim)
}

fn attention_scale(keys: &Keys<'_>, num_layers: usize, hidden: usize, head_dim: usize) -> Result<f32> {
    if let Some(scale) = keys.get::<f32>("attention.scale")? {
        return Ok(scale);
    }
    // Gemma 3 27B, which GGUF marks by nothing but its 62 layers, scales by its mean width of a head.
    let heads = keys.require::<usize>("attention.head_count")?.max(1);
    let gemma_27b = keys.architecture == "gemma3" && num_layers == 62;
    let width = if gemma_27b { hidden as f32 / heads as f32 } else { head_dim as f32 };
    Ok(f64::from(width).sqrt().recip() as f32)
}

fn sliding_window(keys: &Keys<'_>, num_layers: usize) -> Result<Option<SlidingWindow>> {
    let Some(window) = keys.get::<usize>("attention.sliding_window")?.filter(|&window| window > 0) else {
        return Ok(None);
    };
    if keys.architecture != "gemma3" {
        return Ok(Some(SlidingWindow { window, layers: vec![true; num_layers], rope: None }));
    }
    let key = "attention.sliding_window_pattern";
    let layers = match keys.get::<&[bool]>(key) {
        Ok(Some(layers)) => layers.to_vec(),
        // Not an array: one local layer fewer than this many, then a global one.
        Ok(None) | Err(_) => {
            let pattern = keys.get::<usize>(key)?.unwrap_or(GEMMA_PATTERN);
            if pattern == 0 {
                return Err(keys.malformed(format!("{key} is 0")));
            }
            (0..num_layers).map(|layer| !(layer + 1).is_multiple_of(pattern)).collect()
        }
    };
    let theta = keys.get("rope.freq_base_swa")?.unwrap_or(10_000.0);
    let rope = Some(RopeConfig { theta, scaling: RopeScaling::None });
    Ok(Some(SlidingWindow { window, layers, rope }))
}

fn rope_scaling(file: &GgufFile, keys: &Keys<'_>, head_dim: usize) -> Result<RopeScaling> {
    if file.contains("rope_freqs.weight") {
        return rope_factors(file, head_dim);
    }
    let factor = match keys.get::<f32>("rope.scaling.factor")? {
        Some(factor) => factor,
        // llama.cpp's name of the key before 2024
        None => keys.get("rope.scale_linear")?.unwrap_or(1.0),
    };
    // 0 and 1 both mean no scaling in llama.cpp
    let stretched = factor != 0.0 && factor != 1.0;
    match keys.get::<&str>("rope.scaling.type")?.unwrap_or("linear") {
        "none" => Ok(RopeScaling::None),
        "linear" if stretched => Ok(RopeScaling::Linear { factor }),
        "linear" => Ok(RopeScaling::None),
        "yarn" => yarn(keys, if stretched { factor } else { 1.0 }),
        other => Err(keys.unsupported(&format!("rope.scaling.type asks for {other:?} RoPE scaling"))),
    }
}

fn yarn(keys: &Keys<'_>, factor: f32) -> Result<RopeScaling> {
    let original = match keys.get::<usize>("rope.scaling.original_context_length")? {
        Some(original) => original,
        None => keys.require("context_length")?,
    };
    let multiplier = keys.get::<f32>("rope.scaling.attn_factor")?.unwrap_or(1.0);
    Ok(RopeScaling::Yarn {
        factor,
        original_max_position: original as f32,
        beta_fast: keys.get("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
        beta_slow: keys.get("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
        // GGUF's factor multiplies YaRN's own; transformers' replaces it.
        attention_factor: (multiplier != 1.0).then(|| multiplier * (0.1 * factor.ln() + 1.0)),
    })
}

/// Llama 3's scaling, as converters store it: a divisor for each frequency.
fn rope_factors(file: &GgufFile, head_dim: usize) -> Result<RopeScaling> {
    let tensor = file.tensor("rope_freqs.weight")?;
    if tensor.dtype != GgmlDType::F32 || tensor.shape != [head_dim / 2] {
        return Err(ZooError::format(
            file.metadata().path(),
            format!("tensor \"rope_freqs.weight\" is not {} values of F32", head_dim / 2),
        ));
    }
    let factors = tensor.data.chunks_exact(4);
    let factors = factors.map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
    Ok(RopeScaling::Factors(factors.collect()))
}
