//! The checks, one a kind of field. Each message names the field, what it got, and the range.

use std::time::{Duration, Instant};

use super::limits::Limits;
use crate::error::Error;
use crate::request::{Budget, ChatPrompt, Prompt, RawRequest, SamplingParams};
use crate::service::ModelInfo;

pub(super) fn choices(n: i64, limits: &Limits) -> Result<usize, Error> {
    match usize::try_from(n) {
        Ok(n) if (1..=limits.max_n).contains(&n) => Ok(n),
        _ => Err(Error::invalid("n", format!("n is {n}; it must be between 1 and {}", limits.max_n))),
    }
}

/// `limit` is the longest sequence, which the prompt fits.
pub(super) fn max_tokens(asked: i64, prompt: usize, limit: usize) -> Result<usize, Error> {
    let asked = usize::try_from(asked).map_err(|_| {
        Error::invalid("max_tokens", format!("max_tokens is {asked}; it must not be negative"))
    })?;
    if asked > limit - prompt {
        let message = format!(
            "the model's context is {limit} tokens; the prompt has {prompt} and max_tokens is {asked}: shorten the prompt or lower max_tokens to {}",
            limit - prompt
        );
        return Err(Error::invalid("max_tokens", message));
    }
    Ok(asked)
}

/// Joules and seconds of a request that arrived at `now`.
pub(super) fn budget(raw: &RawRequest, is_metered: bool, now: Instant) -> Result<Budget, Error> {
    for (name, value) in [("max_joules", raw.max_joules), ("deadline", raw.deadline)] {
        if let Some(value) = value.filter(|value| !value.is_finite() || *value <= 0.0) {
            return Err(Error::invalid(name, format!("{name} is {value}; it must be a number above 0")));
        }
    }
    if raw.max_joules.is_some() && !is_metered {
        let message = "this server has no energy meter, so that max_joules cannot be kept; leave it out";
        return Err(Error::invalid("max_joules", message));
    }
    // What no clock reaches is no deadline.
    let time = raw.deadline.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    Ok(Budget { max_joules: raw.max_joules, deadline: time.and_then(|time| now.checked_add(time)) })
}

/// Size of a prompt as written, before any work is spent on it.
pub(super) fn prompt_size(prompt: &Prompt, limits: &Limits) -> Result<(), Error> {
    let (param, bytes) = match prompt {
        Prompt::Text(text) => ("prompt", text.len()),
        Prompt::Tokens(tokens) => ("prompt", 4 * tokens.len()),
        Prompt::Chat(chat) => {
            if chat.messages.is_empty() {
                return Err(Error::invalid("messages", "messages is empty; it needs at least one"));
            }
            if chat.messages.len() > limits.max_messages {
                let (count, max) = (chat.messages.len(), limits.max_messages);
                return Err(Error::invalid("messages", format!("{count} messages; {max} are allowed")));
            }
            ("messages", chat_bytes(chat))
        }
    };
    if bytes > limits.max_prompt_bytes {
        let max = limits.max_prompt_bytes;
        return Err(Error::invalid(param, format!("{param} has {bytes} bytes; {max} are allowed")));
    }
    Ok(())
}

fn chat_bytes(chat: &ChatPrompt) -> usize {
    let args = chat.template_args.iter().map(|(key, value)| key.len() + json_bytes(value));
    chat.messages.iter().chain(&chat.tools).map(json_bytes).chain(args).sum()
}

fn json_bytes(value: &serde_json::Value) -> usize {
    use serde_json::Value;
    match value {
        Value::String(text) => text.len() + 2,
        Value::Array(items) => items.iter().map(|item| json_bytes(item) + 1).sum::<usize>() + 2,
        Value::Object(fields) => fields.iter().map(|(k, v)| k.len() + json_bytes(v) + 4).sum::<usize>() + 2,
        _ => 8,
    }
}

pub(super) fn tokens(prompt: &[u32], model: &ModelInfo, limit: usize) -> Result<(), Error> {
    if prompt.is_empty() {
        return Err(Error::invalid("prompt", "the prompt is empty; it needs at least one token"));
    }
    let len = prompt.len();
    if len > limit {
        let message = format!("the prompt has {len} tokens; the model's context is {limit} tokens");
        return Err(Error::invalid("prompt", message));
    }
    let vocab = model.dims.vocab_size;
    match prompt.iter().find(|&&token| token as usize >= vocab) {
        None => Ok(()),
        Some(token) => Err(Error::invalid(
            "prompt",
            format!("token id {token} is outside the vocabulary of {vocab} tokens"),
        )),
    }
}

/// A number's allowed range.
struct Range {
    name: &'static str,
    value: f32,
    low: f32,
    high: f32,
}

impl Range {
    fn check(&self) -> Result<(), Error> {
        let Self { name, value, low, high } = *self;
        if value >= low && value <= high {
            return Ok(());
        }
        Err(Error::invalid(name, format!("{name} is {value}; it must be between {low} and {high}")))
    }
}

pub(super) fn sampling(p: &SamplingParams, limits: &Limits, model: &ModelInfo) -> Result<(), Error> {
    for (name, value, low, high) in [
        ("temperature", p.temperature, 0.0, 100.0),
        // Open at 0: no token has no mass.
        ("top_p", p.top_p, f32::MIN_POSITIVE, 1.0),
        ("min_p", p.min_p, 0.0, 1.0),
        ("presence_penalty", p.presence_penalty, -2.0, 2.0),
        ("frequency_penalty", p.frequency_penalty, -2.0, 2.0),
        ("repetition_penalty", p.repetition_penalty, 0.01, 100.0),
    ] {
        Range { name, value, low, high }.check()?;
    }
    bounded("logprobs", p.logprobs.unwrap_or(0) as usize, limits.max_logprobs)?;
    bounded("stop", p.stop.len(), limits.max_stop_texts)?;
    bounded("stop_token_ids", p.stop_token_ids.len(), limits.max_stop_tokens)?;
    bounded("logit_bias", p.logit_bias.len(), limits.max_logit_bias)?;
    if p.stop.iter().any(String::is_empty) {
        return Err(Error::invalid("stop", "a stop text is empty"));
    }
    if let Some(long) = p.stop.iter().find(|s| s.len() > limits.max_stop_bytes) {
        let (len, max) = (long.len(), limits.max_stop_bytes);
        return Err(Error::invalid("stop", format!("a stop text has {len} bytes; {max} are allowed")));
    }
    let vocab = model.dims.vocab_size;
    for (&token, &bias) in &p.logit_bias {
        if token as usize >= vocab {
            let message = format!("logit_bias names token {token}; the vocabulary has {vocab} tokens");
            return Err(Error::invalid("logit_bias", message));
        }
        Range { name: "logit_bias", value: bias, low: -100.0, high: 100.0 }.check()?;
    }
    Ok(())
}

fn bounded(name: &str, count: usize, max: usize) -> Result<(), Error> {
    if count <= max {
        return Ok(());
    }
    Err(Error::invalid(name, format!("{name} is {count} long or large; {max} is the limit")))
}
