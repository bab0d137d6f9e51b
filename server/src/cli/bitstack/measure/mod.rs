//! `rheostat bitstack measure`

mod gguf;
mod plot;
mod report;

use std::path::{Path, PathBuf};

use model_zoo::calibrate::Progress;
use model_zoo::compression::Plan;
use model_zoo::compression::bitstack::Artefact;
use model_zoo::compression::bitstack::dense::EightBit;
use model_zoo::compression::bitstack::source::Source;
use model_zoo::config::DecoderConfig;
use model_zoo::eval::{Runner, Windows, score};
use model_zoo::loader::{LoadOptions, weights_sha256};
use model_zoo::models::decoder::CpuDecoder;
use model_zoo::tokenizer::Tokenizer;
use model_zoo::weights::WeightSource;
use serde::Serialize;

use crate::cli::calibrate::{Bar, read_text};
use crate::cli::model::ModelFlags;
use crate::telemetry::logs::{self, LogFormat};

const WINDOW: usize = 1024;
const PROMPT: usize = 512;

/// `rheostat bitstack measure`'s flags.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// The stack
    file: PathBuf,
    /// UTF-8 text to score, not the one that the stack was built on
    #[arg(long)]
    text: PathBuf,
    /// The model that the stack was built of: measured as it is, and in GGUF's types at the sizes that they have
    #[command(flatten)]
    model: ModelFlags,
    /// Leave out GGUF's types
    #[arg(long)]
    alone: bool,
    /// Budgets between the base and the whole stack
    #[arg(long, default_value_t = 16)]
    budgets: usize,
    /// Windows of 1024 tokens to score, each with 512 tokens of prompt
    #[arg(long, default_value_t = 10)]
    windows: usize,
    /// Folder for bitstack.json, bitstack.md and bitstack.png
    #[arg(long, default_value = "bitstack")]
    out: PathBuf,
    /// Level of log lines
    #[arg(long, env = "RHEOSTAT_LOG", default_value = "info")]
    log: String,
}

/// One model's figures.
#[derive(Debug, Clone, Serialize)]
struct Row {
    name: String,
    /// Bytes that were allowed, for a stack.
    asked: Option<u64>,
    /// Bytes of all weights, as stored.
    bytes: u64,
    /// Blocks of the stack above the base.
    blocks: Option<usize>,
    /// The next block's bytes: what was held is nearer to what was asked.
    next_block: Option<u64>,
    /// Bits a decomposed weight.
    bits: f64,
    perplexity: f64,
}

/// Measures one stack and writes the three files.
pub(super) fn main(options: &Options) -> Result<(), String> {
    logs::init(&options.log, LogFormat::Text)?;
    let artefact = Artefact::open(&options.file).map_err(|e| e.to_string())?;
    let text = read_text(&options.text)?;
    let tokenizer = artefact.tokenizer().and_then(|source| Tokenizer::load(&source, None));
    let tokenizer = tokenizer.map_err(|e| e.to_string())?;
    let tokens = tokenizer.encode(&text, false).map_err(|e| e.to_string())?;
    let bos = tokenizer.special().bos;
    let windows = Windows { tokens: &tokens, len: WINDOW, prompt: PROMPT, max: options.windows, bos };
    let mut meter = Meter { windows, threads: threads(options), bar: Bar::default(), done: 0, total: 0 };
    let held = prefixes(&artefact, options.budgets);
    let source = (!options.alone).then(|| source(options, &artefact)).transpose()?;
    meter.total = held.len() + source.as_ref().map_or(0, |_| gguf::TYPES.len() + 1);
    let mut rows = Vec::new();
    if let Some(source) = &source {
        rows.extend(gguf::rows(source, &mut meter)?);
    }
    for blocks in held {
        rows.push(of_prefix(&artefact, blocks, &mut meter)?);
    }
    let title = format!(
        "{} on {}",
        artefact.provenance().model,
        options.text.file_name().unwrap_or_default().to_string_lossy()
    );
    write(options, (&title, &artefact.provenance().settings), &rows)
}

