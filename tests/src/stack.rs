//! A small BitStack artefact of seeded blocks, for servers under test.

use std::path::Path;

use model_zoo::compression::bitstack::artefact::{Contents, Provenance, StoredTensor, write};
use model_zoo::compression::bitstack::{Block, LinearId};
use model_zoo::config::DecoderConfig;
use model_zoo::loader::TokenizerSource;
use model_zoo::weights::GgmlDType;

/// Layers of the model.
pub const LAYERS: usize = 6;
/// Levels of each of its matrices: some 13 MiB.
pub const LEVELS: usize = 16;
const RANK: usize = 4;
const HIDDEN: usize = 256;
const VOCAB: usize = 256;

fn config() -> serde_json::Value {
    serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": 3 * HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": VOCAB, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": true,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    })
}

/// A step of a 64-bit linear congruential generator.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// Random signs and factors between 1/16 and 1/4 in f16, smaller from level to level.
fn block(linear: LinearId, level: usize, [rows, cols]: [usize; 2]) -> Block {
    let mut state = (linear.index() * LEVELS + level) as u64 * 2_654_435_761 + 17;
    let signs = (0..rows * cols / 8).map(|_| next(&mut state) as u8).collect();
    let mut factors = |count: usize, smaller: u16| -> Vec<u16> {
        let sign = |random: u64| (random as u16 & 0x0800) << 4;
        let factor = |random: u64| sign(random) | (0x2C00 + random as u16 % 0x0800 - smaller);
        (0..count).map(|_| factor(next(&mut state))).collect()
    };
    let (u, vt) = (factors(rows * RANK, 0x0400 * (level as u16 / 2)), factors(cols * RANK, 0));
    Block { linear, level, signs, u, vt }
}

/// Writes it to `folder` and returns its path.
///
/// # Panics
/// When the folder cannot be written.
pub fn write_artefact(folder: &Path) -> std::path::PathBuf {
    let config_path = folder.join("config.json");
    std::fs::write(&config_path, config().to_string()).expect("a writable folder");
    let config = DecoderConfig::from_hf(&config_path).expect("a config");
    let mut state = 3;
    let mut tensor = |name: String, shape: Vec<usize>, value: &dyn Fn(u64) -> f32| {
        let count = shape.iter().product::<usize>();
        let data = (0..count).flat_map(|_| value(next(&mut state)).to_le_bytes()).collect();
        StoredTensor { name, dtype: GgmlDType::F32, shape, data }
    };
    let noise = |random: u64| random as f32 / (1u64 << 30) as f32 - 1.0;
    let mut tensors = vec![tensor("model.embed_tokens.weight".into(), vec![VOCAB, HIDDEN], &noise)];
    let norms = (0..LAYERS).flat_map(|layer| {
        ["input_layernorm", "post_attention_layernorm"]
            .map(|norm| format!("model.layers.{layer}.{norm}.weight"))
    });
    for name in norms.chain(["model.norm.weight".to_owned()]) {
        tensors.push(tensor(name, vec![HIDDEN], &|_| 1.0));
    }
    let linears: Vec<LinearId> = LinearId::all(LAYERS).collect();
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model-zoo/tests/fixtures/llava");
    let contents = Contents {
        config: &config,
        provenance: Provenance::default(),
        ranks: vec![RANK; linears.len()],
        tokenizer: &TokenizerSource::Folder(tokenizer),
        tensors,
        stack: (1..LEVELS).flat_map(|level| linears.iter().map(move |&linear| (linear, level))).collect(),
    };
    let path = folder.join("seeded.bitstack");
    let mut of = |linear: LinearId, level: usize| Ok(block(linear, level, linear.projection.size(&config)));
    write(&path, &contents, &mut of).expect("a writable folder");
    path
}
