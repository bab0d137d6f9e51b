//! The engine's speed on a GPU at the shapes of known models, with random weights, bf16 or BitStack levels: decode at a
//! context of 1,024 tokens and prefill of 2,048, through [`CausalLm`], beside what must be reached.

use std::time::Instant;

use model_zoo::compression::bitstack::random::RandomLevels;
use model_zoo::compression::calibration::Calibration;
use model_zoo::compression::options::{DropLayers, SkipDecode};
use model_zoo::compression::{CompressionOptions, Context, Offer, Plan, RowState, Sublayer, registry};
use model_zoo::config::{Activation, DecoderConfig, RopeConfig, RopeScaling, RopeStyle};
use model_zoo::kv_cache::{KvCache, PageId};
use model_zoo::loader::{LoadOptions, Target, build_in_levels, build_on};
use model_zoo::models::{CausalLm, Draw};
use model_zoo::step::{LogitRows, StepBatch, StepRow};
use model_zoo::weights::RandomWeights;

const BLOCK_SIZE: usize = 16;

/// How much is run.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    /// Tokens before decode steps.
    context: usize,
    /// Tokens of the prefill.
    prefill: usize,
    /// Prompt tokens of a step at most.
    chunk: usize,
    /// Steps that warm a batch up, the two until its class is captured among them.
    warm: usize,
    /// Steps that are timed.
    steps: usize,
}

const SIZES: Sizes = Sizes { context: 1024, prefill: 2048, chunk: 2048, warm: 8, steps: 64 };

/// What is measured.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// Shapes
    #[arg(long, value_delimiter = ',', default_value = "135m,1b,8b")]
    shapes: Vec<String>,
    /// Rows of the decode steps
    #[arg(long, value_delimiter = ',', default_value = "1,8,32,128")]
    batches: Vec<usize>,
    /// Plans that leave work out, beside the dense one, for one row
    #[arg(long, conflicts_with = "levels")]
    plans: bool,
    /// Weights of so many BitStack levels of rank 16, in place of bf16 ones
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..))]
    levels: Option<u8>,
    /// Index of the GPU
    #[arg(long, default_value_t = 0)]
    gpu: usize,
}

/// A model's sizes, and what must be reached on one Hopper GPU: milliseconds a step of one row, tokens a second of 32 and
/// of 128, milliseconds of a prefill.
struct Shape {
    name: &'static str,
    hidden: usize,
    ffn: usize,
    layers: usize,
    heads: [usize; 2],
    head_dim: usize,
    vocab: usize,
    tied: bool,
    goals: [&'static str; 4],
}

const SHAPES: [Shape; 3] = [
    Shape {
        name: "135m",
        hidden: 576,
        ffn: 1536,
        layers: 30,
        heads: [9, 3],
        head_dim: 64,
        vocab: 49_152,
        tied: true,
        goals: ["≤ 0.5 ms", "≥ 32,082 /s", "≥ 83,699 /s", "≤ 9.2 ms"],
    },
    Shape {
        name: "1b",
        hidden: 2048,
        ffn: 8192,
        layers: 16,
        heads: [32, 8],
        head_dim: 64,
        vocab: 128_256,
        tied: true,
        goals: ["≤ 0.9 ms", "≥ 20,390 /s", "≥ 44,795 /s", "≤ 11.5 ms"],
    },
    Shape {
        name: "8b",
        hidden: 4096,
        ffn: 14_336,
        layers: 32,
        heads: [32, 8],
        head_dim: 128,
        vocab: 128_256,
        tied: false,
        goals: ["≤ 4.1 ms", "≥ 5,258 /s", "≥ 12,212 /s", "≤ 53.1 ms"],
    },
];

impl Shape {
    /// Half of the attention, a quarter of the FFNs, and SkipDecode to half of the layers.
    fn reductions(&self) -> [(String, CompressionOptions); 3] {
        let drop = |attention, ffn| CompressionOptions {
            drop: Some(DropLayers { attention, ffn, joint: 0 }),
            ..CompressionOptions::default()
        };
        let (half, quarter) = (self.layers / 2, self.layers / 4);
        let skip =
            SkipDecode { min_layers: Some(half), horizon: Some(SKIP_HORIZON), ..SkipDecode::default() };
        [
            (format!("attention of {half} layers dropped"), drop(half, 0)),
            (format!("FFN of {quarter} layers dropped"), drop(0, quarter)),
            (
                format!("SkipDecode to {half} layers over {SKIP_HORIZON} tokens"),
                CompressionOptions { skip_decode: Some(skip), ..CompressionOptions::default() },
            ),
        ]
    }

