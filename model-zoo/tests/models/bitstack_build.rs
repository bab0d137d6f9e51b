//! Stacks: built, resumed, imported, and what the model says with a prefix of them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use half::f16;
use model_zoo::compression::bitstack::artefact::Provenance;
use model_zoo::compression::bitstack::build::{Method, Settings, Windows, build, journal_path};
use model_zoo::compression::bitstack::dense::Prefix;
use model_zoo::compression::bitstack::import::import;
use model_zoo::compression::bitstack::order::Order;
use model_zoo::compression::bitstack::source::Source;
use model_zoo::compression::bitstack::{Artefact, LinearId};
use model_zoo::config::DecoderConfig;
use model_zoo::loader::{TokenizerSource, load};
use model_zoo::models::CausalLm;
use model_zoo::models::decoder::CpuDecoder;
use model_zoo::step::LogitRows;
use model_zoo::tokenizer::Tokenizer;
use model_zoo::weights::WeightSource;

use crate::support::{Chunk, Distance, Runner, fixtures};
use crate::tiny::{LAYERS, write};

const PROMPT: [u32; 12] = [5, 9, 200, 31, 7, 7, 81, 14, 3, 99, 120, 44];

fn settings(method: Method, order: Order) -> Settings {
    Settings { levels: 4, rank: 2, method, group: 2, order, eight_bit: false, threads: 2 }
}

/// A tokenizer of four letters.
const TOKENIZER: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "normalizer": null,
    "post_processor": null, "added_tokens": [], "pre_tokenizer": null, "decoder": null,
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "d": 3}, "merges": []}}"#;

/// The tiny model with a tokenizer.
fn tiny() -> tempfile::TempDir {
    let folder = write(|_| false);
    std::fs::write(folder.path().join("tokenizer.json"), TOKENIZER).unwrap();
    folder
}

/// Builds `out` of the model in `folder`.
fn build_at(
    folder: &Path,
    settings: &Settings,
    out: &Path,
    done: &mut dyn FnMut(usize),
) -> model_zoo::Result<()> {
    let windows: Vec<Vec<u32>> =
        (0..6).map(|w| (0..40).map(|i| (i * i * 7 + i * 3 + w * 31) % 256).collect()).collect();
    let windows = Windows { inputs: &windows[..4], order: &windows[4..] };
    let provenance = Provenance { model: "tiny".into(), ..Provenance::default() };
    let mut progress = |progress: model_zoo::calibrate::Progress| {
        if progress.stage == "decomposition" {
            done(progress.done);
        }
    };
    build(&Source::open(folder)?, (settings, provenance), windows, (out, &mut progress))
}

fn built(folder: &Path, settings: &Settings, name: &str) -> PathBuf {
    let out = folder.join(name);
    build_at(folder, settings, &out, &mut |_| {}).unwrap();
    assert!(!journal_path(&out).exists());
    out
}

/// Logits of the whole prompt.
fn logits(model: Box<dyn CausalLm>) -> Vec<Vec<f32>> {
    let mut runner = Runner::of(model, 1, PROMPT.len());
    let mut sequence = runner.sequence(PROMPT.len());
    runner.step(vec![Chunk { sequence: &mut sequence, tokens: &PROMPT, logits: LogitRows::All }]).unwrap()
}

fn dense(folder: &Path) -> Vec<Vec<f32>> {
    logits(load(folder, &model_zoo::loader::LoadOptions::default()).unwrap().model)
}

fn of_prefix(artefact: &Artefact, blocks: usize) -> Vec<Vec<f32>> {
    let source = Prefix::new(artefact, blocks);
    logits(Box::new(CpuDecoder::load(artefact.config().clone(), &source, 2).unwrap()))
}

#[test]
fn a_stack_nears_the_dense_model_with_every_level() {
    let model = tiny();
    let truth = dense(model.path());
    for (method, name) in [(Method::Fitted, "fitted"), (Method::Published, "published")] {
        // Ranks and levels enough for all that there is: scaled or not, the model computes the same.
        let settings = Settings { levels: 8, rank: 24, ..settings(method, Order::Error) };
        let artefact = Artefact::open(&built(model.path(), &settings, name)).unwrap();
        let all = artefact.stack().len();
        let distances =
            [0, all / 3, all].map(|blocks| Distance::between(&truth, &of_prefix(&artefact, blocks)));
        assert!(distances[2].largest < 1e-2, "{name}: {distances:?}");
        assert!(
            distances[0].rms > distances[1].rms && distances[1].rms > distances[2].rms,
            "{name}: {distances:?}"
        );
        assert_eq!(artefact.stack().len(), 7 * 7 * LAYERS);
    }
}

