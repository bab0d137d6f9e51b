//! Truncated, mutated and lying weight files give errors: no panic, no memory taken on their word.
//!
//! One test in a binary of its own, so that the process's peak of virtual memory is the readers' alone.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use model_zoo::loader::{LoadOptions, load};
use model_zoo::weights::WeightSource;
use model_zoo::weights::gguf::GgufFile;
use model_zoo::weights::safetensors::SafetensorsCheckpoint;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

/// How the bytes of a good file are spoiled.
#[derive(Debug, Clone)]
enum Damage {
    Truncate(prop::sample::Index),
    Byte(prop::sample::Index, u8),
    /// An extreme number, where a length or an offset may stand.
    Number(prop::sample::Index, u64),
    /// A decimal digit more, in JSON.
    Digit(prop::sample::Index),
}

fn damage() -> impl Strategy<Value = Damage> {
    let number = prop_oneof![
        Just(u64::MAX),
        Just(1 << 63),
        Just(u64::from(u32::MAX)),
        Just(1 << 40),
        Just(1 << 30),
        Just(0),
        any::<u64>()
    ];
    prop_oneof![
        any::<prop::sample::Index>().prop_map(Damage::Truncate),
        (any::<prop::sample::Index>(), any::<u8>()).prop_map(|(at, byte)| Damage::Byte(at, byte)),
        (any::<prop::sample::Index>(), number).prop_map(|(at, number)| Damage::Number(at, number)),
        any::<prop::sample::Index>().prop_map(Damage::Digit),
    ]
}

/// Applies the damage within the first `header` bytes, where structure is.
fn spoil(good: &[u8], header: usize, damages: &[Damage]) -> Vec<u8> {
    let mut bytes = good.to_vec();
    for damage in damages {
        let header = header.min(bytes.len());
        if header < 16 {
            break;
        }
        match damage {
            Damage::Truncate(at) => bytes.truncate(at.index(good.len())),
            Damage::Byte(at, byte) => bytes[at.index(header)] = *byte,
            Damage::Number(at, number) => {
                let at = at.index(header - 8);
                bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
            }
            Damage::Digit(at) => {
                let from = at.index(header);
                if let Some(digit) = bytes[from..header].iter().position(u8::is_ascii_digit) {
                    bytes.insert(from + digit, b'9');
                }
            }
        }
    }
    bytes
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// What a loader asks for, whatever the answer; an answer must keep its promise about sizes.
fn read_all(source: &dyn WeightSource) {
    for layer in 0..2 {
        for module in ["self_attn.q_proj", "mlp.down_proj", "input_layernorm"] {
            read(source, &format!("model.layers.{layer}.{module}.weight"));
        }
    }
    read(source, "model.embed_tokens.weight");
    read(source, "model.norm.weight");
}

fn read(source: &dyn WeightSource, name: &str) {
    if let Ok(tensor) = source.tensor(name) {
        let elements = tensor.shape.iter().product::<usize>();
        assert_eq!(tensor.data.len(), elements / tensor.dtype.block_size() * tensor.dtype.type_size());
    }
}

fn try_gguf(bytes: &[u8], path: &Path) -> bool {
    std::fs::write(path, bytes).unwrap();
    let Ok(file) = GgufFile::open(path) else { return false };
    read_all(&file);
    // A header may also lie to the decoder about sizes, with tensors of others.
    load(path, &LoadOptions { threads: NonZeroUsize::MIN, ..LoadOptions::default() }).is_ok()
}

fn try_safetensors(bytes: &[u8], folder: &Path) -> bool {
    std::fs::write(folder.join("model.safetensors"), bytes).unwrap();
    let Ok(checkpoint) = SafetensorsCheckpoint::open(folder) else { return false };
    read_all(&checkpoint);
    true
}

/// Peak of virtual memory, in bytes: an allocation counts though nothing is written to it.
fn peak_virtual_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
}

#[test]
fn damaged_files_are_refused_without_panic_or_large_allocation() {
    let folder = tempfile::tempdir().unwrap();
    let gguf = std::fs::read(fixtures().join("gguf/llama-q4_0.gguf")).unwrap();
    let safetensors = std::fs::read(fixtures().join("qwen3/model.safetensors")).unwrap();
    let gguf_path = folder.path().join("model.gguf");
    assert!(try_gguf(&gguf, &gguf_path) && try_safetensors(&safetensors, folder.path()));
    let before = peak_virtual_bytes();

    let mut runner = TestRunner::new(ProptestConfig { cases: 1000, ..ProptestConfig::default() });
    let damages = prop::collection::vec(damage(), 1..4);
    runner
        .run(&damages, |damages| {
            try_gguf(&spoil(&gguf, 2500, &damages), &gguf_path);
            try_safetensors(&spoil(&safetensors, 2500, &damages), folder.path());
            Ok(())
        })
        .unwrap();
    for len in (0..2500).step_by(7) {
        assert!(!try_gguf(&gguf[..len], &gguf_path), "a file of {len} bytes was accepted");
        assert!(!try_safetensors(&safetensors[..len], folder.path()), "a file of {len} bytes was accepted");
    }
    assert!(!try_gguf(&gguf[..gguf.len() - 1], &gguf_path), "a cut tensor was accepted");
    assert!(!try_safetensors(&safetensors[..safetensors.len() - 1], folder.path()));

    let grown = peak_virtual_bytes() - before;
    assert!(grown < 64 << 20, "reading damaged files took {grown} bytes");
}
