//! The conformance table of the compression methods: each is exact about what it leaves out.

use std::path::PathBuf;

use model_zoo::compression::calibration::{Calibration, FfnCalibration};
use std::sync::Arc;

use model_zoo::compression::options::{
    BitStack, DropLayers, FfnMode, FfnSelection, FfnSkip, Region, SkipDecode, Vision, VisionBaseline,
};
use model_zoo::compression::{CompressionOptions, Context, Offer, Plan, RowState, Sublayer, registry};
use model_zoo::step::LogitRows;
use model_zoo::vision::{EncodedImage, ImageEmbeddings, PromptImage};
use tempfile::TempDir;

use crate::stacked::write_artefact;
use crate::support::{Chunk, Runner, Sequence};
use crate::tiny::{LAYERS, write};

const PROMPT: [u32; 21] = [5, 9, 200, 31, 7, 7, 81, 14, 3, 99, 120, 44, 61, 8, 250, 17, 23, 42, 4, 190, 66];
const OUTPUT: usize = 30;
const LEVELS: usize = 3;

/// The prompt's image, at tokens 3 to 10 of it, as the options want it.
fn images(options: &CompressionOptions) -> Vec<PromptImage> {
    let value = |i: usize| ((i * 7919 + 13) % 101) as f32 / 50.0 - 1.0;
    let encoded = EncodedImage {
        rows: (0..8 * 64).map(value).collect(),
        places: None,
        salience: (0..8).map(|i| value(i + 5)).collect(),
    };
    let whole = Arc::new(ImageEmbeddings::of((64, 8), encoded, [1; 32]));
    let prepared = registry::prepare(options, &offer(), vec![whole]).unwrap();
    prepared.into_iter().map(|embeddings| PromptImage { start: 3, embeddings }).collect()
}

/// Similarities that put attention in the order 3, 1, 4, 2, … and FFNs in the order 2, 4, 3, 1, …
fn offer() -> Offer {
    let calibration = Calibration {
        attention_similarity: vec![0.99, 0.8, 0.6, 0.9, 0.7, 0.99],
        ffn_similarity: vec![0.1, 0.5, 0.85, 0.65, 0.75, 0.2],
        ffn_skip: FfnCalibration { first_layer: 1, end_layer: 5, thresholds: Vec::new() },
        ..Calibration::default()
    };
    Offer { calibration: Some(calibration), levels: Some(LEVELS), ..Offer::default() }
}

/// A folder with the tiny model, and the paths of its two forms: whole, and in levels.
fn models() -> (TempDir, [PathBuf; 2]) {
    let folder = write(|_| false);
    let artefact = folder.path().join("tiny.bitstack");
    write_artefact(folder.path(), &artefact, (LEVELS, 2));
    let paths = [folder.path().to_owned(), artefact];
    (folder, paths)
}

fn compile(options: CompressionOptions) -> Plan {
    let context = Context {
        num_layers: LAYERS,
        head_dim: 16,
        prompt_len: PROMPT.len(),
        max_tokens: OUTPUT,
        images: &images(&options),
        offer: &offer(),
    };
    registry::compile(&options, &context).unwrap()
}

fn skip_decode(min_layers: usize, region: Region) -> CompressionOptions {
    let skip = SkipDecode {
        min_layers: Some(min_layers),
        horizon: Some(20),
        region: Some(region),
        ..SkipDecode::default()
    };
    CompressionOptions { skip_decode: Some(skip), ..CompressionOptions::default() }
}

fn ffn_skip(change: impl FnOnce(&mut FfnSkip)) -> CompressionOptions {
    let mut skip = FfnSkip { target: Some(0.4), warmup: Some(3), threshold: Some(0.5), ..FfnSkip::default() };
    change(&mut skip);
    CompressionOptions { ffn_skip: Some(skip), ..CompressionOptions::default() }
}

fn drop_layers(attention: usize, ffn: usize) -> CompressionOptions {
    let drop = DropLayers { attention, ffn, joint: 0 };
    CompressionOptions { drop: Some(drop), ..CompressionOptions::default() }
}

