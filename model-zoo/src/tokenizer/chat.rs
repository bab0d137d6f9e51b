//! Chat templates: Jinja as Hugging Face's templates use it, with bounds on what a request can spend.
//!
//! A template comes with the model or from the operator, its variables from clients. It sees no files and
//! no environment; what it computes, how deep it recurses and how much it writes is bounded.

use std::borrow::Cow;
use std::io::{self, Write};

use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, context};
use serde_json::Map;

use super::{python_json, strftime};
use crate::{Result, ZooError};

/// Template instructions that a request may spend.
const FUEL: u64 = 5_000_000;
/// Bytes that a rendered chat may have.
const MAX_OUTPUT: usize = 8 << 20;
const NAME: &str = "chat";
/// Variables that are the server's to set.
const RESERVED: [&str; 6] =
    ["messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"];

/// A chat to render.
#[derive(Debug, Clone, Default)]
pub struct ChatInput {
    /// Messages as OpenAI's objects.
    pub messages: Vec<serde_json::Value>,
    /// Tool definitions.
    pub tools: Vec<serde_json::Value>,
    /// Further variables (`chat_template_kwargs`).
    pub template_args: Map<String, serde_json::Value>,
    /// Open an assistant turn at the end.
    pub add_generation_prompt: bool,
    /// What stands for an image in a text, if the model sees.
    pub image_marker: Option<String>,
}

/// A compiled template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// Compiles `source`.
    ///
    /// # Errors
    /// The template's mistake, as a sentence.
    pub fn new(source: String, bos_token: String, eos_token: String) -> std::result::Result<Self, String> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", |format: &str| strftime::now(format));
        environment
            .add_template_owned(NAME, source.clone())
            .map_err(|e| format!("the chat template cannot be compiled: {e:#}"))?;
        Ok(Self { environment, source, bos_token, eos_token })
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the template itself handles content that is a list of parts.
    fn takes_parts(&self) -> bool {
        self.source.contains("image")
    }

    /// The prompt of a chat.
    ///
    /// # Errors
    /// [`ZooError::Tokenize`] with what the template objects to.
    pub fn render(&self, input: &ChatInput) -> Result<String> {
        if let Some(name) = RESERVED.iter().find(|name| input.template_args.contains_key(**name)) {
            return Err(ZooError::Tokenize(format!("chat_template_kwargs must not set `{name}`")));
        }
        let messages =
            if self.takes_parts() { Cow::Borrowed(&input.messages) } else { Cow::Owned(flat(input)) };
        let fixed = context! {
            messages => messages,
            tools => if input.tools.is_empty() { Value::from(()) } else { Value::from_serialize(&input.tools) },
            documents => Value::from(()),
            add_generation_prompt => input.add_generation_prompt,
            bos_token => self.bos_token,
            eos_token => self.eos_token,
        };
        let context = context! { ..fixed, ..Value::from_serialize(&input.template_args) };
        let mut out = Bounded(Vec::new());
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render_captured_to(context, &mut out).map(|_| ()))
            .map_err(|e| refusal(&e))?;
        String::from_utf8(out.0).map_err(|e| ZooError::Tokenize(e.to_string()))
    }
}

/// The messages with content of parts as one text, an image's marker and a part of text a line each: what
/// LLaVA's own templates make of them.
fn flat(input: &ChatInput) -> Vec<serde_json::Value> {
    let marker = input.image_marker.as_deref().unwrap_or_default();
    let line = |part: &serde_json::Value| {
        let text = part.get("text").and_then(serde_json::Value::as_str);
        text.unwrap_or(marker).to_owned()
    };
    let mut messages = input.messages.clone();
    for message in &mut messages {
        if let Some(content) = message.get_mut("content")
            && let Some(parts) = content.as_array()
        {
            *content = parts.iter().map(line).collect::<Vec<_>>().join("\n").into();
        }
    }
    messages
}

fn refusal(error: &Error) -> ZooError {
    ZooError::Tokenize(match error.kind() {
        ErrorKind::OutOfFuel => "rendering the chat takes too many steps".into(),
        ErrorKind::WriteFailure => format!("the rendered chat is longer than {MAX_OUTPUT} bytes"),
        _ => {
            format!("the chat template refuses the messages: {}", error.detail().unwrap_or("an error in it"))
        }
    })
}

/// A writer that refuses more than [`MAX_OUTPUT`].
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT {
            return Err(io::Error::other("too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn raise_exception(message: String) -> std::result::Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`, which templates expect of `tojson`.
fn to_json(value: &Value, kwargs: Kwargs) -> std::result::Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent").ok().flatten();
    // What Python would do with these is a matter of layout only.
    for option in ["ensure_ascii", "sort_keys", "separators"] {
        let _: Option<Value> = kwargs.get(option).ok();
    }
    kwargs.assert_all_used()?;
    python_json::dumps(value, indent.map(|n| n.min(16)))
        .map(Value::from_safe_string)
        .map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))
}

#[cfg(test)]
mod tests;