    /// The plan of these options; which layers they leave out makes no difference to speed.
    fn compile(&self, options: &CompressionOptions, sizes: Sizes) -> model_zoo::Result<Plan> {
        let similarity: Vec<f64> = (0..self.layers).map(|layer| 0.5 + layer as f64 / 100.0).collect();
        let calibration = Calibration {
            attention_similarity: similarity.clone(),
            ffn_similarity: similarity,
            ..Calibration::default()
        };
        let offer = Offer { calibration: Some(calibration), ..Offer::default() };
        let context = Context {
            num_layers: self.layers,
            head_dim: self.head_dim,
            prompt_len: sizes.context,
            max_tokens: sizes.warm + sizes.steps,
            images: &[],
            offer: &offer,
        };
        registry::compile(options, &context)
    }

    /// Bytes that a step of one row at `position` reads: weights of the sublayers that run, the head, keys and values.
    fn bytes(&self, plan: &Plan, position: usize) -> f64 {
        let (queries, kv) = (self.heads[0] * self.head_dim, self.heads[1] * self.head_dim);
        let attention = self.hidden * (2 * queries + 2 * kv) + 2 * kv * position;
        let ffn = 3 * self.hidden * self.ffn;
        let runs = |layer, sublayer| plan.active_len(layer, sublayer, (position, 1));
        let layers = (0..self.layers)
            .map(|l| attention * runs(l, Sublayer::Attention) + ffn * runs(l, Sublayer::Ffn))
            .sum::<usize>();
        2.0 * (layers + self.vocab * self.hidden) as f64
    }

