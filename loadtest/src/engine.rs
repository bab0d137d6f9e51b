//! Rates of prefill and of decode with 1 to 16 streams, through [`CausalLm`] over paged KV.

use std::num::NonZeroUsize;
use std::path::Path;
use std::time::Instant;

use model_zoo::Result;
use model_zoo::compression::{Plan, RowState};
use model_zoo::kv_cache::{KvCache, PageId};
use model_zoo::loader::{LoadOptions, load};
use model_zoo::models::CausalLm;
use model_zoo::step::{LogitRows, StepBatch, StepRow};

const ROUNDS: usize = 3;
const DECODE_STEPS: usize = 48;
/// Prompt tokens of a step at most, as the server's default budget has it.
const CHUNK: usize = 512;
const BLOCK_SIZE: usize = 16;

/// Sequences of up to 1,024 tokens with the pages they need.
struct Bench {
    model: Box<dyn CausalLm>,
    kv: KvCache,
    plan: Plan,
    sequences: Vec<Sequence>,
}

struct Sequence {
    tables: Vec<Vec<PageId>>,
    len: usize,
}

fn token(i: usize, vocab: usize) -> u32 {
    (100 + (i * 7919) % (vocab - 200)) as u32
}

/// Prints every measurement whose name contains `only`.
///
/// # Errors
/// When the model cannot be loaded or a step fails.
pub(crate) fn measure(model: &Path, threads: Option<NonZeroUsize>, only: &str) -> Result<()> {
    let mut options = LoadOptions::default();
    options.threads = threads.unwrap_or(options.threads);
    let mut bench = Bench::new(load(model, &options)?.model, 16, 1024 + DECODE_STEPS)?;
    for n in [16, 512, 1024] {
        let what = format!("prefill {n}");
        if what.contains(only) {
            bench.report(&what, |bench| bench.prefill_rate(n))?;
        }
    }
    for streams in [1, 2, 4, 8, 16] {
        for first in [16, 512] {
            let what = format!("decode {streams} streams from {first}");
            if what.contains(only) {
                bench.report(&what, |bench| bench.decode_rate(streams, first))?;
            }
        }
    }
    Ok(())
}

impl Bench {
    fn new(model: Box<dyn CausalLm>, sequences: usize, max_len: usize) -> Result<Self> {
        let layers = model.dims().num_layers;
        let pages = max_len.div_ceil(BLOCK_SIZE);
        let kv = model.new_kv(model.dims().kv_layout(BLOCK_SIZE), sequences * layers * pages)?;
        let mut ids = 0..(sequences * layers * pages) as PageId;
        let sequences = (0..sequences)
            .map(|_| Sequence {
                tables: (0..layers).map(|_| ids.by_ref().take(pages).collect()).collect(),
                len: 0,
            })
            .collect();
        Ok(Self { plan: Plan::dense(layers), model, kv, sequences })
    }

    fn report(&mut self, what: &str, mut rate: impl FnMut(&mut Self) -> Result<f64>) -> Result<()> {
        let mut rates = (0..ROUNDS).map(|_| rate(self)).collect::<Result<Vec<_>>>()?;
        rates.sort_by(f64::total_cmp);
        let round = |rate: f64| (rate * 10.0).round() / 10.0;
        let (best, median) = (round(rates[ROUNDS - 1]), round(rates[ROUNDS / 2]));
        println!("{}", serde_json::json!({ "what": what, "best": best, "median": median }));
        Ok(())
    }

    /// Runs `tokens[i]` on sequence `i` and samples each greedily.
    fn step(&mut self, tokens: &[Vec<u32>]) -> Result<usize> {
        let layers = self.model.dims().num_layers;
        let lens: Vec<_> = self.sequences.iter().map(|s| vec![s.len; layers]).collect();
        let mut states = vec![RowState::default(); tokens.len()];
        let mut batch = StepBatch::default();
        for (((tokens, sequence), kv_len), state) in
            tokens.iter().zip(&self.sequences).zip(&lens).zip(&mut states)
        {
            batch.rows.push(StepRow {
                tokens,
                first_pos: sequence.len,
                images: &[],
                kv_len,
                block_tables: &sequence.tables,
                logits: LogitRows::Last,
                plan: &self.plan,
                state,
            });
        }
        self.model.forward(&mut batch, &mut self.kv)?;
        for (tokens, sequence) in tokens.iter().zip(&mut self.sequences) {
            sequence.len += tokens.len();
        }
        let vocab = self.model.dims().vocab_size;
        let logits = self.model.logits(0..tokens.len())?;
        let best = |row: &[f32]| {
            row.iter()
                .enumerate()
                .fold((0, f32::MIN), |best, (i, &v)| if v > best.1 { (i, v) } else { best })
                .0
        };
        Ok(logits.chunks_exact(vocab).map(best).max().unwrap_or(0))
    }

    /// Fills sequence 0 … `streams - 1` with `len` tokens each, one after the other.
    fn fill(&mut self, streams: usize, len: usize) -> Result<()> {
        let vocab = self.model.dims().vocab_size;
        for stream in 0..streams {
            self.sequences.swap(0, stream);
            self.sequences[0].len = 0;
            for start in (0..len).step_by(CHUNK) {
                self.step(&[(start..len.min(start + CHUNK)).map(|i| token(i, vocab)).collect()])?;
            }
            self.sequences.swap(0, stream);
        }
        Ok(())
    }

    fn prefill_rate(&mut self, len: usize) -> Result<f64> {
        self.fill(1, 16)?;
        let start = Instant::now();
        self.fill(1, len)?;
        Ok(len as f64 / start.elapsed().as_secs_f64())
    }

    fn decode_rate(&mut self, streams: usize, first: usize) -> Result<f64> {
        self.fill(streams, first)?;
        let vocab = self.model.dims().vocab_size;
        let start = Instant::now();
        for k in 0..DECODE_STEPS {
            self.step(&(0..streams).map(|s| vec![token(k + s, vocab)]).collect::<Vec<_>>())?;
        }
        Ok((streams * DECODE_STEPS) as f64 / start.elapsed().as_secs_f64())
    }
}
