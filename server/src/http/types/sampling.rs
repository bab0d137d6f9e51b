//! The sampling fields that completions and chats share.

use std::collections::BTreeMap;

use serde::Deserialize;
use utoipa::ToSchema;

use crate::error::Error;
use crate::request::SamplingParams;

/// OpenAI's sampling fields with vLLM's extensions.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(crate) struct SamplingFields {
    /// 0 is greedy; 1 by default.
    temperature: Option<f32>,
    /// Nucleus mass in (0, 1].
    top_p: Option<f32>,
    /// Keep the k likeliest tokens; 0 or −1 keeps all.
    top_k: Option<i64>,
    /// Keep tokens of at least this share of the likeliest one's probability.
    min_p: Option<f32>,
    /// Makes sampling reproducible.
    seed: Option<i64>,
    /// Over prompt and output; 1 is off.
    repetition_penalty: Option<f32>,
    /// In [−2, 2].
    presence_penalty: Option<f32>,
    /// In [−2, 2].
    frequency_penalty: Option<f32>,
    /// Token id → bias in [−100, 100].
    logit_bias: Option<BTreeMap<String, f32>>,
    /// One text or several that end the completion.
    #[schema(value_type = Option<Vec<String>>)]
    stop: Option<OneOrMany>,
    /// Token ids that end the completion.
    stop_token_ids: Option<Vec<u32>>,
    /// Go on past the model's end-of-sequence token.
    ignore_eos: Option<bool>,
    /// Tokens before an end counts.
    min_tokens: Option<usize>,
    /// Keep the stop text in the output.
    include_stop_str_in_output: Option<bool>,
    /// Leave special tokens out of the text; true by default.
    skip_special_tokens: Option<bool>,
}

/// A text or a list of texts.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl SamplingFields {
    /// The engine's parameters; `logprobs` is how many alternatives to report.
    ///
    /// # Errors
    /// When a field cannot be converted; ranges are admission's to check.
    pub(crate) fn params(self, logprobs: Option<u32>) -> Result<SamplingParams, Error> {
        let defaults = SamplingParams::default();
        Ok(SamplingParams {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            top_k: top_k(self.top_k.unwrap_or(0))?,
            min_p: self.min_p.unwrap_or(defaults.min_p),
            seed: self.seed.map(|seed| seed as u64),
            repetition_penalty: self.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(defaults.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(defaults.frequency_penalty),
            logit_bias: logit_bias(self.logit_bias.unwrap_or_default())?,
            logprobs,
            stop: match self.stop {
                None => Vec::new(),
                Some(OneOrMany::One(stop)) => vec![stop],
                Some(OneOrMany::Many(stops)) => stops,
            },
            stop_token_ids: self.stop_token_ids.unwrap_or_default(),
            ignore_eos: self.ignore_eos.unwrap_or_default(),
            min_tokens: self.min_tokens.unwrap_or_default(),
            include_stop: self.include_stop_str_in_output.unwrap_or_default(),
            skip_special_tokens: self.skip_special_tokens.unwrap_or(true),
        })
    }
}

fn top_k(k: i64) -> Result<u32, Error> {
    match k {
        -1 | 0 => Ok(0),
        k => u32::try_from(k)
            .map_err(|_| Error::invalid("top_k", format!("top_k is {k}; it must be −1, 0 or more"))),
    }
}

fn logit_bias(bias: BTreeMap<String, f32>) -> Result<BTreeMap<u32, f32>, Error> {
    let id = |key: &str| {
        key.parse().map_err(|_| {
            Error::invalid("logit_bias", format!("logit_bias has the key {key:?}; keys are token ids"))
        })
    };
    bias.into_iter().map(|(key, value)| Ok((id(&key)?, value))).collect()
}
