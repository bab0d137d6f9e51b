//! `config.json` of LLaVA checkpoints in the layout of transformers: a vision model, a projector and a
//! decoder, each with its own object.

use std::path::Path;

use serde_json::json;

use super::DecoderConfig;
use super::json::JsonObject;
use crate::Result;

/// Everything that a LLaVA model is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct LlavaConfig {
    /// The decoder; `None` where the folder's decoder is another model (see [`crate::loader`]).
    pub text: Option<DecoderConfig>,
    /// The image encoder.
    pub vision: VisionConfig,
    /// Activation between the projector's two layers.
    pub projector_activation: EncoderActivation,
    /// Id of the token that stands for an image in a prompt.
    pub image_token: u32,
    /// Encoder layers whose output the projector takes: of the last layers, some may never run.
    pub layers_used: usize,
    /// The projector takes the class token too (strategy `full`).
    pub keeps_class_token: bool,
}

/// A vision transformer as CLIP has it (arXiv 2103.00020).
#[derive(Debug, Clone, PartialEq)]
pub struct VisionConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward block.
    pub intermediate_size: usize,
    /// Layers of the checkpoint.
    pub num_layers: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Side of the square image, in pixels.
    pub image_size: usize,
    /// Side of a square patch, in pixels.
    pub patch_size: usize,
    /// Epsilon of every layer norm.
    pub layer_norm_eps: f32,
    /// Activation of the feed-forward block.
    pub activation: EncoderActivation,
}

/// Activation functions of encoders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EncoderActivation {
    /// `x · sigmoid(1.702·x)`.
    QuickGelu,
    /// GELU by the error function.
    Gelu,
}

impl VisionConfig {
    /// Patches along a side.
    pub fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Patches of an image.
    pub fn num_patches(&self) -> usize {
        self.grid() * self.grid()
    }
}

impl LlavaConfig {
    /// Whether the `config.json` at `path` is a LLaVA model's.
    ///
    /// # Errors
    /// As [`LlavaConfig::from_hf`], where it cannot be read.
    pub fn is_llava(path: &Path) -> Result<bool> {
        Ok(JsonObject::read(path)?.get::<String>("model_type")?.as_deref() == Some("llava"))
    }

    /// Reads a `config.json`; with `has_text`, its `text_config` too.
    ///
    /// # Errors
    /// As [`DecoderConfig::from_hf`].
    pub fn from_hf(path: &Path, has_text: bool) -> Result<Self> {
        let json = JsonObject::read(path)?;
        let text = if has_text { Some(text(&json, path)?) } else { None };
        let vision = match json.object("vision_config")? {
            Some(config) => vision(config)?,
            None => return Err(json.malformed("vision_config is missing")),
        };
        let image_token = match json.get("image_token_id")? {
            Some(id) => id,
            None => json.get("image_token_index")?.unwrap_or(32000),
        };
        let projector_activation = activation(&json, "projector_hidden_act", "gelu")?;
        let keeps_class_token = match json.get::<String>("vision_feature_select_strategy")?.as_deref() {
            None | Some("default") => false,
            Some("full") => true,
            Some(other) => {
                return Err(json.unsupported("vision_feature_select_strategy", &format!("{other:?}")));
            }
        };
        let layers_used = layers_used(&json, vision.num_layers)?;
        Ok(Self { text, vision, projector_activation, image_token, layers_used, keeps_class_token })
    }

    /// Tokens of a prompt that an image takes.
    pub fn tokens_per_image(&self) -> usize {
        self.vision.num_patches() + usize::from(self.keeps_class_token)
    }
}