fn vision(change: impl FnOnce(&mut Vision)) -> CompressionOptions {
    let mut vision = Vision {
        key_rate: Some(0.2),
        alpha: Some(0.13),
        beta: Some(1.0),
        layers: Some(vec![1, 3]),
        ..Vision::default()
    };
    change(&mut vision);
    CompressionOptions { vision: Some(vision), ..CompressionOptions::default() }
}

fn baseline(baseline: VisionBaseline, keep: usize) -> CompressionOptions {
    let vision = Vision { keep: Some(keep), baseline: Some(baseline), ..Vision::default() };
    CompressionOptions { vision: Some(vision), ..CompressionOptions::default() }
}

fn levels(levels: usize) -> CompressionOptions {
    let bitstack = Some(BitStack { levels: Some(levels) });
    CompressionOptions { bitstack, ..CompressionOptions::default() }
}

/// Every method, with a name for messages. Of whole weights every number of levels is all.
fn methods() -> Vec<(&'static str, CompressionOptions)> {
    let joint = DropLayers { joint: 3, ..DropLayers::default() };
    vec![
        ("dense", CompressionOptions::default()),
        ("skip_decode low", skip_decode(3, Region::Low)),
        ("skip_decode middle", skip_decode(4, Region::Middle)),
        ("drop", drop_layers(2, 1)),
        ("bitstack", levels(2)),
        ("bitstack with drop", CompressionOptions { drop: drop_layers(1, 0).drop, ..levels(1) }),
        ("drop joint", CompressionOptions { drop: Some(joint), ..CompressionOptions::default() }),
        ("ffn_skip", ffn_skip(|_| {})),
        ("ffn_skip random", ffn_skip(|skip| skip.selection = Some(FfnSelection::Random))),
        ("ffn_skip static", ffn_skip(|skip| skip.selection = Some(FfnSelection::Static))),
        (
            "drop with skip_decode",
            CompressionOptions { drop: drop_layers(1, 1).drop, ..skip_decode(4, Region::Low) },
        ),
        ("vision", vision(|_| {})),
        ("vision with a cap", vision(|vision| vision.keep = Some(3))),
        ("vision pooled", baseline(VisionBaseline::Pool, 4)),
        ("vision drawn", baseline(VisionBaseline::Random, 3)),
        (
            "vision with drop and skip_decode",
            CompressionOptions {
                drop: drop_layers(0, 2).drop,
                vision: vision(|vision| vision.keep = Some(4)).vision,
                ..skip_decode(3, Region::Low)
            },
        ),
        ("ffn_skip with vision", CompressionOptions { vision: vision(|_| {}).vision, ..ffn_skip(|_| {}) }),
    ]
}

fn argmax(logits: &[f32]) -> u32 {
    assert!(logits.iter().all(|v| v.is_finite()), "something unwritten was read");
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.unwrap().0 as u32
}

/// Prefills and decodes greedily; all sequences share every step. The logits of every output token.
fn generate(runner: &mut Runner, sequences: &mut [Sequence]) -> Vec<Vec<Vec<f32>>> {
    let mut logits = vec![Vec::new(); sequences.len()];
    let mut next: Vec<Vec<u32>> = vec![PROMPT.to_vec(); sequences.len()];
    sequences.iter_mut().for_each(|sequence| sequence.state.decode_from = Some(PROMPT.len()));
    for _ in 0..OUTPUT {
        let chunks = sequences.iter_mut().zip(&next);
        let chunks = chunks.map(|(sequence, tokens)| Chunk { sequence, tokens, logits: LogitRows::Last });
        let step = runner.step(chunks.collect()).unwrap();
        next = step.iter().map(|logits| vec![argmax(logits)]).collect();
        logits.iter_mut().zip(step).for_each(|(all, one)| all.push(one));
    }
    logits
}

/// A sequence with the prompt's image.
fn showing(runner: &mut Runner, plan: &Plan) -> Sequence {
    let mut sequence = runner.sequence_of(plan.clone(), PROMPT.len() + OUTPUT);
    sequence.images = images(plan.options());
    sequence
}

