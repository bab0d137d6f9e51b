//! The conformance table of the compression methods: each is exact about what it leaves out, on the CPU and on a GPU.
//!
//! A method is a row of [`methods`]; what rows have to meet are checks, which run in every [`Place`].

mod rows;

use std::path::Path;

use model_zoo::compression::options::{FfnMode, FfnSkip, SkipDecode, Vision, VisionBaseline};
use model_zoo::compression::{CompressionOptions, Plan, RowState, Sublayer};
use model_zoo::step::LogitRows;

use crate::place::{BF16, INT8, Place, everywhere};
use crate::support::{Chunk, Runner, Sequence};
use crate::tiny::{LAYERS, write_for_joint_steps};
use rows::{
    LEVELS, OUTPUT, PROMPT, baseline, compile, drop_layers, ffn_skip, images, levels, methods, models, vision,
};

everywhere! {
    what_is_off_is_dense_bit_for_bit,
    dropping_equals_zeroing_the_output_projection,
    all_levels_are_no_limit_and_fewer_are_other_weights,
    every_method_is_exact_with_whole_weights,
    every_method_is_exact_with_weights_in_levels,
    ffn_skipping_warms_up_tests_again_and_keeps_the_cap,
    the_vote_of_a_batch_skips_for_all_or_none,
}

const CAPACITY: usize = PROMPT.len() + OUTPUT;

/// What became of a sequence: the logits of every output token, the tokens that they chose, and its state.
#[derive(Default)]
struct Ran {
    logits: Vec<Vec<f32>>,
    outputs: Vec<u32>,
    state: RowState,
}

fn argmax(logits: &[f32]) -> u32 {
    assert!(logits.iter().all(|v| v.is_finite()), "something unwritten was read");
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.unwrap().0 as u32
}

fn runner(place: Place, path: &Path, num_sequences: usize) -> Runner {
    Runner::of(place.load(path), num_sequences, CAPACITY)
}

/// A sequence with the prompt's image.
fn showing(runner: &mut Runner, plan: &Plan) -> Sequence {
    let mut sequence = runner.sequence_of(plan.clone(), CAPACITY);
    sequence.images = images(plan.options());
    sequence.state.decode_from = Some(PROMPT.len());
    sequence
}

/// Prefills and decodes, all sequences in every step: greedily, or on with the tokens that are told.
fn generate(runner: &mut Runner, plans: &[&Plan], told: Option<&[&[u32]]>) -> Vec<Ran> {
    let mut sequences: Vec<_> = plans.iter().map(|plan| showing(runner, plan)).collect();
    let mut ran: Vec<Ran> = plans.iter().map(|_| Ran::default()).collect();
    let mut next: Vec<Vec<u32>> = vec![PROMPT.to_vec(); plans.len()];
    for step in 0..OUTPUT {
        let chunks = sequences.iter_mut().zip(&next);
        let chunks = chunks.map(|(sequence, tokens)| Chunk { sequence, tokens, logits: LogitRows::Last });
        let found = runner.step(chunks.collect()).unwrap();
        for (row, (ran, logits)) in ran.iter_mut().zip(found).enumerate() {
            ran.outputs.push(argmax(&logits));
            ran.logits.push(logits);
            next[row] = vec![told.map_or(ran.outputs[step], |told| told[row][step])];
        }
    }
    for (ran, sequence) in ran.iter_mut().zip(sequences) {
        ran.state = sequence.state.clone();
        runner.give_back(sequence);
    }
    ran
}

fn alone(runner: &mut Runner, plan: &Plan) -> Ran {
    generate(runner, &[plan], None).remove(0)
}

fn what_is_off_is_dense_bit_for_bit(place: Place) {
    let model = write_for_joint_steps(|_| false);
    let mut runner = runner(place, model.path(), 2);
    let dense = Plan::dense(LAYERS);
    let expected = alone(&mut runner, &dense);
    let all = SkipDecode { min_layers: Some(LAYERS), ..SkipDecode::default() };
    for options in [
        CompressionOptions { skip_decode: Some(all), ..CompressionOptions::default() },
        drop_layers(0, 0),
        ffn_skip(|skip| skip.target = Some(0.0)),
        vision(|vision| *vision = Vision { merge: Some(2.0), layers: Some(Vec::new()), ..Vision::default() }),
        // Everything is looked at, and nothing is dropped.
        vision(|vision| vision.alpha = Some(0.0)),
        vision(|vision| vision.beta = Some(0.0)),
        baseline(VisionBaseline::Pool, 8),
    ] {
        let ran = alone(&mut runner, &compile(options.clone()));
        assert!(ran.logits == expected.logits, "{options:?}");
        assert_eq!(ran.state.ffns_skipped, 0);
    }
    // Never saturated: every decision is made, and none skips. A GPU computes steps in which one is made by kernels of
    // their own: the dense row shares them.
    let undecided = compile(ffn_skip(|skip| skip.threshold = Some(1.5)));
    let ran = generate(&mut runner, &[&dense, &undecided], Some(&[&expected.outputs[..]; 2]));
    assert!(ran[1].logits == ran[0].logits, "{:?}", undecided.options());
    assert_eq!(ran[1].state.ffns_skipped, 0);
    place.assert_same(&ran[0].logits, &expected.logits, (BF16, "dense beside decisions"));
}

