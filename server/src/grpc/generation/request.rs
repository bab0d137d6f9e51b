//! From the wire: [`GenerateRequest`] to [`RawRequest`]. Only presence and shape are checked here; ranges
//! are admission's.

use rheostat_proto::rheostat::v1::content_part::Part;
use rheostat_proto::rheostat::v1::generate_request::Prompt as WirePrompt;
use rheostat_proto::rheostat::v1::{
    ChatMessage, ChatPrompt as WireChat, ContentPart, GenerateRequest, SamplingParams as WireSampling,
};
use serde_json::{Map, Value as Json, json};

use crate::error::Error;
use crate::request::{Caller, ChatPrompt, ImageSource, Prompt, RawRequest, SamplingParams};

use super::super::json;
use super::compression;

/// The request as admission takes it.
///
/// # Errors
/// [`crate::error::ErrorKind::InvalidArgument`]: no prompt, an unsupported method of compression, a
/// number that JSON does not have.
pub(super) fn raw_request(message: GenerateRequest) -> Result<RawRequest, Error> {
    let prompt = match message.prompt {
        Some(WirePrompt::Text(text)) => Prompt::Text(text),
        Some(WirePrompt::Tokens(tokens)) => Prompt::Tokens(tokens.ids),
        Some(WirePrompt::Chat(chat)) => Prompt::Chat(Box::new(chat_prompt(chat)?)),
        None => return Err(Error::invalid("prompt", "one of text, tokens and chat is required")),
    };
    Ok(RawRequest {
        caller: Caller::default(),
        id: message.request_id,
        model: message.model,
        prompt,
        sampling: sampling_params(message.sampling.unwrap_or_default()),
        max_tokens: message.max_tokens,
        n: message.n.unwrap_or(1).into(),
        echo: message.echo,
        prompt_logprobs: message.prompt_logprobs,
        add_special_tokens: message.add_special_tokens,
        cache_salt: message.cache_salt,
        max_joules: message.max_joules,
        deadline: message.deadline_seconds,
        compression: compression::options(message.compression.unwrap_or_default())?,
    })
}

/// The chat as templates expect it: messages as OpenAI's JSON objects.
///
/// # Errors
/// As [`raw_request`].
pub(in crate::grpc) fn chat_prompt(chat: WireChat) -> Result<ChatPrompt, Error> {
    let tool = |fields| Ok(Json::Object(json::object("chat.tools", fields)?));
    let mut images = Vec::new();
    let messages = chat.messages.into_iter().map(|message| chat_message(message, &mut images));
    Ok(ChatPrompt {
        messages: messages.collect::<Result<_, _>>()?,
        images,
        tools: chat.tools.into_iter().map(tool).collect::<Result<_, Error>>()?,
        template_args: json::object("chat.template_args", chat.template_args.unwrap_or_default())?,
        add_generation_prompt: chat.add_generation_prompt.unwrap_or(true),
    })
}

fn chat_message(message: ChatMessage, images: &mut Vec<ImageSource>) -> Result<Json, Error> {
    let mut fields = Map::new();
    fields.insert("role".into(), message.role.into());
    let content = match message.content {
        Some(_) if !message.parts.is_empty() => {
            return Err(Error::invalid("chat.messages", "a message has content or parts, not both"));
        }
        Some(text) => text.into(),
        None if message.parts.is_empty() => Json::Null,
        None => content(message.parts, images)?,
    };
    fields.insert("content".into(), content);
    for (name, text) in [("name", message.name), ("tool_call_id", message.tool_call_id)] {
        if let Some(text) = text {
            fields.insert(name.into(), text.into());
        }
    }
    if !message.tool_calls.is_empty() {
        let call = |fields| Ok(Json::Object(json::object("chat.messages.tool_calls", fields)?));
        let calls = message.tool_calls.into_iter().map(call).collect::<Result<_, Error>>()?;
        fields.insert("tool_calls".into(), Json::Array(calls));
    }
    Ok(Json::Object(fields))
}

/// Content of parts as templates expect it; its images go to `images`.
fn content(parts: Vec<ContentPart>, images: &mut Vec<ImageSource>) -> Result<Json, Error> {
    let part = |part: ContentPart| match part.part {
        Some(Part::Text(text)) => Ok(json!({"type": "text", "text": text})),
        Some(Part::Image(file)) => {
            images.push(ImageSource::Bytes(file));
            Ok(json!({"type": "image"}))
        }
        None => Err(Error::invalid("chat.messages", "a part is neither text nor an image")),
    };
    parts.into_iter().map(part).collect::<Result<_, _>>().map(Json::Array)
}

fn sampling_params(wire: WireSampling) -> SamplingParams {
    let default = SamplingParams::default();
    SamplingParams {
        temperature: wire.temperature.unwrap_or(default.temperature),
        top_p: wire.top_p.unwrap_or(default.top_p),
        top_k: wire.top_k.unwrap_or(default.top_k),
        min_p: wire.min_p.unwrap_or(default.min_p),
        seed: wire.seed,
        repetition_penalty: wire.repetition_penalty.unwrap_or(default.repetition_penalty),
        presence_penalty: wire.presence_penalty.unwrap_or(default.presence_penalty),
        frequency_penalty: wire.frequency_penalty.unwrap_or(default.frequency_penalty),
        logit_bias: wire.logit_bias.into_iter().collect(),
        logprobs: wire.logprobs,
        stop: wire.stop,
        stop_token_ids: wire.stop_token_ids,
        ignore_eos: wire.ignore_eos,
        min_tokens: wire.min_tokens.map_or(default.min_tokens, |n| n as usize),
        include_stop: wire.include_stop,
        skip_special_tokens: wire.skip_special_tokens.unwrap_or(default.skip_special_tokens),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_show_images_in_order_and_exclude_content() {
        let part = |part| ContentPart { part: Some(part) };
        let parts =
            vec![part(Part::Image(vec![1])), part(Part::Text("and".into())), part(Part::Image(vec![2]))];
        let message =
            |content, parts| ChatMessage { role: "user".into(), content, parts, ..Default::default() };
        let chat = |message| chat_prompt(WireChat { messages: vec![message], ..Default::default() });
        let read = chat(message(None, parts.clone())).unwrap();
        assert_eq!(read.images, [ImageSource::Bytes(vec![1]), ImageSource::Bytes(vec![2])]);
        let content = json!([{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]);
        assert_eq!(read.messages, [json!({"role": "user", "content": content})]);
        assert!(chat(message(Some("text".into()), parts)).is_err());
        assert!(chat(message(None, vec![ContentPart { part: None }])).is_err());
    }
}
