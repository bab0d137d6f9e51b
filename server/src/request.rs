//! The vocabulary that every room shares: what a request asks for and what comes back. Plain data.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use model_zoo::compression::{Plan, VisualUse};
use model_zoo::vision::PromptImage;

use crate::admission::QueuePlace;
use crate::auth::{Charge, Client};
use crate::energy::EnergyUse;
use crate::traces::{GenerationSpan, Trace};

/// Who a request comes from.
#[derive(Debug, Clone, Default)]
pub struct Caller {
    /// The client that its API key belongs to; `None` where none was asked for.
    pub client: Option<Client>,
    /// The trace that the call belongs to.
    pub trace: Trace,
}

impl Caller {
    /// The name of the caller's key.
    pub fn name(&self) -> Option<&str> {
        self.client.as_ref().map(Client::name)
    }

    /// Whether it may touch what belongs to `owner`, the name of a key. Without keys all is everybody's.
    pub fn may_touch(&self, owner: Option<&str>) -> bool {
        self.client.as_ref().is_none_or(|client| client.is_admin() || owner == Some(client.name()))
    }
}

/// A request as the front ends hand it to [`crate::admission`]: converted from the wire, not validated.
#[derive(Debug, Clone, Default)]
pub struct RawRequest {
    /// The client's `x-request-id`, or empty for a fresh one.
    pub id: String,
    /// Who asks.
    pub caller: Caller,
    /// The model asked for; empty means the served one.
    pub model: String,
    /// What to complete.
    pub prompt: Prompt,
    /// Sampling as the client wrote it.
    pub sampling: SamplingParams,
    /// The token limit as the client wrote it; `None` means up to the context's end (chat) or 16 (text).
    pub max_tokens: Option<i64>,
    /// Completions asked for.
    pub n: i64,
    /// Return the prompt before the completion (text completions only).
    pub echo: bool,
    /// Return log-probabilities of the prompt's tokens.
    pub prompt_logprobs: bool,
    /// Encode text with the tokens that the model expects around it; `None` means yes for text. Chats
    /// have them in their template.
    pub add_special_tokens: Option<bool>,
    /// Requests share cached prefixes only with equal salts (tenant isolation); empty is the common cache.
    pub cache_salt: String,
    /// Joules that it may cost at most, as the client wrote them.
    pub max_joules: Option<f64>,
    /// Seconds from its arrival to its end at most, as the client wrote them.
    pub deadline: Option<f64>,
    /// Compression as the client wrote it.
    pub compression: model_zoo::compression::CompressionOptions,
}

/// What to complete.
#[derive(Debug, Clone)]
pub enum Prompt {
    /// Text, encoded with the model's special tokens unless they are there already.
    Text(String),
    /// Token ids, used as they are.
    Tokens(Vec<u32>),
    /// A chat, rendered with the model's template.
    Chat(Box<ChatPrompt>),
}

/// An image as a client sends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageSource {
    /// A `data:`, `http:` or `https:` URL.
    Url(String),
    /// A PNG, JPEG or WebP file.
    Bytes(Vec<u8>),
}

/// A chat to render with the model's template.
#[derive(Debug, Clone, Default)]
pub struct ChatPrompt {
    /// The messages, as JSON objects with at least `role` and `content`, as templates expect them. Those that
    /// show images have a list of parts as content: `{"type": "image"}` and `{"type": "text", "text": …}`.
    pub messages: Vec<serde_json::Value>,
    /// The images of the messages' parts, in order.
    pub images: Vec<ImageSource>,
    /// Tool definitions passed through to the template.
    pub tools: Vec<serde_json::Value>,
    /// Further template variables (`chat_template_kwargs`), already limited in size by admission.
    pub template_args: serde_json::Map<String, serde_json::Value>,
    /// Open an assistant turn at the end (the default of OpenAI's API).
    pub add_generation_prompt: bool,
}

impl Default for Prompt {
    fn default() -> Self {
        Self::Text(String::new())
    }
}

