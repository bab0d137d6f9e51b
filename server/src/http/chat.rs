//! `/v1/chat/completions`

use std::sync::Arc;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use model_zoo::tokenizer::Tokenizer;
use serde_json::Value;

use super::AppState;
use super::generation::{Generation, Render, profile_header, request_id};
use super::json::Body;
use super::types::request::{ChatFields, ChatRequest, CommonFields, messages};
use super::types::response::{ChatChoice, ChatLogprob, ChatLogprobs, ChatMessage, Envelope, TopLogprob};
use super::types::sampling::SamplingFields;
use super::types::{Object, fields, unsupported};
use crate::error::Error;
use crate::request::{Caller, ChatPrompt, FinishReason, Prompt, RawRequest, TokenLogprob};

/// Answers a chat.
#[utoipa::path(post, path = "/v1/chat/completions", tag = "generation", request_body = ChatRequest,
    responses((status = 200, body = Envelope<ChatChoice>), (status = 400, body = super::error::ErrorBody)))]
pub(super) async fn create(
    State(state): State<AppState>,
    caller: Caller,
    headers: HeaderMap,
    Body(body): Body<Object>,
) -> Result<Response, Error> {
    let body = Value::Object(body);
    let chat: ChatFields = fields(&body)?;
    let mut common: CommonFields = fields(&body)?;
    let n = common.n.unwrap_or(1);
    unsupported::check_chat(&body, n)?;
    let logprobs = top_logprobs(&chat)?;
    let (messages, images) = messages(chat.messages)?;
    let raw = RawRequest {
        id: request_id(&headers)?,
        caller,
        model: common.model.take().unwrap_or_default(),
        sampling: fields::<SamplingFields>(&body)?.params(logprobs)?,
        max_tokens: common.max_completion_tokens.or(common.max_tokens),
        n,
        add_special_tokens: common.add_special_tokens,
        cache_salt: common.cache_salt.take().unwrap_or_default(),
        max_joules: common.max_joules,
        deadline: common.deadline,
        compression: common.take_compression(profile_header(&headers)),
        prompt: Prompt::Chat(Box::new(ChatPrompt {
            messages,
            images,
            tools: Vec::new(),
            template_args: chat.chat_template_kwargs.unwrap_or_default(),
            add_generation_prompt: chat.add_generation_prompt.unwrap_or(true),
        })),
        ..RawRequest::default()
    };
    let admitted = state.service.generate(raw).await?;
    let generation = Generation {
        id: admitted.id.clone(),
        model: state.service.model().name.clone(),
        render: ChatRender {
            tokenizer: Arc::clone(state.service.tokenizer()),
            logprobs: logprobs.is_some(),
            token_ids: common.return_token_ids.unwrap_or_default(),
        },
        n: usize::try_from(n).unwrap_or(1),
        prompts: vec![admitted],
    };
    if common.stream.unwrap_or_default() {
        let options = common.stream_options.unwrap_or_default();
        return Ok(generation.stream(options.include_usage.unwrap_or_default()));
    }
    generation.whole().await
}

/// `top_logprobs` means something only with `logprobs: true`.
fn top_logprobs(chat: &ChatFields) -> Result<Option<u32>, Error> {
    match (chat.logprobs.unwrap_or_default(), chat.top_logprobs) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(Error::invalid("top_logprobs", "top_logprobs needs logprobs to be true")),
    }
}

/// Shows events as chat completions.
struct ChatRender {
    tokenizer: Arc<Tokenizer>,
    logprobs: bool,
    token_ids: bool,
}

impl ChatRender {
    fn chunk(&self, index: usize, delta: ChatMessage) -> ChatChoice {
        ChatChoice {
            index,
            message: None,
            delta: Some(delta),
            logprobs: None,
            finish_reason: None,
            stop_reason: None,
            token_ids: None,
        }
    }

    fn spelling(&self, id: u32) -> (String, Vec<u8>) {
        let text = self.tokenizer.decode(&[id], false).unwrap_or_default();
        let bytes = self.tokenizer.token_bytes(id).unwrap_or_else(|| text.clone().into_bytes());
        (text, bytes)
    }

    fn logprob(&self, score: &TokenLogprob) -> ChatLogprob {
        let (token, bytes) = self.spelling(score.token);
        let top = |&(id, logprob): &(u32, f32)| {
            let (token, bytes) = self.spelling(id);
            TopLogprob { token, logprob, bytes }
        };
        ChatLogprob {
            token,
            logprob: score.logprob,
            bytes,
            top_logprobs: score.top.iter().map(top).collect(),
        }
    }
}

impl Render for ChatRender {
    type Choice = ChatChoice;
    const WHOLE: &'static str = "chat.completion";
    const CHUNK: &'static str = "chat.completion.chunk";
    const ID: &'static str = "chatcmpl";

    fn whole(&self, slot: usize) -> ChatChoice {
        let message = ChatMessage { role: Some("assistant"), content: Some(String::new()) };
        ChatChoice { message: Some(message), delta: None, ..self.chunk(slot, ChatMessage::default()) }
    }

    fn open(&mut self, slot: usize) -> Option<ChatChoice> {
        Some(self.chunk(slot, ChatMessage { role: Some("assistant"), content: Some(String::new()) }))
    }

    fn prompt(&mut self, _: usize, _: &[Option<TokenLogprob>]) -> Option<ChatChoice> {
        None
    }

    fn delta(&mut self, slot: usize, text: String, tokens: &[TokenLogprob]) -> ChatChoice {
        let logprobs =
            self.logprobs.then(|| ChatLogprobs { content: tokens.iter().map(|t| self.logprob(t)).collect() });
        let token_ids = self.token_ids.then(|| tokens.iter().map(|t| t.token).collect());
        ChatChoice {
            logprobs,
            token_ids,
            ..self.chunk(slot, ChatMessage { role: None, content: Some(text) })
        }
    }

    fn finish(&mut self, slot: usize, reason: FinishReason, stop: Option<String>) -> ChatChoice {
        let chunk = self.chunk(slot, ChatMessage::default());
        let stop_reason = stop.or(reason.detail().map(str::to_owned));
        ChatChoice { finish_reason: Some(reason.as_openai()), stop_reason, ..chunk }
    }

    fn merge(whole: &mut ChatChoice, chunk: ChatChoice) {
        let text = chunk.delta.and_then(|delta| delta.content);
        if let (Some(message), Some(text)) = (&mut whole.message, text) {
            message.content.get_or_insert_default().push_str(&text);
        }
        if let Some(more) = chunk.logprobs {
            whole.logprobs.get_or_insert_default().content.extend(more.content);
        }
        if let Some(ids) = chunk.token_ids {
            whole.token_ids.get_or_insert_default().extend(ids);
        }
        whole.finish_reason = whole.finish_reason.or(chunk.finish_reason);
        whole.stop_reason = whole.stop_reason.take().or(chunk.stop_reason);
    }
}
