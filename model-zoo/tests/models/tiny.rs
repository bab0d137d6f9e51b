//! A deeper tiny model, written from a fixture's config with seeded weights.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use model_zoo::compression::calibration::{Calibration, FfnCalibration};
use tempfile::TempDir;

use crate::support::fixtures;

pub(crate) const LAYERS: usize = 6;

/// The `llama` fixture with [`LAYERS`] layers of seeded weights; those of which `is_zero` says so are 0.
pub(crate) fn write(is_zero: impl Fn(&str) -> bool) -> TempDir {
    write_of(None, is_zero)
}

/// The same with FFNs of a width that lets a GPU run steps of few tokens as one launch.
pub(crate) fn write_for_joint_steps(is_zero: impl Fn(&str) -> bool) -> TempDir {
    write_of(Some(64), is_zero)
}

fn write_of(ffn: Option<usize>, is_zero: impl Fn(&str) -> bool) -> TempDir {
    let source = fixtures().join("llama");
    let text = std::fs::read_to_string(source.join("config.json")).unwrap();
    let mut config = serde_json::from_str::<serde_json::Value>(&text).unwrap();
    config["num_hidden_layers"] = LAYERS.into();
    let own = config["intermediate_size"].as_u64().unwrap() as usize;
    let ffn = ffn.unwrap_or(own);
    config["intermediate_size"] = ffn.into();
    let weights = candle_core::safetensors::load(source.join("model.safetensors"), &Device::Cpu).unwrap();
    let mut deeper = HashMap::new();
    for (name, tensor) in weights {
        let names: Vec<String> = match name.strip_prefix("model.layers.0.") {
            Some(rest) => (0..LAYERS).map(|layer| format!("model.layers.{layer}.{rest}")).collect(),
            None if name.starts_with("model.layers.") => Vec::new(),
            None => vec![name],
        };
        for name in names {
            let size = |&size: &usize| if size == own { ffn } else { size };
            let shape: Vec<usize> = tensor.dims().iter().map(size).collect();
            let tensor = match is_zero(&name) {
                true => Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap(),
                false => reseeded(&name, &tensor, shape),
            };
            deeper.insert(name, tensor);
        }
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    candle_core::safetensors::save(&deeper, folder.path().join("model.safetensors")).unwrap();
    copy_tokenizer(&source, folder.path());
    folder
}

/// Noise of this shape, from the tensor's name; norms and embeddings stay.
fn reseeded(name: &str, tensor: &Tensor, shape: Vec<usize>) -> Tensor {
    if !name.contains("_proj") {
        return tensor.clone();
    }
    let mut state =
        name.bytes().fold(7u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3));
    let noise = (0..shape.iter().product()).map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * 0.2
    });
    let noise = noise.collect::<Vec<_>>();
    Tensor::from_vec(noise, shape, &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap()
}

fn copy_tokenizer(source: &Path, target: &Path) {
    for file in std::fs::read_dir(source).unwrap() {
        let file = file.unwrap();
        let name = file.file_name();
        if name.to_string_lossy().contains("tokenizer") {
            std::fs::copy(file.path(), target.join(name)).unwrap();
        }
    }
}

/// Similarities that put attention in the order 3, 1, 4, 2, … and FFNs in the order 2, 4, 3, 1, …
pub(crate) fn calibration() -> Calibration {
    Calibration {
        attention_similarity: vec![0.99, 0.8, 0.6, 0.9, 0.7, 0.99],
        ffn_similarity: vec![0.1, 0.5, 0.85, 0.65, 0.75, 0.2],
        ffn_skip: FfnCalibration { first_layer: 1, end_layer: 5, thresholds: Vec::new() },
        ..Calibration::default()
    }
}
