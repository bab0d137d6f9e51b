//! `/v1/completions`

use std::sync::Arc;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use model_zoo::tokenizer::Tokenizer;
use serde_json::Value;

use super::AppState;
use super::generation::{Generation, Render, profile_header, request_id};
use super::json::Body;
use super::types::request::{CommonFields, CompletionFields, CompletionRequest, prompts};
use super::types::response::{CompletionChoice, CompletionLogprobs, Envelope};
use super::types::sampling::SamplingFields;
use super::types::{Object, fields, unsupported};
use crate::error::Error;
use crate::request::{Caller, FinishReason, Prompt, RawRequest, TokenLogprob};

/// Completes texts.
#[utoipa::path(post, path = "/v1/completions", tag = "generation", request_body = CompletionRequest,
    responses((status = 200, body = Envelope<CompletionChoice>), (status = 400, body = super::error::ErrorBody)))]
pub(super) async fn create(
    State(state): State<AppState>,
    caller: Caller,
    headers: HeaderMap,
    Body(body): Body<Object>,
) -> Result<Response, Error> {
    let body = Value::Object(body);
    let completion: CompletionFields = fields(&body)?;
    let mut common: CommonFields = fields(&body)?;
    let n = common.n.unwrap_or(1);
    unsupported::check_completion(&body, n)?;
    let sampling = fields::<SamplingFields>(&body)?.params(completion.logprobs)?;
    let id = request_id(&headers)?;
    let echo = completion.echo.unwrap_or_default();
    let raw = RawRequest {
        caller,
        model: common.model.take().unwrap_or_default(),
        sampling,
        max_tokens: common.max_tokens.or(common.max_completion_tokens),
        n,
        echo,
        prompt_logprobs: echo && completion.logprobs.is_some(),
        add_special_tokens: common.add_special_tokens,
        cache_salt: common.cache_salt.take().unwrap_or_default(),
        max_joules: common.max_joules,
        deadline: common.deadline,
        compression: common.take_compression(profile_header(&headers)),
        ..RawRequest::default()
    };
    let mut echoes = Vec::new();
    let mut admitted = Vec::new();
    for (index, prompt) in prompts(completion.prompt)?.into_iter().enumerate() {
        let text = if let Prompt::Text(text) = &prompt { Some(text.clone()) } else { None };
        let id = if index == 0 || id.is_empty() { id.clone() } else { format!("{id}-{index}") };
        let one = state.service.generate(RawRequest { id, prompt, ..raw.clone() }).await?;
        let tokenizer = state.service.tokenizer();
        echoes.push(text.unwrap_or_else(|| tokenizer.decode(&one.prompt, false).unwrap_or_default()));
        admitted.push(one);
    }
    let n = usize::try_from(n).unwrap_or(1);
    let slots = n * admitted.len();
    let generation = Generation {
        id: admitted.first().map(|one| one.id.clone()).unwrap_or_default(),
        model: state.service.model().name.clone(),
        render: CompletionRender {
            tokenizer: Arc::clone(state.service.tokenizer()),
            echo: echo.then_some(echoes),
            first_tokens: admitted.iter().filter_map(|one| one.prompt.first().copied()).collect(),
            logprobs: completion.logprobs.is_some(),
            token_ids: common.return_token_ids.unwrap_or_default(),
            offsets: vec![0; slots],
            n,
        },
        n,
        prompts: admitted,
    };
    if common.stream.unwrap_or_default() {
        let options = common.stream_options.unwrap_or_default();
        return Ok(generation.stream(options.include_usage.unwrap_or_default()));
    }
    generation.whole().await
}

/// Shows events as text completions.
struct CompletionRender {
    tokenizer: Arc<Tokenizer>,
    /// The prompts' texts, to repeat.
    echo: Option<Vec<String>>,
    /// The prompts' first tokens.
    first_tokens: Vec<u32>,
    logprobs: bool,
    token_ids: bool,
    /// Characters shown so far, by slot.
    offsets: Vec<usize>,
    n: usize,
}

