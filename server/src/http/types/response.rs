//! Responses of completions and chats, whole and in chunks.

use std::collections::BTreeMap;

use model_zoo::compression::{CompressionOptions, VisualUse};
use serde::Serialize;
use utoipa::ToSchema;

use crate::energy::{EnergySum, EnergyUse};
use crate::request::ChoiceUsage;

/// Tokens of a whole request.
#[derive(Debug, Default, Clone, Serialize, ToSchema)]
pub(crate) struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptDetails,
    compression: CompressionUsage,
    /// What it was charged; not there without a meter, or where a counter was set back meanwhile.
    #[serde(skip_serializing_if = "Option::is_none")]
    energy: Option<EnergyUsage>,
    #[serde(skip)]
    energy_sum: EnergySum,
}

/// What a request was charged.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
pub(crate) struct EnergyUsage {
    /// Over all choices, beside what the machine draws when nothing runs.
    joules: f64,
    /// `nvml`, `rapl`, or `estimate`: by what they were measured.
    source: &'static str,
}

/// What of the model the request ran.
#[derive(Debug, Default, Clone, Serialize, ToSchema)]
pub(crate) struct CompressionUsage {
    /// The profile that the plan comes from: as named, as chosen for `auto`, or `dense` or `custom`.
    profile: String,
    /// The methods with every default filled in; empty for the whole model.
    #[schema(value_type = Object)]
    plan: CompressionOptions,
    /// Attention layers run, over all tokens.
    attention_layers_run: u64,
    /// Feed-forward layers run, over all tokens.
    ffn_layers_run: u64,
    /// Feed-forward layers that `ffn_skip` left out.
    ffn_layers_skipped: u64,
    /// Layers that the whole model has run for the same tokens.
    dense_layers: u64,
    /// Bytes of KV at the end, over all choices.
    kv_bytes: u64,
    /// What was run of the images that the prompt shows, if it shows any.
    #[serde(skip_serializing_if = "Option::is_none")]
    visual_tokens: Option<VisualTokens>,
    /// By which weights the tokens were made, of a model whose weights can be held in part.
    #[serde(skip_serializing_if = "Option::is_none")]
    weights: Option<WeightUsage>,
}

/// Image tokens of a prompt.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
pub(crate) struct VisualTokens {
    /// Tokens of the prompt that stand for images.
    shown: usize,
    /// Of those, tokens that went through to the last layer.
    kept: usize,
    /// Tokens that ran a layer, mean of the layers.
    mean_kept: f32,
}

/// The weights that a request was served with.
#[derive(Debug, Default, Clone, Serialize, ToSchema)]
pub(crate) struct WeightUsage {
    /// Times that a choice lost weights while it ran, and went on with fewer.
    moved_down: usize,
    /// The parts of the output, of each choice in order.
    served: Vec<ServedPart>,
}

/// A part of a choice's output.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct ServedPart {
    choice: usize,
    /// Blocks of weights over the base.
    blocks: usize,
    /// Levels of a matrix on average.
    levels: f32,
    /// Tokens sampled.
    completion_tokens: usize,
    /// Whether it goes on over the KV of the part before, which other blocks have made.
    continues: bool,
}

/// Of the prompt tokens.
#[derive(Debug, Default, Clone, Serialize, ToSchema)]
pub(crate) struct PromptDetails {
    /// Tokens whose KV came from the prefix cache.
    cached_tokens: usize,
}

impl Usage {
    /// Of a request that ran `plan`, which comes from `profile`.
    pub(crate) fn of(profile: &str, plan: CompressionOptions) -> Self {
        let profile = profile.to_owned();
        Self {
            compression: CompressionUsage { profile, plan, ..CompressionUsage::default() },
            ..Self::default()
        }
    }

    /// Adds a finished choice; the prompt counts once, with its first choice.
    pub(crate) fn add(&mut self, choice: usize, usage: &ChoiceUsage) {
        if choice == 0 {
            self.prompt_tokens += usage.prompt_tokens;
            self.prompt_tokens_details.cached_tokens += usage.cached_tokens;
        }
        self.completion_tokens += usage.completion_tokens;
        self.energy_sum.add(usage.energy);
        self.energy = self
            .energy_sum
            .total()
            .map(|EnergyUse { joules, source }| EnergyUsage { joules, source: source.as_str() });
        let (sum, work) = (&mut self.compression, &usage.work);
        sum.attention_layers_run += work.attention_layers;
        sum.ffn_layers_run += work.ffn_layers;
        sum.ffn_layers_skipped += work.ffns_skipped;
        sum.dense_layers += work.dense_layers;
        sum.kv_bytes += work.kv_bytes;
        let visual = |visual: VisualUse| VisualTokens {
            shown: visual.shown,
            kept: visual.kept,
            mean_kept: visual.mean,
        };
        sum.visual_tokens = sum.visual_tokens.or(work.visual.map(visual));
        if !usage.served.is_empty() {
            let weights = sum.weights.get_or_insert_default();
            weights.moved_down += usage.moved_down;
            weights.served.extend(usage.served.iter().map(|part| ServedPart {
                choice,
                blocks: part.blocks,
                levels: part.levels,
                completion_tokens: part.tokens,
                continues: part.continues,
            }));
        }
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
    }
}

/// Log-probabilities of a text completion: parallel arrays, one entry a token.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct CompletionLogprobs {
    pub(crate) tokens: Vec<String>,
    /// `null` for the first token of a prompt.
    pub(crate) token_logprobs: Vec<Option<f32>>,
    pub(crate) top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    /// Where each token begins in the text, in characters.
    pub(crate) text_offset: Vec<usize>,
}

/// One choice of a text completion, or a chunk of it.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct CompletionChoice {
    pub(crate) index: usize,
    pub(crate) text: String,
    pub(crate) logprobs: Option<CompletionLogprobs>,
    pub(crate) finish_reason: Option<&'static str>,
    /// The stop text that ended it, or the budget (`max_joules`, `deadline`) that was used up, or `verbosity`.
    pub(crate) stop_reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_ids: Option<Vec<u32>>,
}

/// A chat's log-probability of one token.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatLogprob {
    pub(crate) token: String,
    pub(crate) logprob: f32,
    pub(crate) bytes: Vec<u8>,
    pub(crate) top_logprobs: Vec<TopLogprob>,
}

/// An alternative.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TopLogprob {
    pub(crate) token: String,
    pub(crate) logprob: f32,
    pub(crate) bytes: Vec<u8>,
}

/// Log-probabilities of a chat choice.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct ChatLogprobs {
    pub(crate) content: Vec<ChatLogprob>,
}

/// A message, or what a chunk adds to it.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct ChatMessage {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) content: Option<String>,
}

/// One choice of a chat completion.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatChoice {
    pub(crate) index: usize,
    /// Of a whole response.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) message: Option<ChatMessage>,
    /// Of a chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) delta: Option<ChatMessage>,
    pub(crate) logprobs: Option<ChatLogprobs>,
    pub(crate) finish_reason: Option<&'static str>,
    /// The stop text that ended it, or the budget (`max_joules`, `deadline`) that was used up.
    pub(crate) stop_reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_ids: Option<Vec<u32>>,
}

/// A response, or a chunk of a stream.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Envelope<C> {
    pub(crate) id: String,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) choices: Vec<C>,
    /// Of the whole request; in a stream, on the last chunk when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) usage: Option<Option<Usage>>,
}
