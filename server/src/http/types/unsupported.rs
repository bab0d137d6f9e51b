//! Fields that OpenAI's or vLLM's servers know and this one does not support: refused by name, unless
//! their value asks for nothing.

use serde_json::{Value, json};

use crate::error::Error;

/// Fields that neither kind of completion supports.
const EVERYWHERE: &[&str] = &[
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "logits_processors",
    "prompt_embeds",
    "use_beam_search",
    "length_penalty",
    "bad_words",
    "allowed_token_ids",
    "kv_transfer_params",
];
const COMPLETION: &[&str] = &["suffix", "best_of", "response_format"];
const CHAT: &[&str] = &[
    "tools",
    "tool_choice",
    "functions",
    "function_call",
    "response_format",
    "audio",
    "modalities",
    "prediction",
    "web_search_options",
    "continue_final_message",
    "documents",
    "echo",
    "best_of",
    "chat_template",
    "reasoning_effort",
    "verbosity",
    "mm_processor_kwargs",
];

/// Whether a value asks for nothing beyond what happens anyway.
fn is_harmless(name: &str, value: &Value, n: i64) -> bool {
    match (name, value) {
        (_, Value::Null | Value::Bool(false)) => true,
        (_, Value::Array(items)) if items.is_empty() => true,
        ("suffix", Value::String(text)) => text.is_empty(),
        ("best_of", value) => value.as_i64() == Some(n),
        ("length_penalty", value) => value.as_f64() == Some(1.0),
        ("tool_choice" | "function_call", value) => value == "none" || value == "auto",
        ("response_format", value) => value.get("type") == Some(&json!("text")),
        ("modalities", value) => *value == json!(["text"]),
        _ => false,
    }
}

fn check(body: &Value, names: &[&str], n: i64) -> Result<(), Error> {
    for name in EVERYWHERE.iter().chain(names) {
        if body.get(*name).is_some_and(|value| !is_harmless(name, value, n)) {
            return Err(Error::invalid(name, format!("{name} is not supported by this server")));
        }
    }
    Ok(())
}

/// # Errors
/// Names the first unsupported field of a text completion.
pub(crate) fn check_completion(body: &Value, n: i64) -> Result<(), Error> {
    check(body, COMPLETION, n)
}

/// # Errors
/// Names the first unsupported field of a chat completion.
pub(crate) fn check_chat(body: &Value, n: i64) -> Result<(), Error> {
    check(body, CHAT, n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_asks_for_nothing_passes_and_the_rest_is_named() {
        for fine in [
            json!({"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "user": "x"}),
            json!({"modalities": ["text"], "best_of": 2, "audio": null, "anything_else": {"a": 1}}),
        ] {
            assert_eq!(check_chat(&fine, 2), Ok(()));
        }
        for (bad, name) in [
            (json!({"tools": [{}]}), "tools"),
            (json!({"response_format": {"type": "json_object"}}), "response_format"),
            (json!({"guided_json": {}}), "guided_json"),
            (json!({"best_of": 3}), "best_of"),
        ] {
            let error = check_chat(&bad, 1).expect_err(name);
            assert_eq!(error.param.as_deref(), Some(name));
            assert!(error.message.starts_with(name));
        }
        assert!(check_completion(&json!({"suffix": "x"}), 1).is_err());
    }
}