#[test]
fn a_resumed_build_equals_one_that_was_not_interrupted_byte_for_byte() {
    let model = tiny();
    for order in [Order::Sensitivity, Order::PerplexityPerByte] {
        let settings = settings(Method::Fitted, order);
        let (whole, torn) = (model.path().join("whole"), model.path().join("torn"));
        // The journal as it was half-way is what a killed build leaves behind; its last record is cut off.
        build_at(model.path(), &settings, &whole, &mut |done| {
            if done == 20 {
                let journal = std::fs::read(journal_path(&whole)).unwrap();
                std::fs::write(journal_path(&torn), &journal[..journal.len() - 7]).unwrap();
            }
        })
        .unwrap();
        let mut begun_at = None;
        let resumed = Settings { threads: 1, ..settings.clone() };
        build_at(model.path(), &resumed, &torn, &mut |done| begun_at = begun_at.or(Some(done))).unwrap();
        assert!(begun_at.is_some_and(|done| done > 10), "{begun_at:?}: it began from scratch");
        assert!(std::fs::read(&whole).unwrap() == std::fs::read(&torn).unwrap(), "{order:?}");
        // Another build does not go on with this one's journal.
        build_at(model.path(), &settings, &torn, &mut |_| {
            std::fs::copy(journal_path(&torn), journal_path(&whole)).unwrap();
        })
        .unwrap();
        let other = Settings { rank: 3, ..settings };
        let refusal = build_at(model.path(), &other, &whole, &mut |_| {}).unwrap_err().to_string();
        assert!(refusal.contains("another build"), "{refusal}");
        std::fs::remove_file(journal_path(&whole)).unwrap();
    }
}

#[test]
fn a_stack_carries_its_tokenizer_and_the_sources_own_embedding() {
    let model = tiny();
    let path = built(model.path(), &settings(Method::Fitted, Order::Perplexity), "stack");
    let artefact = Artefact::open(&path).unwrap();
    let own = Tokenizer::load(&artefact.tokenizer().unwrap(), None).unwrap();
    let truth = Tokenizer::load(&TokenizerSource::Folder(model.path().to_owned()), None).unwrap();
    assert_eq!(own.encode("dabc", true).unwrap(), truth.encode("dabc", true).unwrap());
    let checkpoint = model_zoo::weights::safetensors::SafetensorsCheckpoint::open(model.path()).unwrap();
    let (name, tensors) = ("model.embed_tokens.weight", artefact.tensors());
    assert_eq!(tensors.tensor(name).unwrap().data, checkpoint.tensor(name).unwrap().data);
    // Published: every second level before any third, and a matrix's levels in order.
    let levels: Vec<_> = artefact.stack().iter().map(|entry| entry.level).collect();
    assert!(levels.is_sorted() && levels.len() == 3 * 7 * LAYERS);
}