fn alone(folder: &std::path::Path, plan: &Plan) -> (Vec<Vec<f32>>, RowState) {
    let mut runner = Runner::new(folder, 1, PROMPT.len() + OUTPUT);
    let mut sequences = [showing(&mut runner, plan)];
    let logits = generate(&mut runner, &mut sequences).remove(0);
    (logits, sequences[0].state.clone())
}

#[test]
fn what_is_off_is_dense_bit_for_bit() {
    let model = write(|_| false);
    let dense = alone(model.path(), &Plan::dense(LAYERS)).0;
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
        // Never saturated: every decision is made, and none skips.
        ffn_skip(|skip| skip.threshold = Some(1.5)),
    ] {
        let (logits, state) = alone(model.path(), &compile(options.clone()));
        assert_eq!(logits, dense, "{options:?}");
        assert_eq!(state.ffns_skipped, 0);
    }
}

#[test]
fn dropping_equals_zeroing_the_output_projection() {
    let model = write(|_| false);
    // The least important by the calibration of `offer`.
    let is_dropped = |name: &str| {
        ["layers.3.self_attn.o_proj", "layers.1.self_attn.o_proj", "layers.2.mlp.down_proj"]
            .iter()
            .any(|dropped| name.contains(dropped))
    };
    let zeroed = write(is_dropped);
    let expected = alone(zeroed.path(), &Plan::dense(LAYERS)).0;
    let (logits, _) = alone(model.path(), &compile(drop_layers(2, 1)));
    assert_eq!(logits, expected);
    assert_ne!(logits, alone(model.path(), &Plan::dense(LAYERS)).0);
}

#[test]
fn all_levels_are_no_limit_and_fewer_are_other_weights() {
    let (_folder, [whole, artefact]) = models();
    let dense = alone(&artefact, &Plan::dense(LAYERS)).0;
    assert_eq!(alone(&artefact, &compile(levels(LEVELS))).0, dense);
    let mut others = vec![dense];
    for fewer in 1..LEVELS {
        let logits = alone(&artefact, &compile(levels(fewer))).0;
        assert!(!others.contains(&logits), "{fewer}");
        others.push(logits);
    }
    let all = alone(&whole, &Plan::dense(LAYERS)).0;
    assert_eq!(alone(&whole, &compile(levels(1))).0, all);
}

#[test]
fn dropped_attention_holds_no_kv() {
    let demand = compile(drop_layers(2, 4)).kv_demand();
    let slots: Vec<_> = (0..LAYERS).map(|layer| demand.kv_len(layer, 40)).collect();
    assert_eq!(slots, [40, 0, 40, 0, 40, 40]);
}

#[test]
fn a_mixed_batch_equals_each_row_alone() {
    let (_folder, paths) = models();
    let plans: Vec<_> = methods().into_iter().map(|(name, options)| (name, compile(options))).collect();
    for path in paths {
        let mut runner = Runner::new(&path, plans.len(), PROMPT.len() + OUTPUT);
        let mut sequences: Vec<_> = plans.iter().map(|(_, plan)| showing(&mut runner, plan)).collect();
        let together = generate(&mut runner, &mut sequences);
        for (((name, plan), logits), sequence) in plans.iter().zip(&together).zip(&sequences) {
            let (expected, state) = alone(&path, plan);
            assert_eq!(logits, &expected, "{name}");
            assert_eq!(sequence.state, state, "{name}");
        }
    }
}

#[test]
fn counters_equal_the_closed_form() {
    let (_folder, paths) = models();
    let computed = PROMPT.len() + OUTPUT - 1;
    for path in paths {
        for (name, options) in methods() {
            let plan = compile(options);
            let (_, state) = alone(&path, &plan);
            let [attention, ffn] = plan.work(computed);
            let mut expected = [attention, ffn - state.ffns_skipped];
            if let Some(outcome) = &state.visual {
                // What went on to the next layer ran the FFN.
                let shown = outcome.ran[0] as u64;
                let ran =
                    |layer: usize| outcome.ran.get(layer).copied().unwrap_or(outcome.survivors.len()) as u64;
                let less = |after: usize| (0..LAYERS).map(|layer| shown - ran(layer + after)).sum::<u64>();
                let ffn_dropped = |layer: &usize| !plan.runs(*layer, Sublayer::Ffn, 0);
                let uncounted: u64 =
                    (0..LAYERS).filter(ffn_dropped).map(|layer| shown - ran(layer + 1)).sum();
                expected = [expected[0] - less(0), expected[1] + uncounted - less(1)];
                assert_eq!(state.visual_left_out, less(0) + less(1) - uncounted, "{name}");
                assert!(outcome.survivors.len() < 8 && outcome.survivors.len() >= 2, "{name}: {outcome:?}");
            }
            assert_eq!(state.sublayers_run, expected, "{name}");
            assert_eq!(state.ffns_skipped > 0, name.starts_with("ffn_skip"), "{name}");
        }
    }
}