fn dropping_equals_zeroing_the_output_projection(place: Place) {
    let model = write_for_joint_steps(|_| false);
    // The least important by the calibration of `offer`.
    let is_dropped = |name: &str| {
        ["layers.3.self_attn.o_proj", "layers.1.self_attn.o_proj", "layers.2.mlp.down_proj"]
            .iter()
            .any(|dropped| name.contains(dropped))
    };
    let zeroed = write_for_joint_steps(is_dropped);
    let expected = alone(&mut runner(place, zeroed.path(), 1), &Plan::dense(LAYERS)).logits;
    let mut runner = runner(place, model.path(), 1);
    assert_eq!(alone(&mut runner, &compile(drop_layers(2, 1))).logits, expected);
    assert_ne!(alone(&mut runner, &Plan::dense(LAYERS)).logits, expected);
}

fn all_levels_are_no_limit_and_fewer_are_other_weights(place: Place) {
    let (_folder, paths) = models();
    let [mut whole, mut artefact] = paths.map(|path| runner(place, &path, 1));
    let dense = alone(&mut artefact, &Plan::dense(LAYERS)).logits;
    assert_eq!(alone(&mut artefact, &compile(levels(LEVELS))).logits, dense);
    let mut others = vec![dense];
    for fewer in 1..LEVELS {
        let logits = alone(&mut artefact, &compile(levels(fewer))).logits;
        assert!(!others.contains(&logits), "{fewer}");
        others.push(logits);
    }
    let all = alone(&mut whole, &Plan::dense(LAYERS)).logits;
    assert_eq!(alone(&mut whole, &compile(levels(1))).logits, all);
}

#[test]
fn dropped_attention_holds_no_kv() {
    let demand = compile(drop_layers(2, 4)).kv_demand();
    let slots: Vec<_> = (0..LAYERS).map(|layer| demand.kv_len(layer, 40)).collect();
    assert_eq!(slots, [40, 0, 40, 0, 40, 40]);
}

/// A method whose sequence ran alone.
struct Row {
    name: &'static str,
    plan: Plan,
    alone: Ran,
}

fn every_method_is_exact_with_whole_weights(place: Place) {
    let (_folder, [whole, _]) = models();
    let (mut runner, rows) = every_method_is_exact(place, (&whole, BF16));
    // Steps in which no FFN is decided about are of another kind: a GPU runs them as one launch.
    let decided: Vec<_> = rows.iter().filter(|row| row.plan.options().ffn_skip.is_none()).collect();
    a_mixed_batch_equals_each_row_alone(place, &mut runner, &decided);
}

fn every_method_is_exact_with_weights_in_levels(place: Place) {
    let (_folder, [_, artefact]) = models();
    // The CPU rounds what it multiplies with levels to int8.
    every_method_is_exact(place, (&artefact, INT8));
}

/// What holds of every method, over one run of each alone: on an emulated device runs take long.
fn every_method_is_exact(place: Place, (path, rounding): (&Path, f64)) -> (Runner, Vec<Row>) {
    let methods = methods();
    let mut runner = runner(place, path, methods.len());
    let row = |(name, options)| {
        let plan = compile(options);
        let alone = alone(&mut runner, &plan);
        Row { name, plan, alone }
    };
    let rows: Vec<Row> = methods.into_iter().map(row).collect();
    rows.iter().for_each(counters_equal_the_closed_form);
    a_row_alone_equals_the_cpus(place, (path, rounding), &rows);
    a_mixed_batch_equals_each_row_alone(place, &mut runner, &rows.iter().collect::<Vec<_>>());
    rows.iter().for_each(|row| a_replay_in_chunks_equals_the_incremental_run(place, &mut runner, row));
    (runner, rows)
}

fn counters_equal_the_closed_form(Row { name, plan, alone }: &Row) {
    let state = &alone.state;
    let [attention, ffn] = plan.work(CAPACITY - 1);
    let mut expected = [attention, ffn - state.ffns_skipped];
    if let Some(outcome) = &state.visual {
        // What went on to the next layer ran the FFN.
        let shown = outcome.ran[0] as u64;
        let ran = |layer: usize| outcome.ran.get(layer).copied().unwrap_or(outcome.survivors.len()) as u64;
        let less = |after: usize| (0..LAYERS).map(|layer| shown - ran(layer + after)).sum::<u64>();
        let ffn_dropped = |layer: &usize| !plan.runs(*layer, Sublayer::Ffn, 0);
        let uncounted: u64 = (0..LAYERS).filter(ffn_dropped).map(|layer| shown - ran(layer + 1)).sum();
        expected = [expected[0] - less(0), expected[1] + uncounted - less(1)];
        assert_eq!(state.visual_left_out, less(0) + less(1) - uncounted, "{name}");
        assert!(outcome.survivors.len() < 8 && outcome.survivors.len() >= 2, "{name}: {outcome:?}");
    }
    assert_eq!(state.sublayers_run, expected, "{name}");
    assert_eq!(state.ffns_skipped > 0, name.starts_with("ffn_skip"), "{name}");
}