    fn config(&self) -> DecoderConfig {
        DecoderConfig {
            architecture: "llama".into(),
            hidden_size: self.hidden,
            intermediate_size: self.ffn,
            num_layers: self.layers,
            num_heads: self.heads[0],
            num_kv_heads: self.heads[1],
            head_dim: self.head_dim,
            vocab_size: self.vocab,
            max_context: 8192,
            rms_norm_eps: 1e-5,
            rope: RopeConfig { theta: 500_000.0, scaling: RopeScaling::None },
            rope_style: RopeStyle::Half,
            sliding_window: None,
            activation: Activation::Silu,
            qk_norm: false,
            sandwich_norms: false,
            norm_offset: 0.0,
            embedding_scale: 1.0,
            attention_scale: 1.0 / (self.head_dim as f32).sqrt(),
            tie_word_embeddings: self.tied,
        }
    }
}

/// Sequences with their pages.
struct Bench {
    model: Box<dyn CausalLm>,
    kv: KvCache,
    plan: Plan,
    tables: Vec<Vec<Vec<PageId>>>,
    lens: Vec<usize>,
    sizes: Sizes,
}

/// Measures and prints the table.
///
/// # Errors
/// A sentence: there is no GPU, or a step failed.
pub(crate) fn main(options: &Options) -> Result<(), String> {
    let target = Target::gpu(options.gpu).map_err(|e| e.to_string())?;
    println!("| shape | what | measured | joules a token | goal on an H200 |\n|---|---|---|---|---|");
    for name in &options.shapes {
        let shape = SHAPES.iter().find(|shape| shape.name == name);
        let shape = shape.ok_or_else(|| format!("{name:?} is no shape: there are 135m, 1b and 8b"))?;
        measure((shape, SIZES), &target, options).map_err(|e| e.to_string())?;
    }
    Ok(())
}

fn measure((shape, sizes): (&Shape, Sizes), target: &Target, options: &Options) -> model_zoo::Result<()> {
    let batches = &options.batches;
    let most = batches.iter().copied().max().unwrap_or(1).max(1);
    let config = shape.config();
    let weights = RandomWeights::of(&config, 0.02);
    let kind = options.levels.map_or("bf16".into(), |levels| format!("{levels} levels"));
    let model = build(config, (&weights, options.levels), target)?;
    println!(
        "| {} | {}, {kind} | {} MiB of weights | | |",
        shape.name,
        model.device(),
        model.dims().weight_bytes >> 20
    );
    let mut bench = Bench::new(model, most, sizes)?;
    for &batch in batches {
        let (seconds, joules) = bench.decode(batch, target)?;
        let goal = match batch {
            1 => shape.goals[0],
            32 => shape.goals[1],
            128 => shape.goals[2],
            _ => "",
        };
        let (ms, rate) = (1e3 * seconds, batch as f64 / seconds);
        let joules = joules.map_or("no meter".into(), |joules| format!("{joules:.4}"));
        let what = format!("decode of {batch}, context {}", sizes.context);
        println!("| {} | {what} | {ms:.3} ms, {rate:.0} /s | {joules} | {goal} |", shape.name);
    }
    let seconds = bench.prefill()?;
    let (name, ms) = (shape.name, 1e3 * seconds);
    println!("| {name} | prefill of {} | {ms:.2} ms | | {} |", sizes.prefill, shape.goals[3]);
    if options.plans { compare_plans(shape, &mut bench, target) } else { Ok(()) }
}

/// A decoder with random weights: matrices of layers in bf16, or in so many levels.
fn build(
    config: DecoderConfig,
    (weights, levels): (&RandomWeights, Option<u8>),
    target: &Target,
) -> model_zoo::Result<Box<dyn CausalLm>> {
    let Some(levels) = levels else { return build_on(config, weights, target) };
    let levels = Box::new(RandomLevels::of(&config, levels.into(), LEVEL_RANK));
    let options = LoadOptions { device: target.clone(), ..LoadOptions::default() };
    build_in_levels(config, (weights, levels), &options)
}

/// Decode of one row by plans that leave work out: how much faster than dense, beside how many fewer bytes they read.
fn compare_plans(shape: &Shape, bench: &mut Bench, target: &Target) -> model_zoo::Result<()> {
    let dense = Plan::dense(shape.layers);
    let (seconds, _) = bench.decode(1, target)?;
    let bytes = |plan: &Plan, sizes: Sizes| {
        let first = sizes.context + sizes.warm;
        let all = (first..first + sizes.steps).map(|position| shape.bytes(plan, position));
        all.sum::<f64>() / sizes.steps as f64
    };
    let usual = bench.sizes;
    for (what, options) in shape.reductions() {
        // SkipDecode changes from token to token: all of its way is run.
        bench.sizes.steps =
            if options.skip_decode.is_some() { SKIP_HORIZON - usual.warm } else { usual.steps };
        bench.plan = shape.compile(&options, bench.sizes)?;
        let predicted = bytes(&dense, bench.sizes) / bytes(&bench.plan, bench.sizes);
        let (own, joules) = bench.decode_mean(target)?;
        let realised = seconds / own;
        let joules = joules.map_or("no meter".into(), |joules| format!("{joules:.4}"));
        let (name, ms, share) = (shape.name, 1e3 * own, realised / predicted);
        println!(
            "| {name} | {what}, one row | {ms:.3} ms, {realised:.3} of {predicted:.3} times as fast: {share:.3} | \
             {joules} | ≥ 0.9 |"
        );
    }
    (bench.plan, bench.sizes) = (dense, usual);
    Ok(())
}

/// The rank that artefacts of large models are made with.
const LEVEL_RANK: usize = 16;

/// Tokens over which SkipDecode goes from all layers to half of them.
const SKIP_HORIZON: usize = 256;

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

impl Bench {
    fn new(model: Box<dyn CausalLm>, sequences: usize, sizes: Sizes) -> model_zoo::Result<Self> {
        let layers = model.dims().num_layers;
        // The first sequence also holds the long prompt.
        let pages = |sequence: usize| {
            let prompt = if sequence == 0 { sizes.prefill.max(sizes.context) } else { sizes.context };
            let len = prompt + (sizes.warm + sizes.steps).max(SKIP_HORIZON);
            len.div_ceil(BLOCK_SIZE)
        };
        let all: usize = (0..sequences).map(|sequence| layers * pages(sequence)).sum();
        let kv = model.new_kv(model.dims().kv_layout(BLOCK_SIZE), all)?;
        // A step that is prime scatters neighbours.
        let mut ids = (0..all).map(|i| ((i * 10_000_019) % all) as PageId);
        let tables = (0..sequences)
            .map(|sequence| (0..layers).map(|_| ids.by_ref().take(pages(sequence)).collect()).collect())
            .collect();
        Ok(Self { plan: Plan::dense(layers), model, kv, tables, lens: vec![0; sequences], sizes })
    }

    /// Runs `tokens` of each of these sequences, and returns each one's next token.
    fn step(&mut self, rows: &[(usize, Vec<u32>)]) -> model_zoo::Result<Vec<u32>> {
        let layers = self.model.dims().num_layers;
        let held = |layer, len| self.plan.active_len(layer, Sublayer::Attention, (0, len));
        let lens: Vec<Vec<_>> = rows
            .iter()
            .map(|(sequence, _)| (0..layers).map(|layer| held(layer, self.lens[*sequence])).collect())
            .collect();
        let mut states = vec![RowState::default(); rows.len()];
        let mut batch = StepBatch::default();
        for (((sequence, tokens), kv_len), state) in rows.iter().zip(&lens).zip(&mut states) {
            batch.rows.push(StepRow {
                tokens,
                first_pos: self.lens[*sequence],
                images: &[],
                kv_len,
                block_tables: &self.tables[*sequence],
                logits: LogitRows::Last,
                plan: &self.plan,
                state,
            });
        }
        self.model.forward(&mut batch, &mut self.kv)?;
        for (sequence, tokens) in rows {
            self.lens[*sequence] += tokens.len();
        }
        let greedy = |row| Draw { row, top_k: 0, temperature: 0.0, top_p: 1.0, min_p: 0.0, uniform: 0.0 };
        let draws: Vec<Draw> = (0..rows.len()).map(greedy).collect();
        Ok(self.model.choose(&draws)?.unwrap_or_default())
    }

