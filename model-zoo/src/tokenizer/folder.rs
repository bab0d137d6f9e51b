//! The tokenizer of a Hugging Face folder: `tokenizer.json`, with what `tokenizer_config.json`,
//! `generation_config.json` and `chat_template.jinja` say beside it.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::{Parts, Pieces, SpecialTokens, Tokenizer};
use crate::loader::TokenizerFiles;
use crate::{Result, ZooError};

/// No tokenizer's side file is larger.
const MAX_SIDE_FILE: u64 = 64 << 20;

const TOKENIZER: &str = "tokenizer.json";
const TEMPLATE: &str = "chat_template.jinja";
/// What may lie beside [`TOKENIZER`].
const SIDE_FILES: [&str; 4] = ["tokenizer_config.json", "generation_config.json", "config.json", TEMPLATE];

/// The files in `folder` that make its tokenizer.
///
/// # Errors
/// [`ZooError::Io`] when one cannot be read, [`ZooError::Format`] when one is too large.
pub(crate) fn read(folder: &Path) -> Result<TokenizerFiles> {
    let mut files = BTreeMap::new();
    for name in [TOKENIZER].into_iter().chain(SIDE_FILES) {
        let path = folder.join(name);
        if name != TOKENIZER {
            match std::fs::metadata(&path) {
                Err(_) => continue,
                Ok(meta) if meta.len() > MAX_SIDE_FILE => {
                    return Err(ZooError::format(path, "the file is too large"));
                }
                Ok(_) => {}
            }
        }
        files.insert(name.to_owned(), std::fs::read_to_string(&path).map_err(|e| ZooError::io(path, e))?);
    }
    Ok(TokenizerFiles { origin: folder.to_owned(), files })
}

pub(super) fn tokenizer(files: &TokenizerFiles, template: Option<&str>) -> Result<Tokenizer> {
    let origin = &files.origin;
    let path = origin.join(TOKENIZER);
    let Some(text) = files.files.get(TOKENIZER) else {
        return Err(ZooError::format(origin, "has no tokenizer.json"));
    };
    let inner =
        tokenizers::Tokenizer::from_bytes(text).map_err(|e| ZooError::format(&path, e.to_string()))?;
    let config = json(files, "tokenizer_config.json")?.unwrap_or_default();
    let generation = json(files, "generation_config.json")?.unwrap_or_default();
    let model = json(files, "config.json")?.unwrap_or_default();

    // A special token is a string, or an object with its content.
    let spelled = |key: &str| {
        let token = config.get(key)?;
        let content = token.as_str().or_else(|| token.get("content")?.as_str())?;
        inner.token_to_id(content)
    };
    let mut eos: Vec<u32> = spelled("eos_token").into_iter().collect();
    for source in [&generation, &model] {
        eos.extend(
            ids(source.get("eos_token_id")).into_iter().filter(|id| !eos.contains(id)).collect::<Vec<_>>(),
        );
    }
    let declared = |source: &Value, key: &str| ids(source.get(key)).first().copied();
    let special = SpecialTokens {
        bos: spelled("bos_token").or_else(|| declared(&model, "bos_token_id")),
        eos,
        pad: spelled("pad_token").or_else(|| declared(&model, "pad_token_id")),
        unk: spelled("unk_token"),
    };
    let template = match template {
        Some(template) => Some(template.to_owned()),
        None => own_template(files, &config),
    };
    let is_byte_level =
        serde_json::to_value(inner.get_decoder()).is_ok_and(|d| d.to_string().contains("ByteLevel"));
    let class = config.get("tokenizer_class").and_then(Value::as_str).unwrap_or("PreTrainedTokenizerFast");
    Parts {
        special,
        // `tokenizer.json` says itself what goes around a text.
        prepend_bos: false,
        pieces: if is_byte_level { Pieces::ByteLevel } else { Pieces::SentencePiece },
        template,
        class: class.to_owned(),
        inner,
    }
    .build(origin)
}

/// A file of its own, a string, or the `default` of a list of named ones.
fn own_template(files: &TokenizerFiles, config: &Value) -> Option<String> {
    if let Some(template) = files.files.get(TEMPLATE) {
        return Some(template.clone());
    }
    match config.get("chat_template") {
        Some(Value::String(template)) => Some(template.clone()),
        Some(Value::Array(named)) => named
            .iter()
            .find(|t| t.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|t| t.get("template")?.as_str().map(str::to_owned)),
        _ => None,
    }
}

fn ids(value: Option<&Value>) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(items)) => items.iter().filter_map(id).collect(),
        Some(single) => id(single).into_iter().collect(),
        None => Vec::new(),
    }
}

/// The file's JSON, or `None` when there is no such file.
fn json(files: &TokenizerFiles, name: &str) -> Result<Option<Value>> {
    let Some(text) = files.files.get(name) else { return Ok(None) };
    let parsed = serde_json::from_str(text);
    parsed.map(Some).map_err(|e| ZooError::format(files.origin.join(name), e.to_string()))
}