/// A GPU decides what to leave out as the CPU does, and comes to the same.
fn a_row_alone_equals_the_cpus(place: Place, (path, rounding): (&Path, f64), rows: &[Row]) {
    let mut cpu = runner(Place::Cpu, path, 1);
    for Row { name, plan, alone } in rows {
        let expected = generate(&mut cpu, &[plan], Some(&[&alone.outputs])).remove(0);
        place.assert_same(&alone.logits, &expected.logits, (rounding, name));
        assert_eq!(alone.state, expected.state, "{name}");
    }
}

fn a_mixed_batch_equals_each_row_alone(place: Place, runner: &mut Runner, rows: &[&Row]) {
    let plans: Vec<_> = rows.iter().map(|row| &row.plan).collect();
    // The same tokens go on where the best two logits are nearly alike.
    let told: Vec<_> = rows.iter().map(|row| &row.alone.outputs[..]).collect();
    for (found, Row { name, alone, .. }) in generate(runner, &plans, Some(&told)).iter().zip(rows) {
        place.assert_same(&found.logits, &alone.logits, (BF16, name));
        assert_eq!(found.state, alone.state, "{name}");
    }
}

fn a_replay_in_chunks_equals_the_incremental_run(place: Place, runner: &mut Runner, row: &Row) {
    let Row { name, plan, alone } = row;
    let tokens: Vec<u32> = PROMPT.iter().chain(&alone.outputs[..OUTPUT - 1]).copied().collect();
    let mut again = showing(runner, plan);
    again.state = alone.state.clone();
    let mut logits = Vec::new();
    // What runs whole is not cut, and ends where the prompt does.
    let whole = plan.filter().map_or(0..0, |filter| filter.first..filter.prompt_len);
    let (start, rest) = tokens.split_at(whole.end);
    let (before_whole, whole) = start.split_at(whole.start);
    for chunk in before_whole.chunks(2).chain(whole.chunks(PROMPT.len())).chain(rest.chunks(13)) {
        let chunk = Chunk { sequence: &mut again, tokens: chunk, logits: LogitRows::All };
        logits.extend(runner.step(vec![chunk]).unwrap());
    }
    place.assert_same(&logits[PROMPT.len() - 1..], &alone.logits, (BF16, name));
    assert_eq!(again.state.sublayers_run, alone.state.sublayers_run.map(|count| 2 * count), "{name}");
    runner.give_back(again);
}

/// Which FFNs each output token skipped.
fn skipped(state: &RowState) -> Vec<Vec<usize>> {
    let of = |token| (0..LAYERS).filter(|&layer| state.ffn.is_skipped(token, layer)).collect();
    (0..state.ffn.num_recorded()).map(of).collect()
}

fn ffn_skipping_warms_up_tests_again_and_keeps_the_cap(place: Place) {
    let model = write_for_joint_steps(|_| false);
    let mut runner = runner(place, model.path(), 1);
    // Saturated from the first test on: of the warm layers 1..5 the first tests, the next are skipped.
    for (max_skip, target, expected) in
        [(1, 0.6, vec![2, 4]), (2, 0.6, vec![2, 3]), (9, 0.6, vec![2, 3, 4]), (9, 0.15, vec![2, 3])]
    {
        let always = ffn_skip(|skip| {
            *skip =
                FfnSkip { max_skip: Some(max_skip), threshold: Some(-2.0), target: Some(target), ..*skip };
        });
        let state = alone(&mut runner, &compile(always)).state;
        let tokens = skipped(&state);
        // The first output token comes of the prompt; three run whole after it counts as the first.
        assert_eq!(tokens.len(), OUTPUT - 1 - 3);
        assert!(tokens.iter().all(|layers| *layers == expected), "{max_skip} {target}: {tokens:?}");
    }
}

fn the_vote_of_a_batch_skips_for_all_or_none(place: Place) {
    let model = write_for_joint_steps(|_| false);
    let mut runner = runner(place, model.path(), 2);
    let vote = |threshold, quorum| {
        compile(ffn_skip(|skip| {
            *skip = FfnSkip {
                threshold: Some(threshold),
                mode: Some(FfnMode::Batch),
                quorum: Some(quorum),
                ..*skip
            }
        }))
    };
    // One row is never saturated: it stops the others where all must agree, and not where half is enough.
    for (quorum, skips) in [(1.0, false), (0.5, true)] {
        let plans = [-2.0, 2.0].map(|threshold| vote(threshold, quorum));
        let ran = generate(&mut runner, &plans.each_ref(), None);
        assert_eq!(ran[0].state.ffns_skipped > 0, skips, "{quorum}");
        assert_eq!(ran[1].state.ffns_skipped, 0);
    }
}
