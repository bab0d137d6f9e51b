//! Weights in levels on the GPU's decoder, on the emulated device: against the CPU's over the matrices that the levels add
//! up to, and across growing and shrinking.

use std::path::Path;

use model_zoo::ZooError;
use model_zoo::compression::options::DropLayers;
use model_zoo::compression::{CompressionOptions, Plan};
use model_zoo::loader::{LoadOptions, Target, load};
use model_zoo::models::CausalLm;
use model_zoo::step::LogitRows;
use tempfile::TempDir;

use crate::bitstack::{BLOCKS, artefact, bytes_of, summed};
use crate::gpu::{compile, device, error, tokens};
use crate::support::{Chunk, Runner, Sequence};
use crate::tiny::LAYERS;

const CAPACITY: usize = 64;

fn on_gpu(path: &Path, order: usize, weight_budget: Option<u64>) -> model_zoo::Result<Box<dyn CausalLm>> {
    let device = Target::Device(device(order));
    load(path, &LoadOptions { device, weight_budget, ..LoadOptions::default() }).map(|loaded| loaded.model)
}

/// Logits by row and token of dense plans; `schedule[step][row]` is a number of tokens.
fn run(runner: &mut Runner, blocks: &[Option<usize>], schedule: &[Vec<usize>]) -> Vec<Vec<Vec<f32>>> {
    let rows: Vec<_> = blocks.iter().map(|&blocks| (blocks, Plan::dense(LAYERS))).collect();
    run_plans(runner, &rows, schedule)
}

/// The same of rows with these blocks and plans.
fn run_plans(
    runner: &mut Runner,
    rows: &[(Option<usize>, Plan)],
    schedule: &[Vec<usize>],
) -> Vec<Vec<Vec<f32>>> {
    let mut sequences: Vec<Sequence> = rows
        .iter()
        .map(|(blocks, plan)| {
            let mut sequence = runner.sequence_of(plan.clone(), CAPACITY);
            sequence.state.blocks = *blocks;
            sequence
        })
        .collect();
    let logits = steps(runner, &mut sequences, schedule);
    sequences.into_iter().for_each(|sequence| runner.give_back(sequence));
    logits
}

fn steps(runner: &mut Runner, sequences: &mut [Sequence], schedule: &[Vec<usize>]) -> Vec<Vec<Vec<f32>>> {
    let mut all = vec![Vec::new(); sequences.len()];
    let prompts: Vec<Vec<u32>> = (0..sequences.len()).map(|seed| tokens(seed as u32, CAPACITY)).collect();
    for counts in schedule {
        let mut chunks = Vec::new();
        let mut owners = Vec::new();
        for (i, sequence) in sequences.iter_mut().enumerate().filter(|(i, _)| counts[*i] > 0) {
            owners.extend(std::iter::repeat_n(i, counts[i]));
            let tokens = &prompts[i][sequence.len..sequence.len + counts[i]];
            chunks.push(Chunk { sequence, tokens, logits: LogitRows::All });
        }
        let logits = runner.step(chunks).unwrap();
        owners.into_iter().zip(logits).for_each(|(row, logits)| all[row].push(logits));
    }
    all
}

/// What the CPU's decoder makes of row `row`, alone, with the matrices that `blocks` blocks add up to.
fn expected(folder: &Path, path: &Path, (row, blocks): (usize, usize), len: usize) -> Vec<Vec<f32>> {
    expected_of(&summed(folder, path, blocks), (row, &Plan::dense(LAYERS)), len)
}

/// The same of a plan, and of matrices that are added up already.
fn expected_of(sums: &TempDir, (row, plan): (usize, &Plan), len: usize) -> Vec<Vec<f32>> {
    let mut runner = Runner::new(sums.path(), 1, CAPACITY);
    let mut sequence = runner.sequence_of(plan.clone(), CAPACITY);
    let tokens = &tokens(row as u32, CAPACITY)[..len];
    runner.step(vec![Chunk { sequence: &mut sequence, tokens, logits: LogitRows::All }]).unwrap()
}

