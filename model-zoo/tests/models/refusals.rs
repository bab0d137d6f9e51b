//! Files that ask for what is not there, or lie: each gets an error that names the trouble.

use std::path::Path;

use model_zoo::weights::gguf::GgufFile;
use model_zoo::weights::safetensors::SafetensorsCheckpoint;
use serde_json::json;

use crate::support::{config_with, fixtures};

#[test]
fn a_config_is_refused_by_the_name_of_what_is_wrong() {
    let scaling = |scaling| json!({"rope_parameters": scaling});
    let cases = [
        ("llama", json!({"architectures": ["MambaForCausalLM"]}), "MambaForCausalLM"),
        ("gemma3", json!({"architectures": ["Gemma3ForConditionalGeneration"]}), "ConditionalGeneration"),
        ("llama", json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
        ("llama", scaling(json!({"rope_type": "default", "partial_rotary_factor": 0.5})), "partial_rotary"),
        ("llama", scaling(json!({"rope_type": "dynamic", "factor": 2.0})), "\"dynamic\" RoPE scaling"),
        ("llama", scaling(json!({"rope_type": "longrope"})), "\"longrope\" RoPE scaling"),
        ("llama", scaling(json!({"rope_type": "linear"})), "rope_parameters.factor is missing"),
        ("llama", scaling(json!({"rope_type": "linear", "factor": 0.5})), "RoPE scaling is impossible"),
        ("llama", scaling(json!({"rope_type": "yarn", "factor": 2.0, "truncate": false})), "truncate"),
        ("qwen2", json!({"num_experts": 60}), "mixture of experts"),
        ("gemma3", json!({"attn_logit_softcapping": 50.0}), "attn_logit_softcapping"),
        ("gemma3", json!({"final_logit_softcapping": 30.0}), "final_logit_softcapping"),
        ("gemma3", json!({"use_bidirectional_attention": true}), "use_bidirectional_attention"),
        ("gemma3", json!({"sliding_window": 0}), "sliding window is 0"),
        ("gemma3", json!({"layer_types": ["full_attention"]}), "1 entries for 3 layers"),
        ("gemma3", json!({"layer_types": null, "_sliding_window_pattern": 0}), "pattern is 0"),
        ("llama", json!({"quantization_config": {"quant_method": "awq"}}), "quantization_config"),
        ("llama", json!({"rope_interleaved": true}), "rope_interleaved"),
        ("llama", json!({"hidden_act": "relu"}), "\"relu\""),
        ("llama", json!({"hidden_size": null}), "hidden_size is missing"),
        ("llama", json!({"hidden_size": -64}), "hidden_size: invalid value"),
        ("llama", json!({"hidden_size": 0, "head_dim": null}), "hidden size is 0"),
        ("llama", json!({"hidden_size": 65, "head_dim": null}), "not divisible"),
        ("llama", json!({"num_hidden_layers": 1_000_000_000}), "number of layers"),
        ("llama", json!({"vocab_size": 1_u64 << 60}), "vocabulary size"),
        ("llama", json!({"num_key_value_heads": 3}), "cannot share 3 KV heads"),
        ("llama", json!({"num_key_value_heads": 0}), "number of KV heads is 0"),
        ("llama", json!({"num_attention_heads": 0}), "number of heads is 0"),
        ("llama", json!({"head_dim": 15}), "head dimension 15 is odd"),
        ("llama", json!({"rms_norm_eps": -1.0}), "RMSNorm epsilon"),
        ("llama", scaling(json!({"rope_theta": 0.0})), "RoPE base is 0"),
    ];
    for (fixture, changes, expected) in cases {
        let error = config_with(fixture, changes.clone()).expect_err(&changes.to_string()).to_string();
        assert!(error.contains(expected), "{changes}: {error}");
    }
}

/// Bytes of a GGUF file: strings and numbers of a header.
fn gguf(parts: &[&dyn AsRef<[u8]>]) -> Vec<u8> {
    parts.iter().flat_map(|part| part.as_ref().to_vec()).collect()
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

#[test]
fn a_gguf_file_is_refused_by_the_name_of_what_is_wrong() {
    let n32 = |n: u32| n.to_le_bytes();
    let n64 = |n: u64| n.to_le_bytes();
    let arch = gguf(&[&text("general.architecture"), &n32(8), &text("llama")]);
    let one_tensor = gguf(&[b"GGUF", &n32(3), &n64(1), &n64(1), &arch, &text("t")]);
    let pad = [0; 4096];
    let cases: [(Vec<u8>, &str); 15] = [
        (vec![], "not a GGUF file"),
        (b"PK\x03\x04 zip".to_vec(), "not a GGUF file"),
        (gguf(&[b"GGUF", &n32(1), &n64(0), &n64(0)]), "version 1"),
        (gguf(&[b"GGUF", &n32(3 << 24), &n64(0), &n64(0)]), "big-endian"),
        (gguf(&[b"GGUF", &n32(3), &n64(1 << 60), &n64(0)]), "claims 1152921504606846976 tensors"),
        (gguf(&[b"GGUF", &n32(3), &n64(0), &n64(u64::MAX)]), "metadata entries"),
        (gguf(&[b"GGUF", &n32(3), &n64(0), &n64(0)]), "has no metadata \"general.architecture\""),
        (gguf(&[b"GGUF", &n32(3), &n64(0), &n64(1), &n64(1 << 50), &pad]), "bytes of text"),
        (gguf(&[b"GGUF", &n32(3), &n64(0), &n64(1), &text("k"), &n32(99), &pad]), "unknown type 99"),
        (gguf(&[b"GGUF", &n32(3), &n64(0), &n64(1), &text("k"), &n32(9), &n32(9), &pad]), "array of type 9"),
        (gguf(&[b"GGUF", &n32(3), &n64(0), &n64(2), &arch, &arch]), "\"general.architecture\" twice"),
        (gguf(&[&one_tensor, &n32(1), &n64(256), &n32(23), &n64(0), &pad]), "IQ4_XS, which is not supported"),
        (gguf(&[&one_tensor, &n32(1), &n64(48), &n32(8), &n64(0), &pad]), "blocks of 32"),
        (gguf(&[&one_tensor, &n32(2), &n64(1 << 40), &n64(1 << 40), &n32(0), &n64(0), &pad]), "impossible"),
        (gguf(&[&one_tensor, &n32(1), &n64(64), &n32(0), &n64(u64::MAX - 8), &pad]), "truncated or corrupt"),
    ];
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for (bytes, expected) in cases {
        std::fs::write(&path, bytes).unwrap();
        let error = GgufFile::open(&path).expect_err(expected).to_string();
        assert!(error.contains(expected) && error.contains("model.gguf"), "{expected}: {error}");
    }
}

#[test]
fn a_safetensors_header_is_refused_by_the_name_of_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let tensor = |dtype: &str, shape: &[u64], offsets: [u64; 2]| {
        json!({"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).to_string()
    };
    let cases = [
        ("{".to_owned(), "malformed header"),
        ("[]".to_owned(), "malformed header"),
        (json!({"t": {"dtype": "F32"}}).to_string(), "tensor \"t\": missing field"),
        (tensor("F8_E4M3", &[4], [0, 4]), "F8_E4M3, which is not supported"),
        (tensor("F32", &[4], [0, 15]), "cannot lie at bytes 0 to 15"),
        (tensor("F32", &[4], [16, 0]), "cannot lie at bytes 16 to 0"),
        (tensor("F32", &[1 << 40, 1 << 40], [0, 16]), "cannot lie"),
        (tensor("F32", &[1 << 20], [0, 1 << 22]), "truncated"),
        (tensor("F32", &[0], [0, 0]), "cannot lie"),
    ];
    for (header, expected) in cases {
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 16]].concat();
        std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
        let error = SafetensorsCheckpoint::open(folder.path()).expect_err(&header).to_string();
        assert!(error.contains(expected), "{header}: {error}");
    }
    std::fs::write(folder.path().join("model.safetensors"), u64::MAX.to_le_bytes()).unwrap();
    let error = SafetensorsCheckpoint::open(folder.path()).expect_err("a header of 2^64 bytes").to_string();
    assert!(error.contains("its header claims"), "{error}");
}

#[test]
fn an_index_reaches_no_file_outside_its_folder() {
    let outer = tempfile::tempdir().unwrap();
    let folder = outer.path().join("model");
    std::fs::create_dir_all(folder.join("sub")).unwrap();
    let shard = fixtures().join("qwen3/model.safetensors");
    for place in ["model/sub/s.safetensors", "s.safetensors", "model/s.safetensors"] {
        std::fs::copy(&shard, outer.path().join(place)).unwrap();
    }
    let open = |name: &str, tensor: &str| {
        let index = json!({"weight_map": {tensor: name}}).to_string();
        std::fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
        SafetensorsCheckpoint::open(&folder).map_err(|error| error.to_string())
    };
    let absolute = outer.path().join("s.safetensors");
    for name in [
        "../s.safetensors",
        "sub/s.safetensors",
        "./s.safetensors",
        "..",
        ".",
        "",
        &absolute.to_string_lossy(),
    ] {
        let error = open(name, "model.norm.weight").expect_err(name);
        assert!(error.contains("not a file beside it"), "{error}");
    }
    assert!(open("missing.safetensors", "model.norm.weight").unwrap_err().contains("missing.safetensors"));
    assert!(open("s.safetensors", "no.such.tensor").unwrap_err().contains("which lacks it"));
    assert!(open("s.safetensors", "model.norm.weight").is_ok());
    assert!(SafetensorsCheckpoint::open(Path::new("/nonexistent")).is_err());
}
