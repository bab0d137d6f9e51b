//! A model in levels: every prefix of its stack is the model of its weights, whatever was held before.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use model_zoo::ZooError;
use model_zoo::compression::bitstack::avd::add_level;
use model_zoo::compression::bitstack::{Artefact, LinearId};
use model_zoo::loader::{LoadOptions, load};
use model_zoo::models::CausalLm;
use model_zoo::step::LogitRows;
use tempfile::TempDir;

use crate::stacked::write_artefact;
use crate::support::{Chunk, Distance, Runner};
use crate::tiny::{LAYERS, write};

const LEVELS: usize = 4;
const RANK: usize = 3;
pub(crate) const BLOCKS: usize = (LEVELS - 1) * 7 * LAYERS;
const PROMPT: [u32; 19] = [5, 9, 200, 31, 7, 7, 81, 14, 3, 99, 120, 44, 61, 8, 250, 17, 23, 42, 4];
const CAPACITY: usize = 48;

/// A folder with a checkpoint and its artefact.
pub(crate) fn artefact() -> (TempDir, PathBuf) {
    let folder = write(|_| false);
    let path = folder.path().join("tiny.bitstack");
    write_artefact(folder.path(), &path, (LEVELS, RANK));
    (folder, path)
}

fn load_within(path: &Path, weight_budget: Option<u64>) -> model_zoo::Result<Box<dyn CausalLm>> {
    load(path, &LoadOptions { weight_budget, ..LoadOptions::default() }).map(|loaded| loaded.model)
}

/// Bytes with `blocks` held.
pub(crate) fn bytes_of(model: &mut dyn CausalLm, blocks: usize) -> u64 {
    model.elastic().unwrap().bytes_of(blocks)
}

/// Logits of the prompt and of the tokens that `decoded` names, one step each, by the first `blocks`.
fn logits(runner: &mut Runner, blocks: Option<usize>, decoded: &[u32]) -> Vec<Vec<f32>> {
    let mut sequence = runner.sequence(CAPACITY);
    (sequence.state.blocks, sequence.state.decode_from) = (blocks, Some(PROMPT.len()));
    let mut all = Vec::new();
    for tokens in std::iter::once(&PROMPT[..]).chain(decoded.chunks(1)) {
        let chunk = Chunk { sequence: &mut sequence, tokens, logits: LogitRows::All };
        all.extend(runner.step(vec![chunk]).unwrap());
    }
    all
}

const DECODED: [u32; 9] = [77, 3, 190, 66, 12, 240, 9, 9, 31];

/// The checkpoint in `folder` with the matrices that the first `blocks` of the artefact add up to, in f32.
pub(crate) fn summed(folder: &Path, path: &Path, blocks: usize) -> TempDir {
    let artefact = Artefact::open(path).unwrap();
    let mut sums: HashMap<LinearId, Vec<f32>> = HashMap::new();
    for entry in artefact.base().iter().chain(&artefact.stack()[..blocks]) {
        let shape = artefact.shape(entry.linear);
        let values = sums.entry(entry.linear).or_insert_with(|| vec![0.0; shape.rows * shape.cols]);
        add_level(values, shape, (&artefact.read_block(entry).unwrap(), 1.0));
    }
    let mut tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
    for (linear, values) in sums {
        let shape = artefact.shape(linear);
        let tensor = Tensor::from_vec(values, (shape.rows, shape.cols), &Device::Cpu).unwrap();
        tensors.insert(linear.weight_name(), tensor);
    }
    let target = tempfile::tempdir().unwrap();
    candle_core::safetensors::save(&tensors, target.path().join("model.safetensors")).unwrap();
    std::fs::copy(folder.join("config.json"), target.path().join("config.json")).unwrap();
    target
}

#[test]
fn every_prefix_is_the_model_of_its_weights() {
    let (folder, path) = artefact();
    let mut runner = Runner::of(load_within(&path, None).unwrap(), 8, CAPACITY);
    let mut losses = Vec::new();
    let dense = logits(&mut Runner::new(folder.path(), 1, CAPACITY), None, &DECODED);
    for blocks in [0, 17, 61, BLOCKS] {
        let found = logits(&mut runner, Some(blocks), &DECODED);
        let reference = summed(folder.path(), &path, blocks);
        let expected = logits(&mut Runner::new(reference.path(), 1, CAPACITY), None, &DECODED);
        let spread = Distance::between(&expected, &vec![vec![0.0; 256]; expected.len()]).rms;
        let apart = Distance::between(&found, &expected).rms;
        assert!(apart < 0.03 * spread, "{blocks} blocks: {apart} of {spread}");
        losses.push(Distance::between(&found, &dense).rms);
    }
    // Between whole levels nothing is promised of random weights.
    assert!(
        losses[3] < 0.8 * losses[0],
        "the base and the whole stack are {losses:?} from the whole weights"
    );
}

