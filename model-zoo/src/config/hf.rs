//! `config.json` of Hugging Face checkpoints, as transformers 4 and 5 write it.
//!
//! Missing keys get the defaults of the transformers class that `architectures` names; what a decoder
//! here would compute wrongly is refused by name.

use std::path::Path;

use super::json::JsonObject;
use super::{Activation, DecoderConfig, RopeStyle, SlidingWindow, hf_rope};
use crate::{Result, ZooError};

/// The classes of transformers that a checkpoint may name, and our names for them.
const ARCHITECTURES: [(&str, &str, &str); 5] = [
    ("LlamaForCausalLM", "llama", "llama"),
    ("MistralForCausalLM", "mistral", "mistral"),
    ("Qwen2ForCausalLM", "qwen2", "qwen2"),
    ("Qwen3ForCausalLM", "qwen3", "qwen3"),
    ("Gemma3ForCausalLM", "gemma3_text", "gemma3"),
];

impl DecoderConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// [`ZooError::Io`] when it cannot be read, [`ZooError::Format`] when a value is missing, has the
    /// wrong type or contradicts another, [`ZooError::Unsupported`] when it asks for an architecture or a
    /// feature that is not implemented.
    pub fn from_hf(path: &Path) -> Result<Self> {
        Self::from_object(&JsonObject::read(path)?, path)
    }

    /// Reads the decoder's object in the `config.json` at `path`.
    pub(super) fn from_object(json: &JsonObject, path: &Path) -> Result<Self> {
        let architecture = architecture(json)?;
        refuse_unsupported(json)?;
        let config = assemble(json, architecture)?;
        config.validate(path)?;
        Ok(config)
    }
}

fn architecture(json: &JsonObject) -> Result<&'static str> {
    let classes = json.get::<Vec<String>>("architectures")?.unwrap_or_default();
    let model_type = json.get::<String>("model_type")?.unwrap_or_default();
    let found = ARCHITECTURES.iter().find(|(class, kind, _)| match classes.first() {
        Some(first) => first == class,
        None => model_type == *kind,
    });
    found.map(|&(.., name)| name).ok_or_else(|| {
        let known = ARCHITECTURES.map(|(class, ..)| class).join(", ");
        let named = classes.into_iter().next().unwrap_or(model_type);
        ZooError::Unsupported(format!(
            "{}: architecture {named:?} is not implemented; these are: {known}",
            json.path().display()
        ))
    })
}

fn refuse_unsupported(json: &JsonObject) -> Result<()> {
    if json.get::<f32>("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
        return Err(json.unsupported("partial_rotary_factor", "RoPE on a part of each head"));
    }
    for key in ["num_experts", "num_local_experts"] {
        if json.get::<usize>(key)?.is_some_and(|experts| experts > 1) {
            return Err(json.unsupported(key, "a mixture of experts"));
        }
    }
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if json.get::<f32>(key)?.is_some() {
            return Err(json.unsupported(key, "softcapping"));
        }
    }
    if json.get::<bool>("use_bidirectional_attention")?.unwrap_or(false) {
        return Err(json.unsupported("use_bidirectional_attention", "attention to later tokens"));
    }
    if json.get::<bool>("rope_interleaved")?.unwrap_or(false) {
        return Err(json.unsupported("rope_interleaved", "interleaved RoPE"));
    }
    if json.object("quantization_config")?.is_some() {
        return Err(json.unsupported("quantization_config", "quantized safetensors; use a GGUF file"));
    }
    Ok(())
}

fn assemble(json: &JsonObject, architecture: &str) -> Result<DecoderConfig> {
    let gemma = architecture == "gemma3";
    let hidden_size = json.require::<usize>("hidden_size")?;
    let num_layers = json.require::<usize>("num_hidden_layers")?;
    let num_heads = json.require::<usize>("num_attention_heads")?;
    let head_dim = match json.get("head_dim")? {
        Some(head_dim) => head_dim,
        None => default_head_dim(json, architecture, hidden_size, num_heads)?,
    };
    let rope = hf_rope::read(json, architecture)?;
    let max_position = json.require::<usize>("max_position_embeddings")?;
    let attention_scalar =
        if gemma { json.get::<f32>("query_pre_attn_scalar")?.unwrap_or(256.0) } else { head_dim as f32 };
    Ok(DecoderConfig {
        architecture: architecture.to_owned(),
        hidden_size,
        intermediate_size: json.require("intermediate_size")?,
        num_layers,
        num_heads,
        num_kv_heads: num_kv_heads(json, architecture, num_heads)?,
        head_dim,
        vocab_size: json.require("vocab_size")?,
        // Gemma's max_position_embeddings is the stretched one already.
        max_context: if gemma { max_position } else { rope.global.scaling.stretched_context(max_position) },
        rms_norm_eps: json.get("rms_norm_eps")?.unwrap_or(1e-6),
        sliding_window: sliding_window(json, architecture, num_layers)?
            .map(|(window, layers)| SlidingWindow { window, layers, rope: rope.local }),
        rope: rope.global,
        rope_style: RopeStyle::Half,
        activation: activation(json)?,
        qk_norm: matches!(architecture, "qwen3" | "gemma3"),
        sandwich_norms: gemma,
        norm_offset: if gemma { 1.0 } else { 0.0 },
        embedding_scale: if gemma { (hidden_size as f32).sqrt() } else { 1.0 },
        attention_scale: f64::from(attention_scalar).sqrt().recip() as f32,
        tie_word_embeddings: json.get("tie_word_embeddings")?.unwrap_or(gemma),
    })
}

