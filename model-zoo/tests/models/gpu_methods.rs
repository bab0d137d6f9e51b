//! Compression and images on the GPU's decoder, on the emulated device, against the CPU's.

use std::sync::Arc;

use model_zoo::compression::{CompressionOptions, Context, Offer, Plan, registry};
use model_zoo::eval;
use model_zoo::loader::{LoadOptions, Target, build_on, load};
use model_zoo::models::CausalLm;
use model_zoo::step::LogitRows;
use model_zoo::vision::{ImageEmbeddings, PromptImage};
use model_zoo::weights::RandomWeights;

use crate::gpu::{compile, device, error, llama, on, run, tokens};
use crate::support::{Chunk, Runner, fixtures};
use crate::tiny::{LAYERS, write};

#[test]
fn ffns_are_left_out_as_on_the_cpu() {
    let folder = write(|_| false);
    let options = |json: &str| {
        let options = format!(r#"{{"ffn_skip": {{"target": 0.4, "warmup": 2, {json}}}}}"#);
        compile(&serde_json::from_str(&options).unwrap())
    };
    let alone = |threshold: f32| options(&format!(r#""threshold": {threshold}, "max_skip": 1"#));
    let together = |threshold: f32, quorum: f32| {
        options(&format!(r#""threshold": {threshold}, "max_skip": 2, "mode": "batch", "quorum": {quorum}"#))
    };
    let dense = Plan::dense(LAYERS);
    let fixed = [options(r#""selection": "static""#), options(r#""selection": "random""#), dense.clone()];
    let mut many = vec![alone(0.8), alone(0.5), together(0.5, 0.3), dense.clone()];
    many.extend((0..7).map(|i| alone(0.6 + 0.05 * i as f32)));
    let sets = [
        // A block that all leave out is passed over.
        vec![alone(-2.0), alone(-2.0), alone(-2.0)],
        vec![alone(0.9), alone(0.8), alone(0.6)],
        vec![together(0.7, 0.6), together(0.9, 0.6), dense],
        vec![together(-2.0, 0.6), together(0.8, 0.6), alone(0.5)],
        fixed.to_vec(),
        many,
    ];
    let mut left_out = 0;
    for (i, plans) in sets.into_iter().enumerate() {
        let mut schedule = vec![vec![20; plans.len()]];
        schedule.extend(vec![vec![1; plans.len()]; 9]);
        // Several tokens that nobody has decided about yet, and fewer rows than before.
        schedule.push([&[3, 1, 0], &vec![1; plans.len() - 3][..]].concat());
        schedule.push(vec![1; plans.len()]);
        let schedule: Vec<&[usize]> = schedule.iter().map(Vec::as_slice).collect();
        let cpu = load(folder.path(), &LoadOptions::default()).unwrap().model;
        let [cpu, gpu] = [cpu, on(device(i), folder.path())].map(|model| run(model, &plans, &schedule));
        let found = error(&gpu.0, &cpu.0);
        assert!(found < 3e-2, "set {i}: relative error {found:.2e}");
        for (row, (cpu, gpu)) in cpu.1.iter().zip(&gpu.1).enumerate() {
            assert_eq!(gpu.ffn, cpu.ffn, "set {i}, row {row}");
            assert_eq!(gpu.sublayers_run, cpu.sublayers_run, "set {i}, row {row}");
            assert_eq!(gpu.ffns_skipped, cpu.ffns_skipped, "set {i}, row {row}");
            left_out += cpu.ffns_skipped;
        }
    }
    assert!(left_out > 300, "{left_out} blocks were left out");
}

#[test]
fn images_stand_for_tokens_as_on_the_cpu() {
    let path = fixtures().join("llama");
    let models = [load(&path, &LoadOptions::default()).unwrap().model, on(device(0), &path)];
    let [cpu, gpu] = models.map(|model| {
        let hidden = model.dims().hidden_size;
        let value = |i: usize| ((i * 7919 + 13) % 101) as f32 / 50.0 - 1.0;
        let embeddings =
            Arc::new(ImageEmbeddings::new(hidden, (0..6 * hidden).map(value).collect(), [1; 32]));
        let mut runner = Runner::of(model, 2, 64);
        let mut sequences = [0; 2].map(|_| runner.sequence(64));
        let place = |start| PromptImage { start, embeddings: Arc::clone(&embeddings) };
        sequences[0].images = vec![place(2), place(20)];
        // Tokens that stand for an image are outside the vocabulary.
        let mut prompts = [tokens(1, 40), tokens(2, 40)];
        [2..8, 20..26].into_iter().for_each(|range| prompts[0][range].fill(9999));
        let mut all = Vec::new();
        // Chunks that cut an image, one of them a single token of it.
        for counts in [[4, 3], [1, 1], [18, 1], [9, 2], [1, 1], [1, 1], [1, 1]] {
            let chunks = sequences.iter_mut().zip(&prompts).zip(counts).map(|((sequence, prompt), count)| {
                let tokens = &prompt[sequence.len..sequence.len + count];
                Chunk { sequence, tokens, logits: LogitRows::Last }
            });
            let chunks = chunks.collect();
            all.extend(runner.step(chunks).unwrap());
        }
        all
    });
    let found = error(&gpu, &cpu);
    assert!(found < 2e-2, "relative error {found:.2e}");
}

/// Logits of prompts of `lens` tokens, in chunks, and of 20 tokens after each, all sequences in every step; then of the
/// first one's last tokens again, in one go over its packed prompt.
fn run_pruned(model: &mut dyn CausalLm, plans: &[Plan], (lens, chunk): (&[usize], usize)) -> Vec<Vec<f32>> {
    let most = lens.iter().max().unwrap() + 20;
    let mut runner = eval::Runner::new(model, plans.len(), most).unwrap();
    let mut sequences: Vec<_> =
        plans.iter().enumerate().map(|(slot, plan)| runner.start(slot, plan.clone())).collect();
    let prompts: Vec<Vec<u32>> = (0..plans.len()).map(|seed| tokens(seed as u32, most)).collect();
    let mut all = Vec::new();
    let mut at = vec![0; plans.len()];
    for _ in 0.. {
        let next = |i: usize, at: usize| {
            if at < lens[i] { (at + chunk).min(lens[i]) } else { (at + 1).min(lens[i] + 20) }
        };
        let ends: Vec<usize> = at.iter().enumerate().map(|(i, &at)| next(i, at)).collect();
        let mut chunks = Vec::new();
        for (i, sequence) in sequences.iter_mut().enumerate().filter(|(i, _)| ends[*i] > at[*i]) {
            chunks.push(eval::Chunk {
                sequence,
                tokens: &prompts[i][at[i]..ends[i]],
                logits: LogitRows::Last,
            });
        }
        let count = chunks.len();
        if count == 0 {
            break;
        }
        runner.step(&mut chunks, None).unwrap();
        let logits = runner.logits(0..count).unwrap();
        all.extend(logits.chunks_exact(logits.len() / count).map(<[f32]>::to_vec));
        at = ends;
    }
    sequences[0].rewind(lens[0]);
    let tokens = &prompts[0][lens[0]..lens[0] + 20];
    let chunk = eval::Chunk { sequence: &mut sequences[0], tokens, logits: LogitRows::All };
    runner.step(&mut [chunk], None).unwrap();
    let logits = runner.logits(0..20).unwrap();
    all.extend(logits.chunks_exact(logits.len() / 20).map(<[f32]>::to_vec));
    all
}

#[test]
fn pruned_keys_equal_the_cpus() {
    let think = |ratio: f32, recent: usize| {
        let options = format!(r#"{{"think": {{"ratio": {ratio}, "recent": {recent}}}}}"#);
        serde_json::from_str::<CompressionOptions>(&options).unwrap()
    };
    let shapes = [
        (llama((64, 128, 6), [4, 2], 16), 0.5),
        (llama((192, 192, 2), [9, 3], 64), 0.4),
        // A width that the joint kernel does not take.
        (llama((120, 192, 2), [4, 1], 32), 0.3),
    ];
    for (i, (config, ratio)) in shapes.into_iter().enumerate() {
        let weights = RandomWeights::of(&config, 0.1);
        let (layers, head_dim) = (config.num_layers, config.head_dim);
        let lens = [75, 40, 100, 33];
        let plan = |index: usize, options: &CompressionOptions| {
            let offer = Offer::default();
            let prompt_len = lens[index];
            let context = Context {
                num_layers: layers,
                head_dim,
                prompt_len,
                max_tokens: 20,
                images: &[],
                offer: &offer,
            };
            registry::compile(options, &context).unwrap()
        };
        let plans = [
            plan(0, &think(ratio, 8)),
            Plan::dense(layers),
            plan(2, &think(ratio, 32)),
            plan(3, &think(ratio + 0.3, 0)),
        ];
        let device = device(i);
        for &chunk in [&[100, 24][..], &[24]][usize::from(i > 0)] {
            let [cpu, gpu] = [Target::Cpu, Target::Device(Arc::clone(&device))].map(|target| {
                let mut model = build_on(config.clone(), &weights, &target).unwrap();
                run_pruned(model.as_mut(), &plans, (&lens, chunk))
            });
            let found = error(&gpu, &cpu);
            assert!(found < 3e-2, "shape {i}, chunks of {chunk}: relative error {found:.2e}");
        }
    }
}
