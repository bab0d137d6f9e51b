//! Chooses the next token of one sequence from its logits.
//!
//! Order as in vLLM: penalties and bias → temperature → min_p → top_k → top_p → draw. A draw depends only
//! on the request's seed, the choice and the token's index, so that it is the same whatever else is in the
//! batch, and after a preemption.

mod candidates;
mod logprobs;

use std::collections::HashMap;
use std::sync::Arc;

use model_zoo::models::Draw;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::request::{SamplingParams, TokenLogprob};

pub(crate) use logprobs::logprob_of;

/// The logits of a row cannot be sampled from: they hold NaN, or nothing but −∞.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the model's logits are not numbers")]
pub(crate) struct BadLogits;

/// The sampling state of one sequence.
#[derive(Debug)]
pub(crate) struct Sampler {
    params: Arc<SamplingParams>,
    /// Choice index: its stream of the request's seed.
    choice: u64,
    /// Occurrences in the output, by token; tokens of the prompt are there with 0.
    seen: HashMap<u32, u32>,
    /// End-of-sequence and stop tokens: banned until `min_tokens` are sampled.
    ends: Arc<[u32]>,
    sampled: usize,
    /// Added to the logits of end-of-sequence and stop tokens.
    end_bias: f32,
    /// Modified logits, and later the kept candidates; empty until they are needed.
    scratch: Vec<f32>,
}

impl Sampler {
    /// A sampler for one choice of a request with `prompt`, whose output `ends` with one of these tokens.
    pub(crate) fn new(params: Arc<SamplingParams>, choice: usize, prompt: &[u32], ends: Arc<[u32]>) -> Self {
        let mut seen = HashMap::new();
        if params.repetition_penalty != 1.0 {
            seen.extend(prompt.iter().map(|&token| (token, 0)));
        }
        Self { params, choice: choice as u64, seen, ends, sampled: 0, end_bias: 0.0, scratch: Vec::new() }
    }

    /// Chooses a token from `logits`, `[vocab_size]`, and remembers it.
    ///
    /// # Errors
    /// [`BadLogits`].
    pub(crate) fn sample(&mut self, logits: &[f32]) -> Result<TokenLogprob, BadLogits> {
        let token = if self.modifies() {
            let mut modified = std::mem::take(&mut self.scratch);
            modified.clear();
            modified.extend_from_slice(logits);
            self.modify(&mut modified);
            let token = self.choose(&modified);
            self.scratch = modified;
            token?
        } else {
            self.choose(logits)?
        };
        self.remember(token);
        match self.params.logprobs {
            Some(top) => logprob_of(logits, token, top as usize),
            None => Ok(TokenLogprob { token, logprob: 0.0, top: Vec::new() }),
        }
    }

    /// How the next token is drawn from logit row `row`, where nothing has to look at all of its logits: the model's
    /// device may do it then. Its token goes to [`Sampler::accept`].
    pub(crate) fn draw(&self, row: usize) -> Option<Draw> {
        let p = &self.params;
        if self.modifies() || p.logprobs.is_some() {
            return None;
        }
        // The nearest f32 may be 1.
        let uniform = (self.uniform() as f32).min(1.0 - f32::EPSILON / 2.0);
        let (temperature, top_p, min_p) = (p.temperature, p.top_p, p.min_p);
        Some(Draw { row, top_k: p.top_k, temperature, top_p, min_p, uniform })
    }

    /// Remembers a token that was drawn elsewhere; [`u32::MAX`] says that there was none to draw.
    ///
    /// # Errors
    /// [`BadLogits`].
    pub(crate) fn accept(&mut self, token: u32) -> Result<TokenLogprob, BadLogits> {
        if token == u32::MAX {
            return Err(BadLogits);
        }
        self.remember(token);
        Ok(TokenLogprob { token, logprob: 0.0, top: Vec::new() })
    }

    fn choose(&self, logits: &[f32]) -> Result<u32, BadLogits> {
        if self.params.temperature == 0.0 {
            return argmax(logits);
        }
        candidates::draw(logits, &self.params, self.uniform())
    }

    /// In [0, 1): a function of (seed, choice, token index).
    fn uniform(&self) -> f64 {
        let mut rng = ChaCha8Rng::seed_from_u64(self.params.seed.unwrap_or_default());
        rng.set_stream(self.choice);
        // Sixteen words are one block of the cipher: tokens never share one.
        rng.set_word_pos(16 * self.sampled as u128);
        rng.random()
    }

    fn remember(&mut self, token: u32) {
        self.sampled += 1;
        let p = &self.params;
        if p.repetition_penalty != 1.0 || p.presence_penalty != 0.0 || p.frequency_penalty != 0.0 {
            *self.seen.entry(token).or_default() += 1;
        }
    }

    /// Adds `bias` to the logits of end-of-sequence and stop tokens from now on.
    pub(crate) fn raise_end(&mut self, bias: f32) {
        self.end_bias = bias;
    }

    /// Whether they are raised.
    pub(crate) fn is_end_raised(&self) -> bool {
        self.end_bias > 0.0
    }

    fn bans_ends(&self) -> bool {
        self.sampled < self.params.min_tokens
    }

    fn modifies(&self) -> bool {
        !self.seen.is_empty()
            || !self.params.logit_bias.is_empty()
            || self.bans_ends()
            || self.is_end_raised()
    }

    fn modify(&self, logits: &mut [f32]) {
        let p = &self.params;
        for (&token, &count) in &self.seen {
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            if p.repetition_penalty != 1.0 {
                *logit =
                    if *logit > 0.0 { *logit / p.repetition_penalty } else { *logit * p.repetition_penalty };
            }
            if count > 0 {
                *logit -= p.presence_penalty + p.frequency_penalty * count as f32;
            }
        }
        for (&token, &bias) in &p.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        let (bans, bias) = (self.bans_ends(), self.end_bias);
        for &token in self.ends.iter().filter(|_| bans || bias > 0.0) {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = if bans { f32::NEG_INFINITY } else { *logit + bias };
            }
        }
    }
}

/// The likeliest token; of equals the lowest id.
fn argmax(logits: &[f32]) -> Result<u32, BadLogits> {
    let mut best = (0, f32::NEG_INFINITY);
    let mut nan = false;
    for (id, &logit) in logits.iter().enumerate() {
        nan |= logit.is_nan();
        if logit > best.1 {
            best = (id, logit);
        }
    }
    if nan || best.1 == f32::NEG_INFINITY { Err(BadLogits) } else { Ok(best.0 as u32) }
}

#[cfg(test)]
mod tests;
