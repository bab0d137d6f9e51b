//! RoPE parameters of a `config.json`, in the spelling of transformers 4 (`rope_theta`, `rope_scaling`,
//! `rope_local_base_freq`) and of transformers 5 (`rope_parameters`, for Gemma one set a layer type).

use super::json::JsonObject;
use super::{RopeConfig, RopeScaling};
use crate::Result;

/// RoPE of the layers with full attention and, where it differs, of those with a window.
pub(super) struct LayerRopes {
    pub(super) global: RopeConfig,
    pub(super) local: Option<RopeConfig>,
}

pub(super) fn read(json: &JsonObject, architecture: &str) -> Result<LayerRopes> {
    let gemma = architecture == "gemma3";
    let default_theta = if gemma { 1_000_000.0 } else { 10_000.0 };
    let theta = json.get::<f32>("rope_theta")?.unwrap_or(default_theta);
    let local_theta = json.get::<f32>("rope_local_base_freq")?.unwrap_or(10_000.0);
    let local_default = gemma.then_some(RopeConfig { theta: local_theta, scaling: RopeScaling::None });

    let Some(parameters) = json.object("rope_parameters")? else {
        let scaling = match json.object("rope_scaling")? {
            Some(scaling) => read_scaling(json, &scaling)?,
            None => RopeScaling::None,
        };
        return Ok(LayerRopes { global: RopeConfig { theta, scaling }, local: local_default });
    };
    if !gemma {
        return Ok(LayerRopes { global: read_one(json, &parameters, theta)?, local: None });
    }
    let global = match parameters.object("full_attention")? {
        Some(full) => read_one(json, &full, theta)?,
        None => RopeConfig { theta, scaling: RopeScaling::None },
    };
    let local = match parameters.object("sliding_attention")? {
        Some(sliding) => Some(read_one(json, &sliding, local_theta)?),
        None => local_default,
    };
    Ok(LayerRopes { global, local })
}

fn read_one(json: &JsonObject, parameters: &JsonObject, default_theta: f32) -> Result<RopeConfig> {
    let theta = parameters.get("rope_theta")?.unwrap_or(default_theta);
    Ok(RopeConfig { theta, scaling: read_scaling(json, parameters)? })
}

fn read_scaling(json: &JsonObject, scaling: &JsonObject) -> Result<RopeScaling> {
    if scaling.get::<f32>("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
        return Err(scaling.unsupported("partial_rotary_factor", "RoPE on a part of each head"));
    }
    let kind = match scaling.get::<String>("rope_type")? {
        Some(kind) => kind,
        // transformers' name of the key before 4.43
        None => scaling.get("type")?.unwrap_or_else(|| "default".to_owned()),
    };
    match kind.as_str() {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: scaling.require("factor")? }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: scaling.require("factor")?,
            low_freq_factor: scaling.require("low_freq_factor")?,
            high_freq_factor: scaling.require("high_freq_factor")?,
            original_max_position: scaling.require("original_max_position_embeddings")?,
        }),
        "yarn" => yarn(json, scaling),
        other => Err(scaling.unsupported("rope_type", &format!("{other:?} RoPE scaling"))),
    }
}

fn yarn(json: &JsonObject, scaling: &JsonObject) -> Result<RopeScaling> {
    if !scaling.get::<bool>("truncate")?.unwrap_or(true) {
        return Err(scaling.unsupported("truncate", "YaRN without truncation"));
    }
    let factor = scaling.require::<f32>("factor")?;
    let original_max_position = match scaling.get("original_max_position_embeddings")? {
        Some(original) => original,
        None => json.require("max_position_embeddings")?,
    };
    let mscale = scaling.get::<f32>("mscale")?.filter(|scale| *scale != 0.0);
    let mscale_all_dim = scaling.get::<f32>("mscale_all_dim")?.filter(|scale| *scale != 0.0);
    let attention_factor = match (scaling.get("attention_factor")?, mscale, mscale_all_dim) {
        (Some(explicit), ..) => Some(explicit),
        (None, Some(scale), Some(all_dim)) => {
            let temperature = |scale: f32| 0.1 * scale * factor.ln() + 1.0;
            Some(temperature(scale) / temperature(all_dim))
        }
        _ => None,
    };
    Ok(RopeScaling::Yarn {
        factor,
        original_max_position,
        beta_fast: scaling.get("beta_fast")?.unwrap_or(32.0),
        beta_slow: scaling.get("beta_slow")?.unwrap_or(1.0),
        attention_factor,
    })
}