/// How the next token is chosen. Field meanings and defaults are OpenAI's and vLLM's.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 means greedy.
    pub temperature: f32,
    /// Nucleus mass in (0, 1].
    pub top_p: f32,
    /// Keep the k likeliest; 0 keeps all.
    pub top_k: u32,
    /// Keep tokens of at least this share of the likeliest one's probability, in [0, 1].
    pub min_p: f32,
    /// Seed of this request's random stream; each choice derives its own. `None` draws one.
    pub seed: Option<u64>,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from tokens in the output, in [-2, 2].
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the output, in [-2, 2].
    pub frequency_penalty: f32,
    /// Added to logits, by token id.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Alternatives to report per token; `None` reports no log-probabilities at all.
    pub logprobs: Option<u32>,
    /// Texts that end the completion; not included in it.
    pub stop: Vec<String>,
    /// Token ids that end the completion besides the model's own.
    pub stop_token_ids: Vec<u32>,
    /// Go on past the model's end-of-sequence token.
    pub ignore_eos: bool,
    /// Sample at least this many tokens before an end-of-sequence or stop counts.
    pub min_tokens: usize,
    /// Keep the stop text in the output.
    pub include_stop: bool,
    /// Leave special tokens out of the text (the default).
    pub skip_special_tokens: bool,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: None,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            logprobs: None,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            min_tokens: 0,
            include_stop: false,
            skip_special_tokens: true,
        }
    }
}

/// A validated request: the engine can run it without looking at it again.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// Unique among live requests.
    pub id: String,
    /// At least one token; with `max_tokens` within the model's context.
    pub prompt: Arc<[u32]>,
    /// The images that the prompt has places for, in order, none over another.
    pub images: Arc<[PromptImage]>,
    /// Joules that encoding its images was charged; `None` where nobody knows.
    pub image_joules: Option<f64>,
    /// Validated sampling parameters; `seed` is set.
    pub sampling: Arc<SamplingParams>,
    /// Tokens to generate at most; 0 only scores the prompt.
    pub max_tokens: usize,
    /// Choices, at least 1.
    pub n: usize,
    /// Report log-probabilities of the prompt's tokens (with `sampling.logprobs` alternatives).
    pub prompt_logprobs: bool,
    /// What of the model to run.
    pub plan: Arc<Plan>,
    /// The profile that the plan comes from: as named, as chosen for `auto`, `dense` where nothing was asked for,
    /// [`CUSTOM_PROFILE`] for methods without a profile. One of a fixed set, so that it can be a label.
    pub profile: Arc<str>,
    /// Requests share cached prefixes only with equal salts.
    pub cache_salt: u64,
    /// What it may cost in joules and in time.
    pub budget: Budget,
    /// It is a chat, not a text to complete.
    pub is_chat: bool,
    /// The name of the API key that it came with.
    pub client: Option<Arc<str>>,
    /// What it was charged to its API key, corrected when the last holder drops it.
    pub charge: Option<Arc<Charge>>,
    /// Its place among the waiting, until its first step.
    pub queued: Option<Arc<QueuePlace>>,
    /// Its span, when its call is recorded.
    pub span: Option<Arc<GenerationSpan>>,
}

/// What a request may cost, beside tokens: it ends with what it has when it reaches one of these.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Budget {
    /// Joules, over all choices.
    pub max_joules: Option<f64>,
    /// When it has to have ended.
    pub deadline: Option<Instant>,
}

/// What a plan of methods without a profile is called.
pub const CUSTOM_PROFILE: &str = "custom";

/// One token with its log-probability and the likeliest alternatives.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// Token id.
    pub token: u32,
    /// Natural log of its probability under the unmodified logits (before penalties and temperature).
    pub logprob: f32,
    /// The likeliest tokens in descending order, as many as asked for.
    pub top: Vec<(u32, f32)>,
}

/// Why a choice ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// End-of-sequence, a stop token or a stop text.
    Stop,
    /// `max_tokens` or the model's context is used up.
    Length,
    /// Aborted by id, or the server is stopping.
    Abort,
    /// The step failed for this row.
    Error,
    /// One more step would cost more than `max_joules`.
    MaxJoules,
    /// The deadline has passed.
    Deadline,
    /// It did not end when others of its kind do.
    Verbosity,
}

impl FinishReason {
    /// Every reason, in order.
    pub const ALL: [Self; 7] = [
        Self::Stop,
        Self::Length,
        Self::Abort,
        Self::Error,
        Self::MaxJoules,
        Self::Deadline,
        Self::Verbosity,
    ];