#[test]
fn rows_of_different_levels_share_steps_and_equal_the_cpus_sums() {
    let (folder, path) = artefact();
    let blocks = [BLOCKS, 0, 29, 61];
    let sums = blocks.map(|blocks| summed(folder.path(), &path, blocks));
    let decode = vec![1; 4];
    // Few tokens; many, in runs of each count and as few between them; steps that are captured, replayed, and padded; a
    // token alone.
    let schedule = [
        vec![5, 3, 0, 1],
        vec![34, 1, 40, 0],
        decode.clone(),
        decode.clone(),
        decode.clone(),
        vec![1, 0, 1, 1],
        vec![0, 33, 0, 35],
        vec![0, 0, 1, 0],
        vec![1, 0, 0, 0],
        decode.clone(),
        vec![1, 1, 0, 0],
    ];
    let drop = |attention, ffn| {
        let drop = Some(DropLayers { attention, ffn, joint: 0 });
        compile(&CompressionOptions { drop, ..CompressionOptions::default() })
    };
    // Sublayers of all rows, and of some, which are gathered.
    let dense = [(); 4].map(|()| Plan::dense(LAYERS));
    let mixed = [drop(3, 0), drop(0, 3), Plan::dense(LAYERS), drop(2, 2)];
    for (order, plans) in [dense, mixed].into_iter().enumerate() {
        let mut runner = Runner::of(on_gpu(&path, order, None).unwrap(), 4, CAPACITY);
        let rows: Vec<_> = blocks.into_iter().map(Some).zip(plans.clone()).collect();
        let found = run_plans(&mut runner, &rows, &schedule);
        for (row, (found, plan)) in found.iter().zip(&plans).enumerate() {
            let apart = error(found, &expected_of(&sums[row], (row, plan), found.len()));
            let blocks = blocks[row];
            assert!(apart < 2e-2, "row {row} of {blocks} blocks, {plan:?}: relative error {apart:.2e}");
        }
    }
}

