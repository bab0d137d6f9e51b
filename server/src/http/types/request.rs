//! The fields of completions and chats beside sampling.

use model_zoo::compression::CompressionOptions;
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::Object;
use super::sampling::SamplingFields;
use crate::error::Error;
use crate::request::{ImageSource, Prompt};

/// Prompts of one completion request.
const MAX_PROMPTS: usize = 256;

/// Options of a stream.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(crate) struct StreamOptions {
    /// Send a last chunk with the usage of the whole request.
    pub(crate) include_usage: Option<bool>,
}

/// Fields that text completions and chats share.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(crate) struct CommonFields {
    /// The model's name.
    pub(crate) model: Option<String>,
    /// Choices.
    pub(crate) n: Option<i64>,
    /// Tokens to generate at most.
    pub(crate) max_tokens: Option<i64>,
    /// The same, in OpenAI's newer spelling.
    pub(crate) max_completion_tokens: Option<i64>,
    /// Answer as server-sent events.
    pub(crate) stream: Option<bool>,
    /// Options of the stream.
    pub(crate) stream_options: Option<StreamOptions>,
    /// Encode the prompt with the model's special tokens; true by default for text, false for chats.
    pub(crate) add_special_tokens: Option<bool>,
    /// Requests share cached prefixes only with equal salts.
    pub(crate) cache_salt: Option<String>,
    /// Joules that it may cost at most, over all choices: it ends with what it has before one more step would cost
    /// more. Needs a server that has a meter.
    pub(crate) max_joules: Option<f64>,
    /// Seconds from its arrival after which it ends with what it has.
    pub(crate) deadline: Option<f64>,
    /// What of the model to run.
    #[schema(value_type = Option<Object>, example = json!({"profile": "eco", "drop": {"attention": 4}, "think": {"ratio": 0.4}}))]
    pub(crate) compression: Option<CompressionOptions>,
    /// Report token ids.
    pub(crate) return_token_ids: Option<bool>,
}

impl CommonFields {
    /// Takes out what is asked of compression; the header's profile holds where the body names none.
    pub(crate) fn take_compression(&mut self, header: Option<String>) -> CompressionOptions {
        let mut options = self.compression.take().unwrap_or_default();
        options.profile = options.profile.or(header);
        options
    }
}

/// Fields of a text completion.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(crate) struct CompletionFields {
    /// A text, a list of texts, a list of token ids, or a list of such lists.
    #[schema(value_type = Object)]
    pub(crate) prompt: Option<Value>,
    /// Return the prompt before the completion.
    pub(crate) echo: Option<bool>,
    /// Report log-probabilities, with this many alternatives a token.
    pub(crate) logprobs: Option<u32>,
}

/// Fields of a chat completion.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(crate) struct ChatFields {
    /// The conversation.
    #[schema(value_type = Vec<Object>)]
    pub(crate) messages: Option<Vec<Value>>,
    /// Report log-probabilities.
    pub(crate) logprobs: Option<bool>,
    /// Alternatives a token.
    pub(crate) top_logprobs: Option<u32>,
    /// Further variables of the chat template.
    #[schema(value_type = Option<Object>)]
    pub(crate) chat_template_kwargs: Option<Object>,
    /// Open an assistant turn; true by default.
    pub(crate) add_generation_prompt: Option<bool>,
}

/// A text completion request (documentation of the three groups as one body).
#[derive(Debug, Deserialize, ToSchema)]
#[allow(dead_code)]
pub(crate) struct CompletionRequest {
    #[serde(flatten)]
    completion: CompletionFields,
    #[serde(flatten)]
    common: CommonFields,
    #[serde(flatten)]
    sampling: SamplingFields,
}

/// A chat completion request (documentation of the three groups as one body).
#[derive(Debug, Deserialize, ToSchema)]
#[allow(dead_code)]
pub(crate) struct ChatRequest {
    #[serde(flatten)]
    chat: ChatFields,
    #[serde(flatten)]
    common: CommonFields,
    #[serde(flatten)]
    sampling: SamplingFields,
}