fn num_kv_heads(json: &JsonObject, architecture: &str, num_heads: usize) -> Result<usize> {
    let key = "num_key_value_heads";
    if architecture == "llama" || json.has(key) {
        return Ok(json.get(key)?.unwrap_or(num_heads));
    }
    // The other classes' defaults are those of one particular size: better no guess.
    json.require(key)
}

/// Channels of a head where the file does not say.
fn default_head_dim(json: &JsonObject, architecture: &str, hidden: usize, heads: usize) -> Result<usize> {
    match architecture {
        "qwen3" => Ok(128),
        "gemma3" => Ok(256),
        _ if heads > 0 && hidden.is_multiple_of(heads) => Ok(hidden / heads),
        _ => {
            Err(json
                .malformed(&format!("hidden_size {hidden} is not divisible by num_attention_heads {heads}")))
        }
    }
}

fn activation(json: &JsonObject) -> Result<Activation> {
    // Gemma's key is hidden_activation; its hidden_act, where it stands, is not used.
    let key = if json.has("hidden_activation") { "hidden_activation" } else { "hidden_act" };
    let default = if key == "hidden_activation" { "gelu_pytorch_tanh" } else { "silu" };
    match json.get::<String>(key)?.as_deref().unwrap_or(default) {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeluTanh),
        other => Err(json.unsupported(key, &format!("the activation {other:?}"))),
    }
}

/// The window and, for each layer, whether it applies.
fn sliding_window(
    json: &JsonObject,
    architecture: &str,
    num_layers: usize,
) -> Result<Option<(usize, Vec<bool>)>> {
    let window = match json.get::<usize>("sliding_window")? {
        Some(window) => window,
        // transformers' default where the key is missing; an explicit null means no window.
        None if !json.has("sliding_window") && architecture != "llama" => 4096,
        None => return Ok(None),
    };
    let types = layer_types(json, num_layers)?;
    let layers = match architecture {
        "mistral" if types.as_ref().is_none_or(|types| types.iter().all(|&local| local)) => {
            vec![true; num_layers]
        }
        "mistral" => return Err(json.unsupported("layer_types", "windows in some layers of a Mistral")),
        "qwen2" | "qwen3" if !json.get::<bool>("use_sliding_window")?.unwrap_or(false) => return Ok(None),
        "qwen2" | "qwen3" => match types {
            Some(types) => types,
            None => {
                let first = json.get::<usize>("max_window_layers")?.unwrap_or(28);
                (0..num_layers).map(|layer| layer >= first).collect()
            }
        },
        "gemma3" => match types {
            Some(types) => types,
            None => {
                let pattern = gemma_pattern(json)?;
                (0..num_layers).map(|layer| !(layer + 1).is_multiple_of(pattern)).collect()
            }
        },
        _ => return Ok(None),
    };
    Ok(layers.contains(&true).then_some((window, layers)))
}

/// Gemma's window layers between two global ones, plus one.
fn gemma_pattern(json: &JsonObject) -> Result<usize> {
    let pattern = match json.get::<usize>("sliding_window_pattern")? {
        Some(pattern) => pattern,
        None => json.get("_sliding_window_pattern")?.unwrap_or(6),
    };
    if pattern == 0 { Err(json.malformed("sliding_window_pattern is 0")) } else { Ok(pattern) }
}

fn layer_types(json: &JsonObject, num_layers: usize) -> Result<Option<Vec<bool>>> {
    let Some(types) = json.get::<Vec<String>>("layer_types")? else { return Ok(None) };
    if types.len() != num_layers {
        return Err(
            json.malformed(&format!("layer_types has {} entries for {num_layers} layers", types.len()))
        );
    }
    types
        .iter()
        .map(|kind| match kind.as_str() {
            "sliding_attention" => Ok(true),
            "full_attention" => Ok(false),
            other => Err(json.unsupported("layer_types", &format!("{other:?}"))),
        })
        .collect::<Result<_>>()
        .map(Some)
}
