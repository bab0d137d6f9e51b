//! The engine's speed on a GPU at the shapes of known models, with random weights, bf16, quantized or BitStack levels: decode at a
//! context of 1,024 tokens and prefill of 2,048, through [`CausalLm`], beside what must be reached.

mod bench;
mod plans;
mod shape;

use model_zoo::compression::bitstack::random::RandomLevels;
use model_zoo::config::DecoderConfig;
use model_zoo::loader::{LoadOptions, Target, build_in_levels, build_on};
use model_zoo::models::CausalLm;
use model_zoo::weights::{GgmlDType, RandomWeights};

use bench::{Bench, SIZES, Sizes, shown};
use shape::{SHAPES, Shape};

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
    /// Weights quantized to a GGUF type, in place of bf16 ones
    #[arg(long, conflicts_with = "levels")]
    quantized: Option<Quantized>,
    /// Index of the GPU
    #[arg(long, default_value_t = 0)]
    gpu: usize,
}

/// GGUF types that random weights come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Quantized {
    #[value(name = "q4_0")]
    Q4_0,
    #[value(name = "q4_k")]
    Q4K,
    #[value(name = "q6_k")]
    Q6K,
    #[value(name = "q8_0")]
    Q8_0,
}

impl Quantized {
    fn dtype(self) -> GgmlDType {
        match self {
            Self::Q4_0 => GgmlDType::Q4_0,
            Self::Q4K => GgmlDType::Q4K,
            Self::Q6K => GgmlDType::Q6K,
            Self::Q8_0 => GgmlDType::Q8_0,
        }
    }
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
    let config = shape.sizes.config();
    let mut weights = RandomWeights::of(&config, 0.02);
    let mut kind = options.levels.map_or("bf16".into(), |levels| format!("{levels} levels"));
    if let Some(quantized) = options.quantized.map(Quantized::dtype) {
        (weights, kind) = (weights.quantized(quantized), format!("{quantized:?}"));
    }
    let model = build(config, (&weights, options.levels), target)?;
    println!(
        "| {} | {}, {kind} | {} MiB of weights | | |",
        shape.name,
        model.device(),
        model.dims().weight_bytes >> 20
    );
    let mut bench = Bench::new(model, most, sizes)?;
    // A GPU that has rested is slow at first.
    bench.decode(1, target)?;
    for &batch in batches {
        let (seconds, joules) = bench.decode(batch, target)?;
        let goal = match batch {
            1 => shape.goals[0],
            32 => shape.goals[1],
            128 => shape.goals[2],
            _ => "",
        };
        let (ms, rate) = (1e3 * seconds, batch as f64 / seconds);
        let joules = shown(joules);
        let what = format!("decode of {batch}, context {}", sizes.context);
        println!("| {} | {what} | {ms:.3} ms, {rate:.0} /s | {joules} | {goal} |", shape.name);
    }
    let seconds = bench.prefill()?;
    let (name, ms) = (shape.name, 1e3 * seconds);
    println!("| {name} | prefill of {} | {ms:.2} ms | | {} |", sizes.prefill, shape.goals[3]);
    if !options.plans {
        return Ok(());
    }
    plans::compare(shape, &mut bench, target)?;
    plans::skip_ffns(shape, &mut bench, target)?;
    batches.iter().try_for_each(|&batch| plans::prune_keys(shape, (&mut bench, batch), target))
}

/// The rank that artefacts of large models are made with.
const LEVEL_RANK: usize = 16;

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

#[cfg(feature = "cuda-emulated")]
#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use model_zoo::kernels::cuda::emulated::{Emulated, Order};
    use model_zoo::weights::LlamaShape;

    use super::*;

    #[test]
    fn every_measurement_runs_on_the_emulated_device() {
        let goals = [""; 4];
        let sizes = Sizes { context: 9, prefill: 40, chunk: 35, warm: 3, steps: 2 };
        let target = Target::Device(Arc::new(Emulated::new(Order::Upwards)));
        let mut bytes = Vec::new();
        let q8 = Some(GgmlDType::Q8_0);
        for (ffn, levels, quantized) in
            [(40, None, None), (64, None, None), (64, Some(3), None), (64, None, q8)]
        {
            let (hidden, heads, head_dim) = (32, [4, 2], 32);
            let llama = LlamaShape { hidden, ffn, layers: 4, heads, head_dim, vocab: 50, tied: true };
            let shape = Shape { name: "tiny", sizes: llama, goals };
            let mut weights = RandomWeights::of(&shape.sizes.config(), 0.1);
            if let Some(dtype) = quantized {
                weights = weights.quantized(dtype);
            }
            let model = build(shape.sizes.config(), (&weights, levels), &target).unwrap();
            bytes.push(model.dims().weight_bytes);
            let mut bench = Bench::new(model, 3, sizes).unwrap();
            for batch in [1, 3] {
                let (seconds, joules) = bench.decode(batch, &target).unwrap();
                assert!(seconds > 0.0 && joules.is_none());
                assert_eq!(bench.lens[..batch], vec![9 + 5; batch], "every step ran every row");
            }
            assert!(bench.prefill().unwrap() > 0.0);
            assert_eq!(bench.lens[0], 40);
            // Plans are measured by weights in bf16 only.
            if ffn != 40 {
                continue;
            }
            plans::skip_ffns(&shape, &mut bench, &target).unwrap();
            assert!(bench.states[0].ffns_skipped > 0);
            bench.sizes.context = 200;
            plans::prune_keys(&shape, (&mut bench, 2), &target).unwrap();
            assert!(bench.tables[1][0].len() < bench.pages[1][0].len(), "pages were packed");
        }
        assert_ne!(bytes[1], bytes[2], "levels are other weights");
        assert!(bytes[3] < bytes[1], "codes are smaller");
    }
}