/// The decoder. Checkpoints leave out what equals the defaults of transformers' `LlamaConfig`.
fn text(json: &JsonObject, path: &Path) -> Result<DecoderConfig> {
    let Some(mut text) = json.object("text_config")? else {
        return Err(json.malformed("text_config is missing"));
    };
    text.set_default("model_type", json!("llama"));
    if text.get::<String>("model_type")?.as_deref() == Some("llama") {
        for (key, value) in [
            ("hidden_size", 4096),
            ("intermediate_size", 11008),
            ("num_hidden_layers", 32),
            ("num_attention_heads", 32),
            ("vocab_size", 32000),
            ("max_position_embeddings", 2048),
        ] {
            text.set_default(key, json!(value));
        }
    }
    DecoderConfig::from_object(&text, path)
}

/// Missing keys get the defaults of transformers' `CLIPVisionConfig`.
fn vision(mut json: JsonObject) -> Result<VisionConfig> {
    let kind = json.get::<String>("model_type")?;
    if kind.as_deref().is_some_and(|kind| kind != "clip_vision_model") {
        return Err(json.unsupported(
            "model_type",
            &format!("{:?}; a CLIP encoder is served", kind.unwrap_or_default()),
        ));
    }
    for (key, value) in [
        ("hidden_size", 768),
        ("intermediate_size", 3072),
        ("num_hidden_layers", 12),
        ("num_attention_heads", 12),
        ("image_size", 224),
        ("patch_size", 32),
    ] {
        json.set_default(key, json!(value));
    }
    let config = VisionConfig {
        hidden_size: json.require("hidden_size")?,
        intermediate_size: json.require("intermediate_size")?,
        num_layers: json.require("num_hidden_layers")?,
        num_heads: json.require("num_attention_heads")?,
        image_size: json.require("image_size")?,
        patch_size: json.require("patch_size")?,
        layer_norm_eps: json.get("layer_norm_eps")?.unwrap_or(1e-5),
        activation: activation(&json, "hidden_act", "quick_gelu")?,
    };
    check(&config).map_err(|reason| json.malformed(&reason))?;
    Ok(config)
}

/// What an encoder may say: it allocates and indexes by these numbers.
fn check(config: &VisionConfig) -> std::result::Result<(), String> {
    for (name, value, most) in [
        ("hidden_size", config.hidden_size, 1 << 14),
        ("intermediate_size", config.intermediate_size, 1 << 16),
        ("num_hidden_layers", config.num_layers, 256),
        ("num_attention_heads", config.num_heads, 256),
        ("image_size", config.image_size, 2048),
        ("patch_size", config.patch_size, 256),
    ] {
        if value == 0 || value > most {
            return Err(format!("{name} is {value}; it must be from 1 to {most}"));
        }
    }
    if !config.hidden_size.is_multiple_of(config.num_heads) {
        return Err(format!(
            "hidden_size {} is not divisible by {} heads",
            config.hidden_size, config.num_heads
        ));
    }
    if !config.image_size.is_multiple_of(config.patch_size) {
        return Err(format!(
            "image_size {} is not divisible by patch_size {}",
            config.image_size, config.patch_size
        ));
    }
    Ok(())
}

fn activation(json: &JsonObject, key: &str, default: &str) -> Result<EncoderActivation> {
    match json.get::<String>(key)?.as_deref().unwrap_or(default) {
        "quick_gelu" => Ok(EncoderActivation::QuickGelu),
        "gelu" => Ok(EncoderActivation::Gelu),
        other => Err(json.unsupported(key, &format!("the activation {other:?}"))),
    }
}

/// How many layers run before the hidden states that `vision_feature_layer` names: 0 are the embeddings,
/// −1 what the last layer gives.
fn layers_used(json: &JsonObject, num_layers: usize) -> Result<usize> {
    let key = "vision_feature_layer";
    let index = match json.get::<serde_json::Value>(key)? {
        None => -2,
        Some(value) => match value.as_i64() {
            Some(index) => index,
            None => return Err(json.unsupported(key, "several layers")),
        },
    };
    let states = num_layers as i64 + 1;
    let from_start = if index < 0 { states + index } else { index };
    usize::try_from(from_start)
        .ok()
        .filter(|&layers| layers <= num_layers)
        .ok_or_else(|| json.malformed(&format!("{key} is {index}; the encoder has {num_layers} layers")))
}
