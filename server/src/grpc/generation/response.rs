//! To the wire: tokens, prompts, finish reasons and whole responses.

use std::sync::Arc;

use model_zoo::compression::Plan;
use model_zoo::tokenizer::Tokenizer;
use rheostat_proto::rheostat::v1;

use crate::energy::EnergySum;
use crate::error::Error;
use crate::request::{FinishReason, RawRequest, TokenLogprob, Work};
use crate::service::{Admitted, Service};

use super::super::completion::{ChoiceOutput, Completion};
use super::super::status;
use super::compression::{self, WeightUse};
use super::energy;

/// What of the optional parts a request asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub(super) echo: bool,
    pub(super) logprobs: bool,
    pub(super) prompt_logprobs: bool,
    /// Choices; admission has refused what is not at least 1.
    pub(super) n: usize,
}

impl Asked {
    /// Reads it from a request before admission takes it.
    pub(super) fn by(raw: &RawRequest) -> Self {
        Self {
            echo: raw.echo,
            logprobs: raw.sampling.logprobs.is_some(),
            prompt_logprobs: raw.prompt_logprobs,
            n: usize::try_from(raw.n).unwrap_or(0),
        }
    }
}

/// Writes one request's responses.
pub(super) struct Wire {
    pub(super) asked: Asked,
    pub(super) model: String,
    prompt: Arc<[u32]>,
    plan: Arc<Plan>,
    profile: Arc<str>,
    tokenizer: Arc<Tokenizer>,
}

impl Wire {
    pub(super) fn new(service: &Service, asked: Asked, admitted: &Admitted) -> Self {
        Self {
            asked,
            model: service.model().name.clone(),
            prompt: admitted.prompt.clone(),
            plan: Arc::clone(&admitted.plan),
            profile: Arc::clone(&admitted.profile),
            tokenizer: service.tokenizer().clone(),
        }
    }

    /// Tokens of the prompt.
    pub(super) fn prompt_tokens(&self) -> u32 {
        self.prompt.len() as u32
    }

    /// The whole request.
    ///
    /// # Errors
    /// As [`Wire::prompt`].
    pub(super) fn response(&self, id: &str, completion: Completion) -> Result<v1::GenerateResponse, Error> {
        let cached = completion.choices.first().map_or(0, |choice| choice.usage.cached_tokens);
        let (mut work, mut weights, mut charged) =
            (Work::default(), WeightUse::default(), EnergySum::default());
        for (index, choice) in completion.choices.iter().enumerate() {
            work += choice.usage.work;
            weights.add(index, &choice.usage);
            charged.add(choice.usage.energy);
        }
        let usage = self.usage((cached, completion.completion_tokens()), (work, weights), charged);
        let prompt = match self.asked.echo || self.asked.prompt_logprobs {
            true => Some(self.prompt(completion.prompt.as_deref().unwrap_or_default())?),
            false => None,
        };
        Ok(v1::GenerateResponse {
            request_id: id.to_owned(),
            model: self.model.clone(),
            choices: completion.choices.into_iter().enumerate().map(|(i, c)| self.choice(i, c)).collect(),
            usage: Some(usage),
            prompt,
        })
    }

    fn choice(&self, index: usize, output: ChoiceOutput) -> v1::Choice {
        let (reason, stop) = output.finished.unzip();
        v1::Choice {
            index: index as u32,
            text: output.text,
            token_ids: output.tokens.iter().map(|t| t.token).collect(),
            logprobs: self.logprobs(&output.tokens),
            finish_reason: reason.map_or(v1::FinishReason::Unspecified, finish_reason).into(),
            stop: stop.flatten(),
        }
    }

    /// The whole request's usage: the prompt once, of which its first choice found `cached` tokens in the prefix
    /// cache, and every choice's tokens and work.
    pub(super) fn usage(
        &self,
        (cached, completion_tokens): (usize, usize),
        (work, weights): (Work, WeightUse),
        charged: EnergySum,
    ) -> v1::Usage {
        v1::Usage {
            prompt_tokens: self.prompt_tokens(),
            cached_tokens: cached as u32,
            completion_tokens: completion_tokens as u32,
            compression: Some(compression::usage((&self.profile, self.plan.options()), work, weights)),
            energy: charged.total().map(energy::usage),
        }
    }

    /// The prompt with its text if `echo` asked for it, and `logprobs`, empty unless asked for.
    ///
    /// # Errors
    /// When the tokenizer cannot decode the prompt's tokens.
    pub(super) fn prompt(&self, logprobs: &[Option<TokenLogprob>]) -> Result<v1::Prompt, Error> {
        let text = match self.asked.echo {
            true => self.tokenizer.decode(&self.prompt, false),
            false => Ok(String::new()),
        };
        let logprob = |(&token_id, scored): (&u32, &Option<TokenLogprob>)| match scored {
            Some(scored) => self.logprob(scored),
            None => v1::TokenLogprob { token_id, text: self.text(token_id), logprob: None, top: Vec::new() },
        };
        Ok(v1::Prompt {
            text: text.map_err(|e| status::tokenizer_error("prompt", &e))?,
            token_ids: self.prompt.to_vec(),
            logprobs: self.prompt.iter().zip(logprobs).map(logprob).collect(),
        })
    }

    /// One entry a token when log-probabilities were asked for, else none.
    pub(super) fn logprobs(&self, tokens: &[TokenLogprob]) -> Vec<v1::TokenLogprob> {
        match self.asked.logprobs {
            true => tokens.iter().map(|t| self.logprob(t)).collect(),
            false => Vec::new(),
        }
    }

    fn logprob(&self, scored: &TokenLogprob) -> v1::TokenLogprob {
        let top = |&(token_id, logprob): &(u32, f32)| v1::TopLogprob {
            token_id,
            text: self.text(token_id),
            logprob,
        };
        v1::TokenLogprob {
            token_id: scored.token,
            text: self.text(scored.token),
            logprob: Some(scored.logprob),
            top: scored.top.iter().map(top).collect(),
        }
    }

    fn text(&self, token: u32) -> String {
        self.tokenizer.decode(&[token], false).unwrap_or_default()
    }
}

/// The reason on the wire.
pub(super) fn finish_reason(reason: FinishReason) -> v1::FinishReason {
    match reason {
        FinishReason::Stop => v1::FinishReason::Stop,
        FinishReason::Length => v1::FinishReason::Length,
        FinishReason::Abort => v1::FinishReason::Abort,
        FinishReason::Error => v1::FinishReason::Error,
        FinishReason::MaxJoules => v1::FinishReason::MaxJoules,
        FinishReason::Deadline => v1::FinishReason::Deadline,
        FinishReason::Verbosity => v1::FinishReason::Verbosity,
    }
}