#[test]
fn a_budget_holds_the_longest_prefix_that_fits_and_a_row_of_it_gets_its_bits() {
    let (_folder, path) = artefact();
    let mut whole = load_within(&path, None).unwrap();
    let base = bytes_of(&mut *whole, 0);
    let refused = load_within(&path, Some(base - 1)).err().unwrap().to_string();
    assert!(refused.contains(&format!("at least {base}")), "{refused}");
    let elastic = whole.elastic().unwrap();
    assert_eq!((elastic.num_blocks(), elastic.held(), elastic.num_levels()), (BLOCKS, BLOCKS, LEVELS));
    assert_eq!([1, 2, LEVELS].map(|levels| elastic.blocks_of_levels(levels)), [0, BLOCKS / 3, BLOCKS]);
    assert!((elastic.mean_levels(BLOCKS) - LEVELS as f64).abs() < 1e-6);
    let mut whole = Runner::of(whole, 4, CAPACITY);
    for blocks in [0, 29, 84] {
        let budget = bytes_of(&mut *whole.model, blocks) + 100;
        let mut model = load_within(&path, Some(budget)).unwrap();
        assert_eq!(model.elastic().unwrap().held(), blocks);
        let held = model.dims().weight_bytes as u64;
        assert!(held == bytes_of(&mut *model, blocks) && held <= budget);
        assert!(budget < bytes_of(&mut *model, blocks + 1), "the next block does not fit");
        let own = logits(&mut Runner::of(model, 1, CAPACITY), None, &DECODED);
        assert_eq!(logits(&mut whole, Some(blocks), &DECODED), own, "{blocks}");
    }
}

#[test]
fn growing_and_shrinking_gives_the_same_bits() {
    let (_folder, path) = artefact();
    let mut model = load_within(&path, None).unwrap();
    let budget = bytes_of(&mut *model, 40);
    let mut runner = Runner::of(load_within(&path, Some(budget)).unwrap(), 2, CAPACITY);
    let before = logits(&mut runner, None, &DECODED);
    let elastic = runner.model.elastic().unwrap();
    (0..50).for_each(|_| elastic.grow().unwrap());
    (0..70).for_each(|_| elastic.shrink());
    (0..20).for_each(|_| elastic.grow().unwrap());
    assert_eq!(elastic.held(), 40);
    assert_eq!(logits(&mut runner, None, &DECODED), before);
    let elastic = runner.model.elastic().unwrap();
    (0..BLOCKS).for_each(|_| elastic.shrink());
    (0..2 * BLOCKS).for_each(|_| elastic.grow().unwrap());
    assert_eq!(elastic.held(), BLOCKS, "the base stays, and there is no more than all");
}

#[test]
fn a_damaged_block_is_not_used_and_what_is_held_serves_on() {
    let (_folder, path) = artefact();
    let artefact = Artefact::open(&path).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[(artefact.stack()[30].offset + 7) as usize] ^= 4;
    std::fs::write(&path, bytes).unwrap();
    let error = load_within(&path, None).err().unwrap().to_string();
    assert!(error.contains("tiny.bitstack") && error.contains("checksum"), "{error}");
    let refused = load_within(&path, Some(0)).err().unwrap();
    let ZooError::WeightBudget { least, .. } = refused else { panic!("{refused}") };
    let mut runner = Runner::of(load_within(&path, Some(least)).unwrap(), 3, CAPACITY);
    let elastic = runner.model.elastic().unwrap();
    (0..9).for_each(|_| elastic.grow().unwrap());
    let before = logits(&mut runner, Some(9), &DECODED);
    let elastic = runner.model.elastic().unwrap();
    while elastic.grow().is_ok() {}
    assert_eq!(elastic.held(), 30);
    assert!(elastic.grow().is_err(), "and it stays refused");
    assert_eq!(logits(&mut runner, Some(9), &DECODED), before);
    let mut sequence = runner.sequence(CAPACITY);
    sequence.state.blocks = Some(31);
    let chunk = Chunk { sequence: &mut sequence, tokens: &PROMPT, logits: LogitRows::Last };
    assert!(runner.step(vec![chunk]).unwrap_err().to_string().contains("31 blocks"));
}