    /// The name on the wire and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Error => "error",
            Self::MaxJoules => "max_joules",
            Self::Deadline => "deadline",
            Self::Verbosity => "verbosity",
        }
    }

    /// The name that clients of OpenAI's API know: of their fixed set, a used up budget is `length`.
    pub fn as_openai(self) -> &'static str {
        match self {
            Self::MaxJoules | Self::Deadline | Self::Verbosity => Self::Length.as_str(),
            Self::Stop | Self::Length | Self::Abort | Self::Error => self.as_str(),
        }
    }

    /// What beside [`FinishReason::as_openai`] says why it ended; `None` where that says all.
    pub fn detail(self) -> Option<&'static str> {
        (self.as_openai() != self.as_str()).then_some(self.as_str())
    }

    /// Whether it ends a choice between two tokens, so that text may still be held back.
    pub(crate) fn leaves_text_held(self) -> bool {
        matches!(self, Self::Abort | Self::MaxJoules | Self::Deadline | Self::Verbosity)
    }
}

/// What the engine sends back, in order per choice.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenEvent {
    /// Once, before any token, when `prompt_logprobs` was asked for: one entry a prompt token, the first
    /// without a log-probability (nothing precedes it).
    Prompt {
        /// One entry a prompt token.
        logprobs: Vec<Option<TokenLogprob>>,
    },
    /// Text that became final, with the tokens sampled since the last event. Either may be empty: a
    /// token whose text is incomplete UTF-8 or may begin a stop text is reported with the text held back.
    Delta {
        /// Choice index, 0-based.
        choice: usize,
        /// Whole characters.
        text: String,
        /// Sampled tokens; `logprob`s are filled when asked for.
        tokens: Vec<TokenLogprob>,
    },
    /// The last event of a choice.
    Finished {
        /// Choice index, 0-based.
        choice: usize,
        /// Why it ended.
        reason: FinishReason,
        /// The stop text that ended it, if one did.
        stop: Option<String>,
        /// Counts for `usage`.
        usage: ChoiceUsage,
    },
    /// The whole request failed; nothing follows.
    Failed(crate::error::Error),
}

/// What a choice consumed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ChoiceUsage {
    /// Prompt tokens.
    pub prompt_tokens: usize,
    /// Of those, tokens whose KV came from the prefix cache.
    pub cached_tokens: usize,
    /// Sampled tokens.
    pub completion_tokens: usize,
    /// What of the model it ran.
    pub work: Work,
    /// Where the weights can be held in part: by which of them its tokens were made, in order.
    pub served: Vec<Served>,
    /// Times that weights were taken from it while it ran.
    pub moved_down: usize,
    /// What it was charged; `None` without a meter, and where a counter that was set back leaves it unknown.
    pub energy: Option<EnergyUse>,
}

/// A part of a choice's output, and the weights by which it was made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Served {
    /// Blocks of the stack.
    pub blocks: usize,
    /// Levels of a matrix on average.
    pub levels: f32,
    /// Tokens sampled.
    pub tokens: usize,
    /// Whether it goes on over the KV of the part before, which other blocks have made.
    pub continues: bool,
}

/// What of the model a choice ran, tokens that were computed again after a preemption included.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Work {
    /// Attention layers run, over all tokens.
    pub attention_layers: u64,
    /// Feed-forward layers run, over all tokens.
    pub ffn_layers: u64,
    /// Feed-forward layers that FFN skipping left out.
    pub ffns_skipped: u64,
    /// Layers that the dense plan would have run for the same tokens.
    pub dense_layers: u64,
    /// Bytes of the KV pages that its tokens filled at its end.
    pub kv_bytes: u64,
    /// What it ran of the images in its prompt, if there are any: the same for every choice of a prompt.
    pub visual: Option<VisualUse>,
}

impl std::ops::AddAssign for Work {
    fn add_assign(&mut self, other: Self) {
        self.attention_layers += other.attention_layers;
        self.ffn_layers += other.ffn_layers;
        self.ffns_skipped += other.ffns_skipped;
        self.dense_layers += other.dense_layers;
        self.kv_bytes += other.kv_bytes;
        self.visual = self.visual.or(other.visual);
    }
}