#[test]
fn a_replay_in_chunks_equals_the_incremental_run() {
    let (_folder, paths) = models();
    let capacity = PROMPT.len() + OUTPUT;
    for (path, (name, options)) in paths.iter().flat_map(|path| methods().into_iter().map(move |m| (path, m)))
    {
        let plan = compile(options);
        let mut runner = Runner::new(path, 2, capacity);
        let mut sequences = [showing(&mut runner, &plan)];
        let incremental = generate(&mut runner, &mut sequences).remove(0);
        let outputs: Vec<u32> = incremental.iter().map(|logits| argmax(logits)).collect();
        let tokens: Vec<u32> = PROMPT.iter().chain(&outputs[..OUTPUT - 1]).copied().collect();
        let mut again = showing(&mut runner, &plan);
        again.state = sequences[0].state.clone();
        let before = again.state.sublayers_run;
        let mut logits = Vec::new();
        // What runs whole is not cut, and ends where the prompt does.
        let whole = plan.filter().map_or(0..0, |filter| filter.first..filter.prompt_len);
        let (start, rest) = tokens.split_at(whole.end);
        let (before_whole, whole) = start.split_at(whole.start);
        for chunk in before_whole.chunks(2).chain(whole.chunks(PROMPT.len())).chain(rest.chunks(13)) {
            let chunk = Chunk { sequence: &mut again, tokens: chunk, logits: LogitRows::All };
            logits.extend(runner.step(vec![chunk]).unwrap());
        }
        assert_eq!(logits[PROMPT.len() - 1..], incremental, "{name}");
        assert_eq!(again.state.sublayers_run, before.map(|count| 2 * count), "{name}");
    }
}

/// Which FFNs each output token skipped.
fn skipped(state: &RowState) -> Vec<Vec<usize>> {
    let of = |token| (0..LAYERS).filter(|&layer| state.ffn.is_skipped(token, layer)).collect();
    (0..state.ffn.num_recorded()).map(of).collect()
}

#[test]
fn ffn_skipping_warms_up_tests_again_and_keeps_the_cap() {
    let model = write(|_| false);
    // Saturated from the first test on: of the warm layers 1..5 the first tests, the next are skipped.
    for (max_skip, target, expected) in
        [(1, 0.6, vec![2, 4]), (2, 0.6, vec![2, 3]), (9, 0.6, vec![2, 3, 4]), (9, 0.15, vec![2, 3])]
    {
        let always = ffn_skip(|skip| {
            *skip =
                FfnSkip { max_skip: Some(max_skip), threshold: Some(-2.0), target: Some(target), ..*skip };
        });
        let (_, state) = alone(model.path(), &compile(always));
        let tokens = skipped(&state);
        // The first output token comes of the prompt; three run whole after it counts as the first.
        assert_eq!(tokens.len(), OUTPUT - 1 - 3);
        assert!(tokens.iter().all(|layers| *layers == expected), "{max_skip} {target}: {tokens:?}");
    }
}

#[test]
fn the_vote_of_a_batch_skips_for_all_or_none() {
    let model = write(|_| false);
    let capacity = PROMPT.len() + OUTPUT;
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
        let mut runner = Runner::new(model.path(), 2, capacity);
        let mut sequences =
            [-2.0, 2.0].map(|threshold| runner.sequence_of(vote(threshold, quorum), capacity));
        generate(&mut runner, &mut sequences);
        assert_eq!(sequences[0].state.ffns_skipped > 0, skips, "{quorum}");
        assert_eq!(sequences[1].state.ffns_skipped, 0);
    }
}