impl CompletionRender {
    fn chunk(&self, index: usize) -> CompletionChoice {
        CompletionChoice {
            index,
            text: String::new(),
            logprobs: None,
            finish_reason: None,
            stop_reason: None,
            token_ids: None,
        }
    }

    fn spelling(&self, token: u32) -> String {
        self.tokenizer.decode(&[token], false).unwrap_or_default()
    }

    /// Adds a token to the arrays; the first of a prompt has no score.
    fn push(
        &mut self,
        slot: usize,
        (token, score): (u32, Option<&TokenLogprob>),
        to: &mut CompletionLogprobs,
    ) {
        let text = self.spelling(token);
        let Some(offset) = self.offsets.get_mut(slot) else { return };
        to.text_offset.push(*offset);
        *offset += text.chars().count();
        to.tokens.push(text);
        to.token_logprobs.push(score.map(|s| s.logprob));
        to.top_logprobs.push(score.map(|s| {
            let own = (self.spelling(s.token), s.logprob);
            s.top.iter().map(|&(id, logprob)| (self.spelling(id), logprob)).chain([own]).collect()
        }));
    }
}

impl Render for CompletionRender {
    type Choice = CompletionChoice;
    const WHOLE: &'static str = "text_completion";
    const CHUNK: &'static str = "text_completion";
    const ID: &'static str = "cmpl";

    fn whole(&self, slot: usize) -> CompletionChoice {
        self.chunk(slot)
    }

    fn open(&mut self, slot: usize) -> Option<CompletionChoice> {
        let text = self.echo.as_ref()?.get(slot / self.n)?.clone();
        if !self.logprobs {
            self.offsets[slot] = text.chars().count();
        }
        Some(CompletionChoice { text, ..self.chunk(slot) })
    }

    fn prompt(&mut self, slot: usize, logprobs: &[Option<TokenLogprob>]) -> Option<CompletionChoice> {
        let mut shown = CompletionLogprobs::default();
        for score in logprobs {
            let token = match score {
                Some(score) => score.token,
                // Nothing precedes the first token, so that it has no score to name it.
                None => *self.first_tokens.get(slot / self.n)?,
            };
            self.push(slot, (token, score.as_ref()), &mut shown);
        }
        Some(CompletionChoice { logprobs: Some(shown), ..self.chunk(slot) })
    }

    fn delta(&mut self, slot: usize, text: String, tokens: &[TokenLogprob]) -> CompletionChoice {
        let logprobs = self.logprobs.then(|| {
            let mut shown = CompletionLogprobs::default();
            tokens.iter().for_each(|token| self.push(slot, (token.token, Some(token)), &mut shown));
            shown
        });
        let token_ids = self.token_ids.then(|| tokens.iter().map(|t| t.token).collect());
        CompletionChoice { text, logprobs, token_ids, ..self.chunk(slot) }
    }

    fn finish(&mut self, slot: usize, reason: FinishReason, stop: Option<String>) -> CompletionChoice {
        let stop_reason = stop.or(reason.detail().map(str::to_owned));
        CompletionChoice { finish_reason: Some(reason.as_openai()), stop_reason, ..self.chunk(slot) }
    }

    fn merge(whole: &mut CompletionChoice, chunk: CompletionChoice) {
        whole.text.push_str(&chunk.text);
        if let Some(more) = chunk.logprobs {
            let shown = whole.logprobs.get_or_insert_default();
            shown.tokens.extend(more.tokens);
            shown.token_logprobs.extend(more.token_logprobs);
            shown.top_logprobs.extend(more.top_logprobs);
            shown.text_offset.extend(more.text_offset);
        }
        if let Some(ids) = chunk.token_ids {
            whole.token_ids.get_or_insert_default().extend(ids);
        }
        whole.finish_reason = whole.finish_reason.or(chunk.finish_reason);
        whole.stop_reason = whole.stop_reason.take().or(chunk.stop_reason);
    }
}
