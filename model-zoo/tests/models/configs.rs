//! Configs: both spellings agree, and so do the GGUF and the Hugging Face file of one model.

use model_zoo::config::{DecoderConfig, RopeScaling, RopeStyle};
use model_zoo::weights::gguf::GgufFile;
use serde_json::json;

use crate::support::{config_with, fixtures};

const FOLDERS: [&str; 9] = [
    "llama",
    "llama-sharded",
    "llama-linear",
    "llama-llama3",
    "mistral",
    "qwen2",
    "qwen2-yarn",
    "qwen3",
    "gemma3",
];

#[test]
fn the_spellings_of_transformers_4_and_5_mean_the_same() {
    for name in FOLDERS {
        let folder = fixtures().join(name);
        let new = DecoderConfig::from_hf(&folder.join("config.json")).unwrap();
        let old = DecoderConfig::from_hf(&folder.join("config-v4.json")).unwrap();
        assert_eq!(new, old, "{name}");
    }
}

#[test]
fn gguf_metadata_means_the_same_as_config_json() {
    for name in ["mistral", "qwen2-yarn", "qwen3", "gemma3"] {
        let hf = DecoderConfig::from_hf(&fixtures().join(name).join("config.json")).unwrap();
        let file = GgufFile::open(&fixtures().join(format!("gguf/{name}-f16.gguf"))).unwrap();
        let mut gguf = DecoderConfig::from_gguf(&file).unwrap();
        // What GGUF changes on purpose: Mistral's name and permutation, Gemma's stored norms.
        if name == "mistral" {
            assert_eq!((gguf.architecture.as_str(), gguf.rope_style), ("llama", RopeStyle::Interleaved));
            gguf.architecture = hf.architecture.clone();
            gguf.rope_style = hf.rope_style;
        }
        assert_eq!(gguf.norm_offset, 0.0);
        gguf.norm_offset = hf.norm_offset;
        assert_eq!(gguf, hf, "{name}");
    }
}

#[test]
fn gguf_stores_llama3_scaling_as_divisors() {
    let file = GgufFile::open(&fixtures().join("gguf/llama-llama3-f16.gguf")).unwrap();
    let RopeScaling::Factors(factors) = DecoderConfig::from_gguf(&file).unwrap().rope.scaling else {
        panic!("no factors");
    };
    assert_eq!((factors.len(), factors[0], factors[7]), (8, 1.0, 8.0));
}

#[test]
fn a_missing_key_means_the_default_of_its_class() {
    let gemma = config_with("gemma3", json!({"layer_types": null, "tie_word_embeddings": null})).unwrap();
    assert!(gemma.tie_word_embeddings);
    assert_eq!(gemma.sliding_window.unwrap().layers, [true; 3], "the pattern is five local layers to one");
    let llama = config_with("llama", json!({"num_key_value_heads": null, "head_dim": null})).unwrap();
    assert_eq!((llama.num_kv_heads, llama.head_dim), (4, 16));
    assert_eq!(config_with("mistral", json!({"sliding_window": null})).unwrap().sliding_window, None);
    let qwen =
        json!({"use_sliding_window": true, "sliding_window": 9, "max_window_layers": 1, "layer_types": null});
    assert_eq!(config_with("qwen2", qwen).unwrap().sliding_window.unwrap().layers, [false, true]);
}

#[test]
fn scaling_stretches_the_context() {
    let context =
        |name| DecoderConfig::from_hf(&fixtures().join(name).join("config.json")).unwrap().max_context;
    assert_eq!(context("llama-linear"), 1024);
    assert_eq!(context("llama-llama3"), 256);
    assert_eq!(context("qwen2-yarn"), 256);
}
