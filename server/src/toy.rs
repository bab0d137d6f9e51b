//! A whole service over a toy model, for tests of what stands in front of the engine.
//!
//! The model continues the alphabet: after `c` comes `d`, after `z` comes `a`. It never ends a text by
//! itself. Each step takes about a millisecond, so that long requests are still running when a test
//! cancels them.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use model_zoo::compression::Offer;
use model_zoo::kv_cache::KvCache;
use model_zoo::loader::TokenizerSource;
use model_zoo::models::{CausalLm, ModelDims};
use model_zoo::step::{LogitRows, StepBatch};
use model_zoo::tokenizer::Tokenizer;
use serde_json::json;

use crate::admission::Limits;
use crate::auth::{KeyConfig, KeyRing};
use crate::energy::Energy;
use crate::images::ImageLimits;
use crate::memory::{MemoryTargets, OnShrink};
use crate::scheduler::SchedulerConfig;
use crate::service::{ModelInfo, Service, ServiceParts};
use crate::telemetry::{Metrics, MetricsCompat, ServedModel};
use crate::verbosity::VerbosityConfig;

const LETTERS: u32 = 26;
const STEP: Duration = Duration::from_millis(1);

struct ToyModel {
    dims: ModelDims,
    /// The likeliest token after each logit row of the last step.
    next: Vec<u32>,
    logits: Vec<f32>,
}

impl CausalLm for ToyModel {
    fn dims(&self) -> &ModelDims {
        &self.dims
    }

    fn forward(&mut self, batch: &mut StepBatch<'_>, _kv: &mut KvCache) -> model_zoo::Result<()> {
        std::thread::sleep(STEP);
        self.next.clear();
        for row in &batch.rows {
            let scored = match row.logits {
                LogitRows::None => &[],
                LogitRows::Last => &row.tokens[row.tokens.len() - 1..],
                LogitRows::All => row.tokens,
            };
            self.next.extend(scored.iter().map(|token| (token + 1) % LETTERS));
        }
        Ok(())
    }

    fn logits(&mut self, rows: Range<usize>) -> model_zoo::Result<&[f32]> {
        let vocab = self.dims.vocab_size;
        self.logits.clear();
        self.logits.resize(rows.len() * vocab, 0.0);
        for (row, &token) in self.next[rows].iter().enumerate() {
            self.logits[row * vocab + token as usize] = 10.0;
        }
        Ok(&self.logits)
    }
}

/// A running service over the toy model, named `toy`, and its metrics.
pub(crate) fn service() -> (Service, Arc<Metrics>) {
    service_for(&[])
}

/// The same, for clients with `keys`.
pub(crate) fn service_for(keys: &[KeyConfig]) -> (Service, Arc<Metrics>) {
    let dims = ModelDims {
        architecture: "toy".into(),
        num_layers: 1,
        hidden_size: 8,
        num_heads: 1,
        num_kv_heads: 1,
        head_dim: 8,
        vocab_size: LETTERS as usize + 2,
        max_context: 1 << 20,
        weight_bytes: 0,
        sublayer_weights: [1; 2],
    };
    let info = ModelInfo {
        name: "toy".into(),
        created: 0,
        dims: dims.clone(),
        block_size: 16,
        most_model_len: dims.max_context,
        max_model_len: dims.max_context.into(),
        offer: Offer::default().into(),
    };
    let metrics = Arc::new(Metrics::new(&ServedModel::default(), MetricsCompat::None));
    let parts = ServiceParts {
        model: Box::new(ToyModel { dims, next: Vec::new(), logits: Vec::new() }),
        vision: None,
        tokenizer: Arc::new(tokenizer()),
        info,
        scheduler: SchedulerConfig {
            max_num_batched_tokens: 256,
            max_num_seqs: 32,
            block_size: 16,
            num_pages: 1 << 17,
            prefix_caching: true,
        },
        memory: MemoryTargets::default(),
        on_shrink: OnShrink::default(),
        limits: Limits::default(),
        images: ImageLimits::default(),
        keys: Arc::new(KeyRing::new(keys, Arc::clone(&metrics))),
        energy: Arc::new(Energy::off()),
        verbosity: VerbosityConfig::default(),
        metrics: Arc::clone(&metrics),
        governor: None,
    };
    (Service::start(parts).expect("a thread can be started"), metrics)
}

/// One token a letter, one for the space, and an end-of-sequence token.
fn tokenizer() -> Tokenizer {
    let letters = ('a'..='z').map(String::from).chain(["Ġ".to_owned()]);
    let vocab: serde_json::Map<_, _> = letters.zip(0..).map(|(text, id)| (text, json!(id))).collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let eos = json!({"id": LETTERS + 1, "content": "<eos>", "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [eos], "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    let folder = tempfile::tempdir().expect("a temporary folder");
    let files = [
        ("tokenizer.json", tokenizer),
        (
            "tokenizer_config.json",
            json!({"eos_token": "<eos>", "chat_template": "{{ messages[0].content }}"}),
        ),
    ];
    for (name, content) in files {
        std::fs::write(folder.path().join(name), content.to_string()).expect("the folder is writable");
    }
    Tokenizer::load(&TokenizerSource::Folder(folder.path().into()), None).expect("a valid tokenizer")
}
