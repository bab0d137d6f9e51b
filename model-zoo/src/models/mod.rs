//! Decoders. One trait between the engine and every model.

pub mod decoder;
pub mod elastic;
#[cfg(any(feature = "cuda", feature = "cuda-emulated"))]
pub mod gpu;
mod levels;
pub mod toy;

use crate::Result;
use crate::config::DecoderConfig;
use crate::kv_cache::{KvCache, KvLayout};
use crate::models::elastic::ElasticWeights;
use crate::step::StepBatch;

/// A model's sizes, as the engine and admission need them.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelDims {
    /// Architecture name, as in `general.architecture` (`llama`, `qwen3`, `gemma3`, …).
    pub architecture: String,
    /// Decoder layers.
    pub num_layers: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Query heads.
    pub num_heads: usize,
    /// KV heads.
    pub num_kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Logits per row.
    pub vocab_size: usize,
    /// The longest sequence that the checkpoint was made for, in tokens.
    pub max_context: usize,
    /// Bytes of weights held in memory.
    pub weight_bytes: usize,
    /// Weights of one attention and of one feed-forward sublayer: how their work compares.
    pub sublayer_weights: [usize; 2],
}

impl ModelDims {
    /// The sizes that `config` says, of a model that holds `weight_bytes`; see the fields.
    pub(crate) fn of(config: &DecoderConfig, weight_bytes: usize, sublayer_weights: [usize; 2]) -> Self {
        Self {
            architecture: config.architecture.clone(),
            num_layers: config.num_layers,
            hidden_size: config.hidden_size,
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            vocab_size: config.vocab_size,
            max_context: config.max_context,
            weight_bytes,
            sublayer_weights,
        }
    }

    /// Page geometry for pages of `block_size` slots.
    pub fn kv_layout(&self, block_size: usize) -> KvLayout {
        KvLayout { num_kv_heads: self.num_kv_heads, head_dim: self.head_dim, block_size }
    }
}

/// How the next token of one logit row is drawn: temperature, then min_p, top_k, top_p.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// The row of logits.
    pub row: usize,
    /// Heaviest tokens kept; 0 for all.
    pub top_k: u32,
    /// 0 takes the likeliest token, of equals the one of lowest id.
    pub temperature: f32,
    /// The mass of the heaviest tokens that are kept.
    pub top_p: f32,
    /// The least weight, beside the heaviest token's.
    pub min_p: f32,
    /// The draw, in [0, 1).
    pub uniform: f32,
}

/// A causal language model that runs ragged steps over paged KV.
pub trait CausalLm: Send {
    /// The model's sizes.
    fn dims(&self) -> &ModelDims;

    /// Runs the decoder over every row of `batch`, writing their K and V into `kv`, and keeps the final
    /// hidden states of the rows that want logits for [`CausalLm::logits`].
    ///
    /// # Errors
    /// [`crate::ZooError::Step`] when the batch is malformed (empty row, token outside the vocabulary,
    /// table too short); nothing is written then.
    fn forward(&mut self, batch: &mut StepBatch<'_>, kv: &mut KvCache) -> Result<()>;

    /// Logits `[rows.len(), vocab_size]`, f32, of the last step's logit rows in `rows` (see
    /// [`StepBatch::num_logit_rows`]). Ask in small ranges: the result is the model's scratch memory.
    ///
    /// # Errors
    /// [`crate::ZooError::Step`] when `rows` is outside the last step.
    fn logits(&mut self, rows: std::ops::Range<usize>) -> Result<&[f32]>;

    /// A pool of `num_pages` pages of `layout` for this model's steps.
    ///
    /// # Errors
    /// [`crate::ZooError::Memory`] or [`crate::ZooError::Device`] when there is no room for it.
    fn new_kv(&self, layout: KvLayout, num_pages: usize) -> Result<KvCache> {
        KvCache::new(layout, num_pages)
    }

    /// Draws a token for each of `draws`, in order of their rows of the last step's logits, where the model's device
    /// can; `None` where the caller has to, from [`CausalLm::logits`]. The token of a row whose logits are not numbers is
    /// [`u32::MAX`].
    ///
    /// # Errors
    /// As [`CausalLm::logits`].
    fn choose(&mut self, _draws: &[Draw]) -> Result<Option<Vec<u32>>> {
        Ok(None)
    }

    /// What it runs on, for people.
    fn device(&self) -> String {
        "cpu".into()
    }

    /// Whether it runs on a GPU.
    fn is_on_gpu(&self) -> bool {
        false
    }

    /// Bytes that are left for KV where it runs; `None` on the CPU, whose memory others use, too.
    fn kv_room(&self) -> Option<u64> {
        None
    }

    /// The weights, where they can be held in part.
    fn elastic(&mut self) -> Option<&mut dyn ElasticWeights> {
        None
    }
}
