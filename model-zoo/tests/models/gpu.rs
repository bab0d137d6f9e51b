//! The GPU's decoder on the emulated device against the CPU's: the same steps over poisoned pages, every architecture.

use std::path::Path;
use std::sync::Arc;

use model_zoo::compression::options::{DropLayers, Region, SkipDecode};
use model_zoo::compression::{CompressionOptions, Context, Offer, Plan, RowState, registry};
use model_zoo::config::DecoderConfig;
use model_zoo::kernels::cuda::device::Device;
use model_zoo::kernels::cuda::emulated::{Emulated, Order};
use model_zoo::kernels::cuda::fused::fuses;
use model_zoo::kernels::cuda::ops::Heads;
use model_zoo::loader::{LoadOptions, Target, build_on, load};
use model_zoo::models::{CausalLm, Draw};
use model_zoo::step::LogitRows;
use model_zoo::vision::{ImageEmbeddings, PromptImage};
use model_zoo::weights::{LlamaShape, RandomWeights};

use crate::support::{BLOCK_SIZE, Chunk, Runner, Sequence, fixtures};
use crate::tiny::{LAYERS, calibration, write};

/// An emulated device of either order; the machine's GPU where `RHEOSTAT_TEST_GPU` asks for it.
pub(crate) fn device(index: usize) -> Arc<dyn Device> {
    #[cfg(feature = "cuda")]
    if std::env::var_os("RHEOSTAT_TEST_GPU").is_some() {
        return Arc::new(model_zoo::kernels::cuda::driver::Gpu::open(0).unwrap());
    }
    Arc::new(Emulated::new([Order::Upwards, Order::Downwards][index % 2]))
}

pub(crate) fn on(device: Arc<dyn Device>, path: &Path) -> Box<dyn CausalLm> {
    let options = LoadOptions { device: Target::Device(device), ..LoadOptions::default() };
    load(path, &options).unwrap().model
}

pub(crate) fn tokens(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| 3 + (i * 97 + seed * 31 + i * i * 7) % 250).collect()
}

/// ‖a − b‖ / ‖b‖ over all rows.
pub(crate) fn error(a: &[Vec<f32>], b: &[Vec<f32>]) -> f64 {
    assert_eq!(a.len(), b.len());
    let (mut off, mut norm) = (0f64, 0f64);
    for (a, b) in a.iter().flatten().zip(b.iter().flatten()) {
        off += f64::from(a - b).powi(2);
        norm += f64::from(*b).powi(2);
    }
    (off / norm).sqrt()
}

/// Runs the same steps on both and returns the logits of each. `schedule[step][sequence]` is a number of tokens.
pub(crate) fn both(
    (path, device): (&Path, Arc<dyn Device>),
    plans: &[Plan],
    schedule: &[&[usize]],
) -> [Vec<Vec<f32>>; 2] {
    let cpu = load(path, &LoadOptions::default()).unwrap().model;
    [cpu, on(device, path)].map(|model| run(model, plans, schedule).0)
}

/// The logits of all steps, and the states of the sequences after them.
pub(crate) fn run(
    model: Box<dyn CausalLm>,
    plans: &[Plan],
    schedule: &[&[usize]],
) -> (Vec<Vec<f32>>, Vec<RowState>) {
    let lens = (0..plans.len()).map(|i| schedule.iter().map(|counts| counts[i]).sum());
    let capacity = lens.max().unwrap_or(0).max(96);
    let mut runner = Runner::of(model, plans.len(), capacity);
    let mut sequences: Vec<Sequence> =
        plans.iter().map(|plan| runner.sequence_of(plan.clone(), capacity)).collect();
    let prompts: Vec<Vec<u32>> = (0..plans.len()).map(|seed| tokens(seed as u32, capacity)).collect();
    let mut all = Vec::new();
    for (step, counts) in schedule.iter().enumerate() {
        let mut chunks = Vec::new();
        for (i, sequence) in sequences.iter_mut().enumerate().filter(|(i, _)| counts[*i] > 0) {
            let logits = [LogitRows::Last, LogitRows::All, LogitRows::None][(i + step) % 3];
            let logits = if counts[i] == 1 { LogitRows::Last } else { logits };
            let tokens = &prompts[i][sequence.len..sequence.len + counts[i]];
            chunks.push(Chunk { sequence, tokens, logits });
        }
        all.extend(runner.step(chunks).unwrap());
    }
    (all, sequences.into_iter().map(|sequence| sequence.state).collect())
}

