//! What the tests of models share.

use std::path::{Path, PathBuf};

use model_zoo::compression::{Plan, RowState};
use model_zoo::config::DecoderConfig;
use model_zoo::kv_cache::{KvCache, PageId};
use model_zoo::loader::{LoadOptions, load};
use model_zoo::models::CausalLm;
use model_zoo::step::{LogitRows, StepBatch, StepRow};

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
const BLOCK_SIZE: usize = 16;

/// One sequence over a paged KV cache whose pages are poisoned and handed out in a scattered order.
pub(crate) struct Sequence {
    model: Box<dyn CausalLm>,
    kv: KvCache,
    block_tables: Vec<Vec<PageId>>,
    len: usize,
}

impl Sequence {
    /// A sequence of up to `capacity` tokens on the model at `path`.
    pub(crate) fn new(path: &Path, capacity: usize) -> Self {
        let model = load(path, &LoadOptions::default()).unwrap().model;
        let num_layers = model.dims().num_layers;
        let blocks = capacity.div_ceil(BLOCK_SIZE);
        let num_pages = num_layers * blocks;
        let mut kv = KvCache::new(model.dims().kv_layout(BLOCK_SIZE), num_pages);
        (0..num_pages).for_each(|page| kv.poison(page as PageId));
        // A step coprime to any such number visits every page once.
        let scattered = |i: usize| ((i * 10_007 + 3) % num_pages) as PageId;
        let block_tables = (0..num_layers)
            .map(|layer| (0..blocks).map(|block| scattered(layer * blocks + block)).collect())
            .collect();
        Self { model, kv, block_tables, len: 0 }
    }

    /// Runs `tokens` as the next chunk of the sequence; returns the logits of each.
    pub(crate) fn feed(&mut self, tokens: &[u32]) -> Vec<Vec<f32>> {
        let dims = self.model.dims().clone();
        let plan = Plan::dense(dims.num_layers);
        let mut state = RowState::default();
        let row = StepRow {
            tokens,
            first_pos: self.len,
            kv_len: &vec![self.len; dims.num_layers],
            block_tables: &self.block_tables,
            logits: LogitRows::All,
            plan: &plan,
            state: &mut state,
        };
        self.model.forward(&mut StepBatch { rows: vec![row] }, &mut self.kv).unwrap();
        self.len += tokens.len();
        let logits = self.model.logits(0..tokens.len()).unwrap();
        logits.chunks_exact(dims.vocab_size).map(<[f32]>::to_vec).collect()
    }

    /// Runs `tokens` in chunks of these sizes, repeated; returns the logits of each token.
    pub(crate) fn feed_chunks(&mut self, mut tokens: &[u32], sizes: &[usize]) -> Vec<Vec<f32>> {
        let mut logits = Vec::new();
        for &size in sizes.iter().cycle() {
            let (chunk, rest) = tokens.split_at(size.min(tokens.len()));
            logits.extend(self.feed(chunk));
            tokens = rest;
            if tokens.is_empty() {
                break;
            }
        }
        logits
    }
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
