//! What the tests of models share.

use std::path::{Path, PathBuf};

use model_zoo::compression::{Plan, RowState};
use model_zoo::config::DecoderConfig;
use model_zoo::kv_cache::{KvCache, PageId};
use model_zoo::loader::{LoadOptions, load};
use model_zoo::models::CausalLm;
use model_zoo::step::{LogitRows, StepBatch, StepRow};
use model_zoo::vision::PromptImage;

/// The folder of tiny models and their expected logits.
pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// The config of a fixture as transformers wrote it, with some keys replaced.
pub(crate) fn config_with(fixture: &str, changes: serde_json::Value) -> model_zoo::Result<DecoderConfig> {
    let text = std::fs::read_to_string(fixtures().join(fixture).join("config.json")).unwrap();
    let mut config = serde_json::from_str::<serde_json::Value>(&text).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    DecoderConfig::from_hf(&path)
}

/// KV slots in a page of these tests.
pub(crate) const BLOCK_SIZE: usize = 16;

/// A model over a paged KV cache whose pages are poisoned and handed out in a scattered order.
pub(crate) struct Runner {
    pub(crate) model: Box<dyn CausalLm>,
    pub(crate) kv: KvCache,
    free: Vec<PageId>,
}

/// A sequence's place in the cache.
#[derive(Clone)]
pub(crate) struct Sequence {
    pub(crate) block_tables: Vec<Vec<PageId>>,
    pub(crate) len: usize,
    pub(crate) plan: Plan,
    pub(crate) state: RowState,
    pub(crate) images: Vec<PromptImage>,
}

/// One sequence's part in a step of [`Runner::step`].
pub(crate) struct Chunk<'a> {
    pub(crate) sequence: &'a mut Sequence,
    pub(crate) tokens: &'a [u32],
    pub(crate) logits: LogitRows,
}

impl Runner {
    /// The model at `path` with KV for `num_sequences` sequences of `capacity` tokens.
    pub(crate) fn new(path: &Path, num_sequences: usize, capacity: usize) -> Self {
        Self::of(load(path, &LoadOptions::default()).unwrap().model, num_sequences, capacity)
    }

    /// The same over a loaded model.
    pub(crate) fn of(model: Box<dyn CausalLm>, num_sequences: usize, capacity: usize) -> Self {
        let num_pages = num_sequences * model.dims().num_layers * capacity.div_ceil(BLOCK_SIZE);
        let mut kv = model.new_kv(model.dims().kv_layout(BLOCK_SIZE), num_pages).unwrap();
        (0..num_pages).for_each(|page| kv.poison(page as PageId));
        // A step that is prime and larger than the pool visits every page once.
        let free = (0..num_pages).map(|i| ((i * 10_007 + 3) % num_pages) as PageId).collect();
        Self { model, kv, free }
    }

    /// An empty sequence with pages for `capacity` tokens.
    pub(crate) fn sequence(&mut self, capacity: usize) -> Sequence {
        let plan = Plan::dense(self.model.dims().num_layers);
        self.sequence_of(plan, capacity)
    }

    /// An empty sequence of `plan`, with the pages that its demand names and no more, and the blocks that it allows.
    pub(crate) fn sequence_of(&mut self, plan: Plan, capacity: usize) -> Sequence {
        let demand = plan.kv_demand();
        let mut pages = |slots: usize| self.free.split_off(self.free.len() - slots.div_ceil(BLOCK_SIZE));
        let block_tables =
            (0..plan.num_layers()).map(|layer| pages(demand.present(layer, capacity))).collect();
        let mut state = RowState::default();
        if let Some(elastic) = self.model.elastic() {
            let allowed = plan.levels().map(|levels| elastic.blocks_of_levels(levels));
            state.blocks = Some(elastic.held().min(allowed.unwrap_or(usize::MAX)));
        }
        Sequence { block_tables, len: 0, plan, state, images: Vec::new() }
    }

    /// Takes the pages of a sequence that has ended, poisoned.
    pub(crate) fn give_back(&mut self, sequence: Sequence) {
        let pages: Vec<PageId> = sequence.block_tables.into_iter().flatten().collect();
        pages.iter().for_each(|&page| self.kv.poison(page));
        self.free.extend(pages);
    }

    /// Runs one step; returns its logits, row after row.
    pub(crate) fn step(&mut self, chunks: Vec<Chunk<'_>>) -> model_zoo::Result<Vec<Vec<f32>>> {
        let dims = self.model.dims().clone();
        let mut chunks = chunks;
        let kv_len = |sequence: &Sequence| {
            let of_layer = |layer| sequence.plan.kv_len(layer, sequence.len, &sequence.state);
            (0..dims.num_layers).map(of_layer).collect::<Vec<_>>()
        };
        let lens = chunks.iter().map(|chunk| kv_len(chunk.sequence)).collect::<Vec<_>>();
        let rows = chunks.iter_mut().zip(&lens).map(|(chunk, lens)| StepRow {
            tokens: chunk.tokens,
            first_pos: chunk.sequence.len,
            images: &chunk.sequence.images,
            kv_len: lens,
            block_tables: &chunk.sequence.block_tables,
            logits: chunk.logits,
            plan: &chunk.sequence.plan,
            state: &mut chunk.sequence.state,
        });
        let mut batch = StepBatch { rows: rows.collect(), probe: None };
        let num_logit_rows = batch.num_logit_rows();
        self.model.forward(&mut batch, &mut self.kv)?;
        for chunk in chunks {
            chunk.sequence.len += chunk.tokens.len();
        }
        let logits = self.model.logits(0..num_logit_rows)?;
        Ok(logits.chunks_exact(dims.vocab_size).map(<[f32]>::to_vec).collect())
    }
}

/// Logits of every token of a prompt that runs alone, in chunks of these sizes, repeated.
pub(crate) fn prompt_logits(model: &Path, mut tokens: &[u32], sizes: &[usize]) -> Vec<Vec<f32>> {
    let mut runner = Runner::new(model, 1, tokens.len());
    let mut sequence = runner.sequence(tokens.len());
    let mut logits = Vec::new();
    for &size in sizes.iter().cycle() {
        let (chunk, rest) = tokens.split_at(size.min(tokens.len()));
        let chunk = Chunk { sequence: &mut sequence, tokens: chunk, logits: LogitRows::All };
        logits.extend(runner.step(vec![chunk]).unwrap());
        tokens = rest;
        if tokens.is_empty() {
            break;
        }
    }
    logits
}

/// How far logits are from others, over all positions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Distance {
    /// Root of the mean square difference.
    pub(crate) rms: f32,
    /// Largest absolute difference; infinite where a logit is not a number.
    pub(crate) largest: f32,
}

impl Distance {
    /// The distance of two equally long runs.
    pub(crate) fn between(a: &[Vec<f32>], b: &[Vec<f32>]) -> Self {
        assert_eq!(a.len(), b.len());
        let (mut squares, mut count, mut largest) = (0f64, 0, 0f32);
        for (a, b) in a.iter().zip(b) {
            assert_eq!(a.len(), b.len());
            for (a, b) in a.iter().zip(b) {
                let difference = (a - b).abs();
                largest = largest.max(if difference.is_nan() { f32::INFINITY } else { difference });
                squares += f64::from(difference).powi(2);
                count += 1;
            }
        }
        Self { rms: (squares / f64::from(count)).sqrt() as f32, largest }
    }
}