#[test]
fn ffns_that_tokens_leave_out_add_nothing() {
    let (folder, path) = artefact();
    let sums = summed(folder.path(), &path, BLOCKS);
    let plan = |json: &str| compile(&serde_json::from_str(json).unwrap());
    let skip = |json: &str| plan(&format!(r#"{{"ffn_skip": {{"target": 0.4, "warmup": 2, {json}}}}}"#));
    let all = skip(r#""threshold": -2.0, "max_skip": 1"#);
    let some = [skip(r#""selection": "static""#), skip(r#""selection": "random""#), Plan::dense(LAYERS)];
    // Blocks that all tokens of a step leave out, of one token and of several, and such that some do.
    let steps: [&[usize]; 9] = [
        &[20, 20, 20],
        &[1, 1, 1],
        &[1, 1, 1],
        &[1, 1, 1],
        &[1, 1, 1],
        &[1, 0, 0],
        &[1, 0, 0],
        &[1, 0, 0],
        &[1, 1, 1],
    ];
    for (i, plans) in [[all.clone(), all.clone(), all], some].into_iter().enumerate() {
        let cpu = load(sums.path(), &LoadOptions::default()).unwrap().model;
        let gpu = on_gpu(&path, i, None).unwrap();
        let [cpu, gpu] = [cpu, gpu].map(|model| crate::gpu::run(model, &plans, &steps));
        let apart = error(&gpu.0, &cpu.0);
        assert!(apart < 3e-2, "set {i}: relative error {apart:.2e}");
        for (row, (cpu, gpu)) in cpu.1.iter().zip(&gpu.1).enumerate() {
            assert_eq!(gpu.ffns_skipped, cpu.ffns_skipped, "set {i}, row {row}");
        }
        assert!(cpu.1[0].ffns_skipped > 0);
    }
}

#[test]
fn captured_steps_of_many_rows_follow_the_levels_of_each() {
    let (folder, path) = artefact();
    let rows = 37;
    let mut runner = Runner::of(on_gpu(&path, 1, None).unwrap(), rows, CAPACITY);
    let [all, base] = [BLOCKS, 0].map(|blocks| expected(folder.path(), &path, (0, blocks), 5));
    let schedule = vec![vec![1; rows]; 5];
    // The same class of steps throughout: all alike, all alike by less, and mixed.
    for few in [0, rows, 20] {
        let blocks: Vec<_> = (0..rows).map(|row| Some(if row < few { 0 } else { BLOCKS })).collect();
        let found = run(&mut runner, &blocks, &schedule);
        let apart = error(&found[0], if few > 0 { &base } else { &all });
        assert!(apart < 2e-2, "{few} rows of the base: relative error {apart:.2e}");
        for row in [19, 20, rows - 1] {
            let blocks = if row < few { 0 } else { BLOCKS };
            let apart = error(&found[row], &expected(folder.path(), &path, (row, blocks), 5));
            assert!(apart < 2e-2, "{few} rows of the base, row {row}: relative error {apart:.2e}");
        }
    }
}

#[test]
fn growing_and_shrinking_between_steps_gives_the_same_bits_and_what_is_not_held_is_refused() {
    let (folder, path) = artefact();
    let mut whole = on_gpu(&path, 0, None).unwrap();
    let base = bytes_of(&mut *whole, 0);
    assert_eq!(whole.elastic().unwrap().held(), BLOCKS);
    assert_eq!(whole.dims().weight_bytes as u64, bytes_of(&mut *whole, BLOCKS));
    let refused = on_gpu(&path, 0, Some(base - 1)).err().unwrap();
    let ZooError::WeightBudget { least, .. } = refused else { panic!("{refused}") };
    assert_eq!(least, base);

    let budget = bytes_of(&mut *whole, 40) + 5;
    let mut runner = Runner::of(on_gpu(&path, 0, Some(budget)).unwrap(), 2, CAPACITY);
    assert_eq!(runner.model.elastic().unwrap().held(), 40);
    // A prompt of many tokens, and single tokens until their step is captured and replayed.
    let schedule = [vec![35, 2], vec![1, 1], vec![1, 1], vec![1, 1], vec![1, 1]];
    let before = run(&mut runner, &[Some(40), Some(7)], &schedule);
    let elastic = runner.model.elastic().unwrap();
    (0..50).for_each(|_| elastic.grow().unwrap());
    assert_eq!(elastic.held(), 40 + 50);
    assert_eq!(run(&mut runner, &[Some(40), Some(7)], &schedule), before, "more is held");
    let elastic = runner.model.elastic().unwrap();
    (0..83).for_each(|_| elastic.shrink());
    assert_eq!(elastic.held(), 7);
    let mut sequence = runner.sequence(CAPACITY);
    sequence.state.blocks = Some(8);
    let chunk = Chunk { sequence: &mut sequence, tokens: &[5], logits: LogitRows::Last };
    let message = runner.step(vec![chunk]).unwrap_err().to_string();
    assert!(message.contains("row 0: is served with 8 blocks, of which not all are held"), "{message}");
    runner.give_back(sequence);
    // By the captured step, whose other rows had more: what is gone is not read.
    let less = run(&mut runner, &[None, Some(7)], &schedule);
    assert_eq!(less[1], before[1]);
    let apart = error(&less[0], &expected(folder.path(), &path, (0, 7), 39));
    assert!(apart < 2e-2, "seven blocks: relative error {apart:.2e}");
    let elastic = runner.model.elastic().unwrap();
    (0..BLOCKS).for_each(|_| elastic.shrink());
    assert_eq!(elastic.held(), 0, "the base stays");
    (0..2 * BLOCKS).for_each(|_| elastic.grow().unwrap());
    assert_eq!(elastic.held(), BLOCKS, "there is no more than all");
    assert_eq!(run(&mut runner, &[Some(40), Some(7)], &schedule), before);
}

#[test]
fn a_damaged_block_is_not_used_and_what_is_held_serves_on() {
    let (_folder, path) = artefact();
    let stored = model_zoo::compression::bitstack::Artefact::open(&path).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[(stored.stack()[30].offset + 7) as usize] ^= 4;
    std::fs::write(&path, bytes).unwrap();
    assert!(on_gpu(&path, 0, None).err().unwrap().to_string().contains("checksum"));
    let least = match on_gpu(&path, 0, Some(0)).err().unwrap() {
        ZooError::WeightBudget { least, .. } => least,
        other => panic!("{other}"),
    };
    let mut runner = Runner::of(on_gpu(&path, 0, Some(least)).unwrap(), 1, CAPACITY);
    let elastic = runner.model.elastic().unwrap();
    (0..9).for_each(|_| elastic.grow().unwrap());
    let before = run(&mut runner, &[Some(9)], &[vec![6]]);
    let elastic = runner.model.elastic().unwrap();
    while elastic.grow().is_ok() {}
    assert_eq!(elastic.held(), 30);
    assert!(elastic.grow().is_err(), "and it stays refused");
    assert_eq!(run(&mut runner, &[Some(9)], &[vec![6]]), before);
}