const DECODE: &[usize] = &[1, 1, 1];

#[test]
fn every_architecture_equals_the_cpus() {
    let models = [
        ("llama", 2e-2),
        ("gguf/llama-llama3-f16.gguf", 2e-2),
        ("llama-sharded", 2e-2),
        ("mistral", 2e-2),
        ("qwen2", 2e-2),
        ("gguf/qwen2-yarn-f16.gguf", 2e-2),
        ("qwen3", 2e-2),
        ("gemma3", 2e-2),
        // Over packed weights the CPU rounds activations to int8.
        ("gguf/llama-q4_1.gguf", 6e-2),
        ("gguf/qwen3-f16.gguf", 2e-2),
    ];
    let mut wrong = Vec::new();
    for (i, (name, most)) in models.into_iter().enumerate() {
        let path = fixtures().join(name);
        let layers = load(&path, &LoadOptions::default()).unwrap().model.dims().num_layers;
        // Few tokens; many; single rows beside chunks; and steps that are captured and replayed, padded.
        let schedule: &[&[usize]] =
            &[&[5, 0, 2], &[1, 37, 9], DECODE, DECODE, DECODE, DECODE, &[1, 0, 1], &[33, 1, 0], DECODE];
        let [cpu, gpu] = both((&path, device(i)), &[0; 3].map(|_| Plan::dense(layers)), schedule);
        let found = error(&gpu, &cpu);
        // NaN is wrong, too.
        if found.is_nan() || found >= most {
            wrong.push(format!("{name}: relative error {found:.2e}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

/// A Llama of these sizes, untrained.
pub(crate) fn llama(
    (hidden, ffn, layers): (usize, usize, usize),
    heads: [usize; 2],
    head_dim: usize,
) -> DecoderConfig {
    LlamaShape { hidden, ffn, layers, heads, head_dim, vocab: 263, tied: true }.config()
}

#[test]
fn steps_of_few_tokens_are_one_launch_and_equal_the_cpus() {
    // Rows of weights in one piece and in several, the last one whole and not; heads of every size; contexts in one unit
    // and in several blocks' shares; more layers than pieces lie in the ring.
    let shapes = [
        llama((64, 128, 14), [4, 1], 16),
        llama((640, 192, 2), [6, 2], 32),
        llama((192, 2112, 2), [9, 3], 64),
        llama((128, 64, 3), [4, 4], 96),
        llama((576, 1536, 2), [8, 1], 128),
    ];
    for (i, config) in shapes.into_iter().enumerate() {
        let device = device(i);
        let heads = Heads {
            queries: config.num_heads,
            kv: config.num_kv_heads,
            dim: config.head_dim,
            block_size: BLOCK_SIZE,
        };
        let widths = [config.hidden_size, config.intermediate_size];
        assert!(fuses(&*device, 19, heads, widths) && !fuses(&*device, 33, heads, widths));
        let weights = RandomWeights::of(&config, 0.1);
        // One row, two, four, seven, and of the second shape as many as fill three tiles of eight.
        let rows = if i == 1 { 19 } else { 7 };
        let only = |some: &[usize]| (0..rows).map(|row| usize::from(some.contains(&row))).collect::<Vec<_>>();
        let mut first = vec![5; rows];
        first[..7].copy_from_slice(&[290, 3, 15, 130, 16, 17, 1]);
        let mut chunk = only(&[3, 4]);
        chunk[1] = 40;
        let all = vec![1; rows];
        let schedule =
            [first, only(&[0]), all.clone(), only(&[1, 2]), all.clone(), chunk, only(&[0, 2, 5, 6]), all];
        let schedule: Vec<&[usize]> = schedule.iter().map(Vec::as_slice).collect();
        let plans = vec![Plan::dense(config.num_layers); rows];
        let [cpu, gpu] = [Target::Cpu, Target::Device(device)]
            .map(|target| run(build_on(config.clone(), &weights, &target).unwrap(), &plans, &schedule).0);
        let found = error(&gpu, &cpu);
        assert!(found < 3e-2, "shape {i}: relative error {found:.2e}");
    }
}

#[test]
fn steps_of_many_rows_are_captured_and_equal_the_cpus() {
    let path = fixtures().join("llama");
    let layers = load(&path, &LoadOptions::default()).unwrap().model.dims().num_layers;
    let plans = [0; 11].map(|_| Plan::dense(layers));
    let schedule: &[&[usize]] =
        &[&[3; 11], &[1; 11], &[1; 11], &[1; 11], &[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0], &[1; 11]];
    let [cpu, gpu] = both((&path, device(0)), &plans, schedule);
    let found = error(&gpu, &cpu);
    assert!(found < 2e-2, "relative error {found:.2e}");
}

pub(crate) fn compile(options: &CompressionOptions) -> Plan {
    let offer = Offer { calibration: Some(calibration()), ..Offer::default() };
    let context = Context {
        num_layers: LAYERS,
        head_dim: 16,
        prompt_len: 20,
        max_tokens: 40,
        images: &[],
        offer: &offer,
    };
    registry::compile(options, &context).unwrap()
}

#[test]
fn plans_that_drop_and_skip_mix_and_equal_the_cpus() {
    let folder = write(|_| false);
    let drop = |attention, ffn| CompressionOptions {
        drop: Some(DropLayers { attention, ffn, joint: 0 }),
        ..CompressionOptions::default()
    };
    let skip = |region| CompressionOptions {
        skip_decode: Some(SkipDecode {
            min_layers: Some(3),
            horizon: Some(10),
            region: Some(region),
            ..SkipDecode::default()
        }),
        ..CompressionOptions::default()
    };
    let sets = [
        [drop(2, 1), drop(2, 1), drop(2, 1)],
        [skip(Region::Middle), CompressionOptions::default(), skip(Region::Low)],
        // Sets that do not nest are gathered.
        [drop(3, 0), drop(0, 3), skip(Region::Middle)],
    ];
    for (i, set) in sets.into_iter().enumerate() {
        let plans = set.map(|options| compile(&options));
        let mut schedule: Vec<&[usize]> = vec![&[20, 3, 0], &[0, 17, 20]];
        schedule.extend([DECODE; 14]);
        schedule.extend([&[40, 1, 1][..], DECODE]);
        let [cpu, gpu] = both((folder.path(), device(i)), &plans, &schedule);
        let found = error(&gpu, &cpu);
        assert!(found < 3e-2, "set {i}: relative error {found:.2e}");
    }
}

#[test]
fn tokens_are_chosen_as_from_the_logits() {
    let path = fixtures().join("llama");
    let mut runner = Runner::of(on(device(0), &path), 3, 48);
    let mut sequences = [0; 3].map(|_| runner.sequence(48));
    let prompts = [tokens(1, 20), tokens(2, 20), tokens(3, 20)];
    // The second count is of a step whose logits are part of it.
    for counts in [[4, 7, 2], [1, 1, 1], [1, 1, 1], [1, 1, 1]] {
        let chunks = sequences.iter_mut().zip(&prompts).zip(counts).map(|((sequence, prompt), count)| {
            Chunk { tokens: &prompt[sequence.len..sequence.len + count], sequence, logits: LogitRows::Last }
        });
        let chunks = chunks.collect();
        let logits = runner.step(chunks).unwrap();
        let greedy = Draw { row: 0, top_k: 0, temperature: 0.0, top_p: 1.0, min_p: 0.0, uniform: 0.0 };
        let draws = [0, 2].map(|row| Draw { row, ..greedy });
        let best = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]).then(b.cmp(&a)));
        let expected = [0, 2].map(|row| best(&logits[row]).unwrap() as u32);
        assert_eq!(runner.model.choose(&draws).unwrap().unwrap(), expected);
        assert!(runner.model.choose(&[Draw { row: 3, ..greedy }]).is_err(), "a row that the step has not");
    }
}

#[test]
fn a_malformed_step_is_refused() {
    let path = fixtures().join("llama");
    let mut runner = Runner::of(on(device(0), &path), 2, 32);
    let mut cpu = Runner::new(&path, 2, 32);
    let sequence = runner.sequence(32);
    let spoilt = |spoil: fn(&mut Sequence)| {
        let mut sequence = sequence.clone();
        spoil(&mut sequence);
        sequence
    };
    let cases: [(Sequence, &[u32], &str); 4] = [
        (sequence.clone(), &[5, 256], "token 256 is outside the vocabulary"),
        (spoilt(|s| s.len = 31), &[5, 6], "for 33 slots"),
        (spoilt(|s| s.block_tables[1][0] = 8), &[5], "page 8 is outside the pool"),
        (spoilt(|s| drop(s.block_tables.pop())), &[5], "block tables of 1 layers"),
    ];
    for (mut sequence, tokens, message) in cases {
        let chunk = Chunk { sequence: &mut sequence, tokens, logits: LogitRows::Last };
        let error = runner.step(vec![chunk]).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    std::mem::swap(&mut runner.kv, &mut cpu.kv);
    for runner in [&mut runner, &mut cpu] {
        let mut sequence = sequence.clone();
        let chunk = Chunk { sequence: &mut sequence, tokens: &[5], logits: LogitRows::Last };
        let error = runner.step(vec![chunk]).unwrap_err().to_string();
        assert!(error.contains("device"), "{error}");
    }
    let wide = Arc::new(ImageEmbeddings::new(4, vec![0.0; 8], [1; 32]));
    let mut sequence = runner.sequence(32);
    sequence.images.push(PromptImage { start: 0, embeddings: wide });
    std::mem::swap(&mut runner.kv, &mut cpu.kv);
    let chunk = Chunk { sequence: &mut sequence, tokens: &[5], logits: LogitRows::Last };
    let error = runner.step(vec![chunk]).unwrap_err().to_string();
    assert!(error.contains("not as wide"), "{error}");
}

#[test]
fn a_model_on_two_devices_equals_it_on_one() {
    for (name, most) in
        [("llama", 2e-2), ("gemma3", 2e-2), ("llama-sharded", 2e-2), ("gguf/llama-q4_1.gguf", 6e-2)]
    {
        let path = fixtures().join(name);
        let layers = load(&path, &LoadOptions::default()).unwrap().model.dims().num_layers;
        let schedule: &[&[usize]] = &[&[5, 0, 2], &[1, 37, 9], DECODE, DECODE, DECODE];
        let plans = [0; 3].map(|_| Plan::dense(layers));
        let ranks = Emulated::group(Order::Upwards, 2).into_iter();
        let threads: Vec<_> = ranks
            .map(|device| {
                let (path, plans) = (path.clone(), plans.clone());
                std::thread::spawn(move || both((&path, Arc::new(device)), &plans, schedule))
            })
            .collect();
        let results: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        for [cpu, gpu] in &results {
            let found = error(gpu, cpu);
            assert!(found < most, "{name}: relative error {found:.2e}");
        }
        assert_eq!(results[0][1], results[1][1], "{name}: both devices have the same logits");
    }
}