    fn prompt(&self, sequence: usize, len: usize) -> Vec<u32> {
        let vocab = self.model.dims().vocab_size;
        (0..len).map(|i| ((i * 7919 + sequence * 104_729 + 11) % vocab) as u32).collect()
    }

    /// Median seconds of a step of `batch` rows after their contexts, and joules a token.
    fn decode(&mut self, batch: usize, target: &Target) -> model_zoo::Result<(f64, Option<f64>)> {
        let (times, joules) = self.steps(batch, target)?;
        Ok((median(times), joules))
    }

    /// Mean seconds of a step of one row, for plans whose steps differ, and joules a token.
    fn decode_mean(&mut self, target: &Target) -> model_zoo::Result<(f64, Option<f64>)> {
        let (times, joules) = self.steps(1, target)?;
        Ok((times.iter().sum::<f64>() / times.len() as f64, joules))
    }

    /// Seconds of each step of `batch` rows after their contexts, and joules a token.
    fn steps(&mut self, batch: usize, target: &Target) -> model_zoo::Result<(Vec<f64>, Option<f64>)> {
        let Sizes { context, chunk, warm, steps, .. } = self.sizes;
        let mut next = Vec::new();
        for sequence in 0..batch {
            self.lens[sequence] = 0;
            let prompt = self.prompt(sequence, context);
            let mut token = Vec::new();
            for tokens in prompt.chunks(chunk) {
                token = self.step(&[(sequence, tokens.to_vec())])?;
            }
            next.extend(token);
        }
        let mut times = Vec::new();
        let mut joules = None;
        for step in 0..warm + steps {
            if step == warm {
                joules = target.joules();
            }
            let rows: Vec<_> =
                next.iter().enumerate().map(|(sequence, &token)| (sequence, vec![token])).collect();
            let begin = Instant::now();
            next = self.step(&rows)?;
            times.push(begin.elapsed().as_secs_f64());
        }
        let used =
            joules.zip(target.joules()).map(|(before, after)| (after - before) / (steps * batch) as f64);
        Ok((times.split_off(warm), used))
    }

    /// Median seconds of a prefill to its first token.
    fn prefill(&mut self) -> model_zoo::Result<f64> {
        let prompt = self.prompt(0, self.sizes.prefill);
        let mut times = Vec::new();
        for _ in 0..7 {
            self.lens[0] = 0;
            let begin = Instant::now();
            for chunk in prompt.chunks(self.sizes.chunk) {
                self.step(&[(0, chunk.to_vec())])?;
            }
            times.push(begin.elapsed().as_secs_f64());
        }
        Ok(median(times.split_off(2)))
    }
}

#[cfg(feature = "cuda-emulated")]
#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use model_zoo::kernels::cuda::emulated::{Emulated, Order};

    use super::*;

    #[test]
    fn every_measurement_runs_on_the_emulated_device() {
        let goals = [""; 4];
        let sizes = Sizes { context: 9, prefill: 40, chunk: 35, warm: 3, steps: 2 };
        let target = Target::Device(Arc::new(Emulated::new(Order::Upwards)));
        let mut bytes = Vec::new();
        for (ffn, levels) in [(40, None), (64, None), (64, Some(3))] {
            let (hidden, heads, head_dim) = (32, [4, 2], 16);
            let shape =
                Shape { name: "tiny", hidden, ffn, layers: 2, heads, head_dim, vocab: 50, tied: true, goals };
            let weights = RandomWeights::of(&shape.config(), 0.1);
            let model = build(shape.config(), (&weights, levels), &target).unwrap();
            bytes.push(model.dims().weight_bytes);
            let mut bench = Bench::new(model, 3, sizes).unwrap();
            for batch in [1, 3] {
                let (seconds, joules) = bench.decode(batch, &target).unwrap();
                assert!(seconds > 0.0 && joules.is_none());
                assert_eq!(bench.lens[..batch], vec![9 + 5; batch], "every step ran every row");
            }
            assert!(bench.prefill().unwrap() > 0.0);
            assert_eq!(bench.lens[0], 40);
        }
        assert_ne!(bytes[1], bytes[2], "levels are other weights");
    }
}