/// A checkpoint in the authors' layout, of random blocks, and the dense weights that it stands for.
fn published_checkpoint(folder: &Path, config: &DecoderConfig) -> HashMap<String, Tensor> {
    const LEVELS: usize = 3;
    const RANK: usize = 4;
    let base =
        candle_core::safetensors::load(fixtures().join("llama/model.safetensors"), &Device::Cpu).unwrap();
    let mut state = 9u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as u32
    };
    let (mut published, mut truth) = (HashMap::new(), HashMap::new());
    for (name, tensor) in base.into_iter().filter(|(name, _)| !name.contains("_proj")) {
        published.insert(name.clone(), tensor.clone());
        truth.insert(name, tensor);
    }
    for linear in LinearId::all(config.num_layers) {
        let [rows, cols] = linear.projection.size(config);
        let mut sum = vec![0f32; rows * cols];
        for level in 0..LEVELS {
            let name = |part: &str| linear.weight_name().replace("weight", &format!("{part}_{level}"));
            let signs: Vec<u8> = (0..rows * cols / 8).map(|_| next() as u8).collect();
            let mut factor = |len: usize| -> Vec<f16> {
                (0..len).map(|_| f16::from_f32((next() % 1000) as f32 / (3000 << level) as f32)).collect()
            };
            let (u, vt) = (factor(rows * RANK), factor(RANK * cols));
            for (at, sum) in sum.iter_mut().enumerate() {
                let (row, col) = (at / cols, at % cols);
                let magnitude: f32 =
                    (0..RANK).map(|c| u[row * RANK + c].to_f32() * vt[c * cols + col].to_f32()).sum();
                *sum += if signs[at / 8] & (0x80 >> (at % 8)) != 0 { magnitude } else { -magnitude };
            }
            let signs = Tensor::from_vec(signs, rows * cols / 8, &Device::Cpu).unwrap();
            published.insert(name("qweight"), signs.to_dtype(DType::U8).unwrap());
            published.insert(name("u"), Tensor::from_vec(u, (rows, RANK), &Device::Cpu).unwrap());
            published.insert(name("vt"), Tensor::from_vec(vt, (RANK, cols), &Device::Cpu).unwrap());
        }
        truth.insert(linear.weight_name(), Tensor::from_vec(sum, (rows, cols), &Device::Cpu).unwrap());
    }
    candle_core::safetensors::save(&published, folder.join("model.safetensors")).unwrap();
    truth
}

#[test]
fn a_published_checkpoint_equals_the_dense_weights_that_it_stands_for() {
    let fixture = fixtures().join("llama");
    let config = DecoderConfig::from_hf(&fixture.join("config.json")).unwrap();
    let (folder, reference) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for to in [&folder, &reference] {
        std::fs::copy(fixture.join("config.json"), to.path().join("config.json")).unwrap();
        std::fs::write(to.path().join("tokenizer.json"), TOKENIZER).unwrap();
    }
    let truth = published_checkpoint(folder.path(), &config);
    candle_core::safetensors::save(&truth, reference.path().join("model.safetensors")).unwrap();
    // Budgets that take the last matrix's levels first, in no order, and leave some out.
    let linears: Vec<_> = LinearId::all(config.num_layers).collect();
    let name = |linear: &LinearId| format!("layer.{}.{}", linear.layer, linear.projection.module());
    let mut levels: HashMap<String, usize> = linears.iter().map(|linear| (name(linear), 1)).collect();
    let mut budgets = vec![serde_json::json!({"memory": 1000, "layers": levels})];
    for (step, linear) in linears.iter().rev().chain(linears.iter().take(3)).enumerate() {
        *levels.get_mut(&name(linear)).unwrap() += 1;
        budgets.insert(0, serde_json::json!({"memory": 1001 + step, "layers": levels}));
    }
    let order = folder.path().join("compression_config.json");
    std::fs::write(&order, serde_json::to_string(&budgets).unwrap()).unwrap();
    let out = folder.path().join("imported");
    import(folder.path(), Provenance::default(), &out).unwrap();
    let artefact = Artefact::open(&out).unwrap();
    let found: Vec<_> = artefact.stack().iter().map(|entry| (entry.linear, entry.level)).collect();
    assert!(found[..linears.len()].iter().copied().eq(linears.iter().rev().map(|&linear| (linear, 1))));
    assert!(found[linears.len()..][..3].iter().copied().eq(linears[..3].iter().map(|&linear| (linear, 2))));
    assert_eq!(found.len(), 2 * linears.len());
    let distance = Distance::between(&dense(reference.path()), &of_prefix(&artefact, found.len()));
    assert!(distance.largest < 1e-4, "{distance:?}");

    *levels.get_mut(&name(&linears[0])).unwrap() = 4;
    budgets.push(serde_json::json!({"memory": 5000, "layers": levels}));
    std::fs::write(&order, serde_json::to_string(&budgets).unwrap()).unwrap();
    let refusal = import(folder.path(), Provenance::default(), &out).unwrap_err().to_string();
    assert!(refusal.contains("the checkpoint has 3"), "{refusal}");
}
