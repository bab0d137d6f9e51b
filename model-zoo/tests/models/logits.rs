//! Tiny models of every architecture: our logits against those of Hugging Face transformers.
//!
//! `fixtures/make_models.py` made the models and the expectations. Matrices in F32, F16 and BF16 are
//! compared with transformers on an f16 KV cache, which leaves only the order of f32 sums; matrices in
//! blocks are compared with transformers on the dequantized weights, so that there the tolerance is
//! what quantizing the activations to 8 bits costs.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use crate::support::{Distance, fixtures, prompt_logits};

/// How far logits, whose standard deviation is 2.5, may be off.
#[derive(Clone, Copy)]
struct Tolerance {
    rms: f32,
    largest: f32,
}

/// The order of f32 sums; where it carries a K or V across a rounding border of f16, its positions are off
/// by more.
const EXACT: Tolerance = Tolerance { rms: 5e-4, largest: 5e-3 };

/// What rounding K and V to f16 changes in these models.
const F16_KV: Tolerance = Tolerance { rms: 3e-3, largest: 2e-2 };

/// What activations of 8 bits change in these models.
const INT8_ACTIVATIONS: Tolerance = Tolerance { rms: 0.1, largest: 0.5 };

/// Sizes that end inside, at and beyond the pages' edges.
const CHUNKS: [&[usize]; 4] = [&[48], &[7], &[1], &[16, 1, 13]];

struct Expected(HashMap<String, Tensor>);

impl Expected {
    fn read(path: &Path) -> Self {
        Self(candle_core::safetensors::load(path, &Device::Cpu).unwrap())
    }

    fn tokens(&self) -> Vec<u32> {
        self.0["tokens"].to_dtype(DType::U32).unwrap().to_vec1().unwrap()
    }

    fn logits(&self, name: &str) -> Vec<Vec<f32>> {
        self.0[name].to_vec2().unwrap()
    }
}

/// Compares logits with an expectation, which has every n-th position.
fn assert_near(what: &str, logits: &[Vec<f32>], expected: &[Vec<f32>], tolerance: Tolerance) {
    let stride = logits.len() / expected.len();
    let kept = logits.iter().step_by(stride).cloned().collect::<Vec<_>>();
    let Distance { rms, largest } = Distance::between(&kept, expected);
    println!("{what}: off by {rms:.1e} (largest {largest:.1e})");
    assert!(rms < tolerance.rms && largest < tolerance.largest, "{what}: off by {rms} (largest {largest})");
}

fn check(name: &str, model: &Path, expected: &Expected, tolerance: Tolerance) {
    let tokens = expected.tokens();
    for chunks in CHUNKS {
        let what = format!("{name} in chunks of {chunks:?}");
        let logits = prompt_logits(model, &tokens, chunks);
        assert_near(&what, &logits, &expected.logits("logits_f16_kv"), tolerance);
        if expected.0.contains_key("logits") {
            assert_near(&format!("{what}, f32 KV"), &logits, &expected.logits("logits"), F16_KV);
        }
    }
}

#[test]
fn safetensors_models_agree_with_transformers() {
    for name in ["llama", "llama-sharded", "mistral", "qwen2", "qwen3", "gemma3"] {
        let folder = fixtures().join(name);
        check(name, &folder, &Expected::read(&folder.join("expected.safetensors")), EXACT);
    }
}

#[test]
fn every_rope_scaling_agrees_with_transformers() {
    for (name, weights) in [("llama-linear", "llama"), ("llama-llama3", "llama"), ("qwen2-yarn", "qwen2")] {
        let folder = tempfile::tempdir().unwrap();
        for (from, file) in [(name, "config.json"), (weights, "model.safetensors")] {
            std::fs::copy(fixtures().join(from).join(file), folder.path().join(file)).unwrap();
        }
        let expected = Expected::read(&fixtures().join(name).join("expected.safetensors"));
        check(name, folder.path(), &expected, EXACT);
    }
}

fn check_gguf(name: &str, tolerance: Tolerance) {
    let path = fixtures().join(format!("gguf/{name}.gguf"));
    check(name, &path, &Expected::read(&path.with_extension("expected.safetensors")), tolerance);
}

#[test]
fn unquantized_gguf_models_agree_with_transformers() {
    for name in ["llama", "llama-llama3", "mistral", "qwen2-yarn", "qwen3", "gemma3"] {
        check_gguf(&format!("{name}-f16"), EXACT);
    }
    check_gguf("llama-bf16", EXACT);
}

#[test]
fn quantized_gguf_models_agree_with_transformers_on_dequantized_weights() {
    for kind in ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1"] {
        check_gguf(&format!("llama-{kind}"), INT8_ACTIVATIONS);
    }
}