fn threads(options: &Options) -> usize {
    options.model.threads.unwrap_or(LoadOptions::default().threads).get()
}

/// The model that the stack was built of.
fn source(options: &Options, artefact: &Artefact) -> Result<Source, String> {
    let found = options.model.find()?;
    if weights_sha256(&found.path).map_err(|e| e.to_string())? != artefact.provenance().weights_sha256 {
        return Err(format!(
            "{} was not built of {}: name its model with --model, or leave the others out with --alone",
            options.file.display(),
            found.path.display()
        ));
    }
    Source::open(&found.path).map_err(|e| e.to_string())
}

/// Bytes with the first `blocks` of the stack, as stored.
fn bytes_of(artefact: &Artefact, blocks: usize) -> u64 {
    let held = artefact.base().iter().chain(&artefact.stack()[..blocks]);
    artefact.tensor_bytes() + held.map(|entry| entry.len).sum::<u64>()
}

/// `(bytes asked, blocks that fit)` of evenly spaced budgets, the base and the whole stack among them.
fn prefixes(artefact: &Artefact, budgets: usize) -> Vec<(u64, usize)> {
    let all = artefact.stack().len();
    let (least, most) = (bytes_of(artefact, 0), bytes_of(artefact, all));
    let steps = budgets.max(2) as u64 - 1;
    let mut sizes = Vec::with_capacity(all + 1);
    let mut bytes = least;
    sizes.push(bytes);
    for entry in artefact.stack() {
        bytes += entry.len;
        sizes.push(bytes);
    }
    (0..=steps)
        .map(|step| {
            let asked = least + (most - least) * step / steps;
            (asked, sizes.partition_point(|&size| size <= asked) - 1)
        })
        .collect()
}

fn of_prefix(
    artefact: &Artefact,
    (asked, blocks): (u64, usize),
    meter: &mut Meter<'_>,
) -> Result<Row, String> {
    let perplexity = meter.perplexity(artefact.config(), &EightBit::new(artefact, blocks))?;
    let bytes = bytes_of(artefact, blocks);
    let weights: usize = artefact
        .base()
        .iter()
        .map(|entry| artefact.shape(entry.linear))
        .map(|shape| shape.rows * shape.cols)
        .sum();
    Ok(Row {
        name: "BitStack".to_owned(),
        asked: Some(asked),
        bytes,
        blocks: Some(blocks),
        next_block: artefact.stack().get(blocks).map(|entry| entry.len),
        bits: 8.0 * (bytes - artefact.tensor_bytes()) as f64 / weights as f64,
        perplexity,
    })
}

/// Scores models on the text.
struct Meter<'a> {
    windows: Windows<'a>,
    threads: usize,
    bar: Bar,
    done: usize,
    total: usize,
}

impl Meter<'_> {
    fn perplexity(&mut self, config: &DecoderConfig, weights: &dyn WeightSource) -> Result<f64, String> {
        let scored = || {
            let mut decoder = CpuDecoder::load(config.clone(), weights, self.threads)?;
            let mut runner = Runner::new(&mut decoder, 1, self.windows.len)?;
            score(&mut runner, &self.windows, &[Plan::dense(config.num_layers)], |_, _| {})
        };
        let scores = scored().map_err(|e| e.to_string())?;
        self.done += 1;
        self.bar.show(Progress { stage: "perplexity", done: self.done, total: self.total });
        Ok(scores[0].perplexity())
    }
}

fn write(options: &Options, (title, settings): (&str, &str), rows: &[Row]) -> Result<(), String> {
    std::fs::create_dir_all(&options.out).map_err(|e| format!("{}: {e}", options.out.display()))?;
    let write = |name: &str, content: String| {
        let path: &Path = &options.out.join(name);
        std::fs::write(path, content).map_err(|e| format!("{}: {e}", path.display()))
    };
    write("bitstack.json", report::json((title, settings), rows)?)?;
    let table = report::markdown((title, settings), rows);
    write("bitstack.md", table.clone())?;
    plot::draw(&options.out.join("bitstack.png"), title, rows)?;
    println!("{table}");
    Ok(())
}
