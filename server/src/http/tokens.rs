//! `/tokenize`, `/detokenize`, `/tokenizer_info`

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use model_zoo::tokenizer::{ChatInput, Tokenizer};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::AppState;
use super::json::Body;
use super::types::request::messages;
use super::types::{Object, fields};
use crate::error::{Error, ErrorKind};

/// A text or a chat to encode.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct TokenizeRequest {
    model: Option<String>,
    /// A text …
    prompt: Option<String>,
    /// … or a chat.
    #[schema(value_type = Option<Vec<Object>>)]
    messages: Option<Vec<Value>>,
    /// With the tokens that the model expects around a text; true by default for texts.
    add_special_tokens: Option<bool>,
    add_generation_prompt: Option<bool>,
    /// Return the tokens' spellings too.
    return_token_strs: Option<bool>,
}

/// The tokens of a text or chat.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TokenizeResponse {
    count: usize,
    max_model_len: usize,
    tokens: Vec<u32>,
    token_strs: Option<Vec<String>>,
}

/// Tokens to decode.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct DetokenizeRequest {
    model: Option<String>,
    tokens: Option<Vec<u32>>,
}

/// Encodes a text or a chat.
#[utoipa::path(post, path = "/tokenize", tag = "tokenizer", request_body = TokenizeRequest,
    responses((status = 200, body = TokenizeResponse)))]
pub(super) async fn tokenize(
    State(state): State<AppState>,
    Body(body): Body<Object>,
) -> Result<Json<TokenizeResponse>, Error> {
    let request: TokenizeRequest = fields(&Value::Object(body))?;
    state.service.check_model(request.model.as_deref().unwrap_or_default())?;
    let with_strings = request.return_token_strs.unwrap_or_default();
    let (tokens, token_strs) = blocking(&state, move |tokenizer| {
        let tokens = encode(tokenizer, request)?;
        let spelling = |&id: &u32| tokenizer.id_to_token(id).unwrap_or_default();
        let strings = with_strings.then(|| tokens.iter().map(spelling).collect());
        Ok((tokens, strings))
    })
    .await?;
    let max_model_len = state.service.model().max_model_len();
    Ok(Json(TokenizeResponse { count: tokens.len(), max_model_len, tokens, token_strs }))
}

fn encode(tokenizer: &Tokenizer, request: TokenizeRequest) -> Result<Vec<u32>, Error> {
    let (text, special, param) = match (request.prompt, request.messages) {
        (Some(text), None) => (text, request.add_special_tokens.unwrap_or(true), "prompt"),
        (None, Some(given)) => {
            let add_generation_prompt = request.add_generation_prompt.unwrap_or(true);
            let (messages, images) = messages(Some(given))?;
            if !images.is_empty() {
                return Err(Error::invalid("messages", "images are not tokenized; send text alone"));
            }
            let input = ChatInput { messages, add_generation_prompt, ..Default::default() };
            let text = tokenizer
                .apply_chat_template(&input)
                .map_err(|e| Error::invalid("messages", e.to_string()))?;
            (text, request.add_special_tokens.unwrap_or(false), "messages")
        }
        _ => return Err(Error::invalid("prompt", "give either prompt or messages")),
    };
    tokenizer.encode(&text, special).map_err(|e| Error::invalid(param, e.to_string()))
}

/// Decodes tokens.
#[utoipa::path(post, path = "/detokenize", tag = "tokenizer", request_body = DetokenizeRequest,
    responses((status = 200, description = "The text, as `prompt`")))]
pub(super) async fn detokenize(
    State(state): State<AppState>,
    Body(body): Body<Object>,
) -> Result<Json<Value>, Error> {
    let request: DetokenizeRequest = fields(&Value::Object(body))?;
    state.service.check_model(request.model.as_deref().unwrap_or_default())?;
    let tokens = request.tokens.ok_or_else(|| Error::invalid("tokens", "tokens is required"))?;
    let vocab = state.service.model().dims.vocab_size;
    if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab) {
        return Err(Error::invalid(
            "tokens",
            format!("token {token} is outside the vocabulary of {vocab} tokens"),
        ));
    }
    let text = blocking(&state, move |tokenizer| {
        tokenizer.decode(&tokens, false).map_err(|e| Error::invalid("tokens", e.to_string()))
    })
    .await?;
    Ok(Json(json!({ "prompt": text })))
}

/// What evaluation harnesses need to know of the tokenizer.
#[utoipa::path(get, path = "/tokenizer_info", tag = "tokenizer",
    responses((status = 200, description = "Class, special tokens, chat template")))]
pub(super) async fn info(State(state): State<AppState>) -> Json<Value> {
    let info = state.service.tokenizer().info();
    Json(json!({
        "tokenizer_class": info.class,
        "bos_token": info.bos_token,
        "eos_token": info.eos_token,
        "pad_token": info.pad_token,
        "unk_token": info.unk_token,
        "chat_template": info.chat_template,
        "model_max_length": state.service.model().max_model_len(),
        "vocab_size": state.service.tokenizer().vocab_size(),
    }))
}

async fn blocking<T: Send + 'static>(
    state: &AppState,
    work: impl FnOnce(&Tokenizer) -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let tokenizer = Arc::clone(state.service.tokenizer());
    let failed = |_| Error::new(ErrorKind::Internal, "the tokenizer failed");
    tokio::task::spawn_blocking(move || work(&tokenizer)).await.map_err(failed)?
}