/// The prompts of a completion request.
///
/// # Errors
/// When it is none of the four forms, or there are too many.
pub(crate) fn prompts(value: Option<Value>) -> Result<Vec<Prompt>, Error> {
    const FORMS: &str =
        "prompt must be a string, a list of strings, a list of token ids, or a list of lists of token ids";
    let fail = || Error::invalid("prompt", FORMS);
    let found = match value.unwrap_or_default() {
        Value::Null => return Err(Error::invalid("prompt", "prompt is required")),
        Value::String(text) => vec![Prompt::Text(text)],
        Value::Array(items) if items.is_empty() => return Err(Error::invalid("prompt", "prompt is empty")),
        Value::Array(items) if items[0].is_number() => vec![Prompt::Tokens(token_ids(items)?)],
        Value::Array(items) => items
            .into_iter()
            .map(|item| match item {
                Value::String(text) => Ok(Prompt::Text(text)),
                Value::Array(ids) => token_ids(ids).map(Prompt::Tokens),
                _ => Err(fail()),
            })
            .collect::<Result<_, _>>()?,
        _ => return Err(fail()),
    };
    if found.len() > MAX_PROMPTS {
        return Err(Error::invalid("prompt", format!("{} prompts; {MAX_PROMPTS} are allowed", found.len())));
    }
    Ok(found)
}

fn token_ids(items: Vec<Value>) -> Result<Vec<u32>, Error> {
    let id = |item: &Value| item.as_u64().and_then(|id| u32::try_from(id).ok());
    let bad =
        |item: &Value| Error::invalid("prompt", format!("prompt has {item} where a token id is expected"));
    items.iter().map(|item| id(item).ok_or_else(|| bad(item))).collect()
}

/// A chat's messages as templates expect them, and the images that they show. Content of text parts alone becomes
/// their text.
///
/// # Errors
/// When a message is malformed or has parts that are neither text nor images.
pub(crate) fn messages(given: Option<Vec<Value>>) -> Result<(Vec<Value>, Vec<ImageSource>), Error> {
    let given = given.ok_or_else(|| Error::invalid("messages", "messages is required"))?;
    let mut images = Vec::new();
    let normalised =
        given.into_iter().enumerate().map(|(index, message)| normalise(index, message, &mut images));
    let messages = normalised.collect::<Result<_, _>>()?;
    Ok((messages, images))
}

fn normalise(index: usize, message: Value, images: &mut Vec<ImageSource>) -> Result<Value, Error> {
    let fail = |what: &str| Error::invalid("messages", format!("messages[{index}]{what}"));
    let Value::Object(mut message) = message else { return Err(fail(" must be an object")) };
    if !message.get("role").is_some_and(Value::is_string) {
        return Err(fail(".role is required and must be a string"));
    }
    let content = match message.remove("content") {
        None | Some(Value::Null) => Value::Null,
        Some(Value::String(text)) => Value::String(text),
        Some(Value::Array(parts)) => content(parts, images).map_err(|what| fail(&what))?,
        Some(_) => return Err(fail(".content must be a string or a list of parts")),
    };
    message.insert("content".into(), content);
    Ok(Value::Object(message))
}

/// Content of parts: a text where all are text, else the parts, whose images go to `images`.
fn content(parts: Vec<Value>, images: &mut Vec<ImageSource>) -> Result<Value, String> {
    let before = images.len();
    let mut plain = Vec::with_capacity(parts.len());
    for (i, part) in parts.into_iter().enumerate() {
        let at = |what: String| format!(".content[{i}]{what}");
        plain.push(match part.get("type").and_then(Value::as_str) {
            Some("text") => match part.get("text").and_then(Value::as_str) {
                Some(text) => json!({"type": "text", "text": text}),
                None => return Err(at(".text must be a string".into())),
            },
            Some("image_url") => {
                images.push(image(part).map_err(at)?);
                json!({"type": "image"})
            }
            Some(other) => return Err(at(format!(" is of type {other:.64?}; text and image_url are taken"))),
            None => return Err(at(".type is required".into())),
        });
    }
    if images.len() > before {
        return Ok(Value::Array(plain));
    }
    let texts = plain.iter().filter_map(|part| part.get("text")?.as_str());
    Ok(Value::String(texts.collect::<Vec<_>>().join("\n")))
}

/// The image of an `image_url` part. Its `detail` is taken and changes nothing: an image has one size here.
fn image(mut part: Value) -> Result<ImageSource, String> {
    match part.get_mut("image_url").and_then(|image| image.get_mut("url")).map(Value::take) {
        Some(Value::String(url)) => Ok(ImageSource::Url(url)),
        _ => Err(".image_url.url must be a string: a data: URL, or an https: URL".into()),
    }
}
