//! Tokenizers from GGUF metadata: byte-level BPE (`gpt2`) and SentencePiece's BPE (`llama`).
//!
//! Either is described as the `tokenizer.json` that it is equivalent to, and built from that.

use serde_json::{Map, Value, json};

use super::{Parts, Pieces, SpecialTokens, Tokenizer};
use crate::weights::gguf::Metadata;
use crate::{Result, ZooError};

/// `tokenizer.ggml.token_type` of the unknown token.
const UNKNOWN: i64 = 2;
/// … of control tokens (BOS and the like).
const CONTROL: i64 = 3;
/// … of tokens that the model's makers added by hand.
const USER_DEFINED: i64 = 4;

const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

pub(super) fn tokenizer(metadata: &Metadata, template: Option<&str>) -> Result<Tokenizer> {
    let kind: &str = metadata.require("tokenizer.ggml.model")?;
    let (description, pieces, class, bos_by_default) = match kind {
        "gpt2" => (byte_level(metadata)?, Pieces::ByteLevel, "PreTrainedTokenizerFast", false),
        "llama" => (sentencepiece(metadata)?, Pieces::SentencePiece, "LlamaTokenizerFast", true),
        other => {
            let reason = format!("tokenizers of kind {other:?} are not supported; gpt2 and llama are");
            return Err(ZooError::format(metadata.path(), reason));
        }
    };
    let inner = serde_json::to_vec(&description)
        .map_err(|e| e.to_string())
        .and_then(|json| tokenizers::Tokenizer::from_bytes(json).map_err(|e| e.to_string()))
        .map_err(|reason| ZooError::format(metadata.path(), format!("tokenizer: {reason}")))?;
    let id = |key: &str| metadata.get::<u32>(&format!("tokenizer.ggml.{key}_token_id"));
    let mut eos: Vec<u32> = Vec::new();
    for key in ["eos", "eot", "eom"] {
        eos.extend(id(key)?.filter(|id| !eos.contains(id)));
    }
    let own = metadata.get::<&str>("tokenizer.chat_template")?;
    Parts {
        inner,
        special: SpecialTokens { bos: id("bos")?, eos, pad: id("padding")?, unk: id("unknown")? },
        prepend_bos: metadata.get::<bool>("tokenizer.ggml.add_bos_token")?.unwrap_or(bos_by_default),
        pieces,
        template: template.or(own).map(str::to_owned),
        class: class.into(),
    }
    .build(metadata.path())
}

fn tokens(metadata: &Metadata) -> Result<&[String]> {
    metadata.require::<&[String]>("tokenizer.ggml.tokens")
}

/// The vocabulary by spelling. Of equal spellings the first id counts, as in llama.cpp.
fn vocab(tokens: &[String]) -> Map<String, Value> {
    let mut vocab = Map::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        vocab.entry(token).or_insert_with(|| id.into());
    }
    vocab
}

/// Unknown, control and hand-made tokens are found in a text before anything else.
fn added_tokens(metadata: &Metadata, tokens: &[String]) -> Result<Vec<Value>> {
    let types = metadata.get::<&[i64]>("tokenizer.ggml.token_type")?.unwrap_or_default();
    let added = tokens
        .iter()
        .zip(types.iter().copied())
        .enumerate()
        .filter(|(_, (_, kind))| matches!(*kind, UNKNOWN | CONTROL | USER_DEFINED));
    Ok(added
        .map(|(id, (token, kind))| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": kind != USER_DEFINED})
        })
        .collect())
}

fn byte_level(metadata: &Metadata) -> Result<Value> {
    let tokens = tokens(metadata)?;
    let pre = metadata.get::<&str>("tokenizer.ggml.pre")?.unwrap_or("default");
    let byte_level = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    let split = |regex: &str| {
        json!([{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false},
               byte_level(false)])
    };
    let digits = json!([{"type": "Digits", "individual_digits": true}, byte_level(true)]);
    let (steps, normalizer, ignore_merges) = match pre {
        "smollm" | "starcoder" | "refact" | "command-r" => (digits, Value::Null, false),
        "llama-bpe" | "llama3" | "llama-v3" | "smaug-bpe" => (split(LLAMA3_SPLIT), Value::Null, true),
        "qwen2" | "deepseek-r1-qwen" => (split(QWEN2_SPLIT), json!({"type": "NFC"}), false),
        "default" | "gpt-2" | "gpt2" | "olmo" | "phi-2" => (json!([byte_level(true)]), Value::Null, false),
        other => {
            let reason = format!("the pre-tokenizer {other:?} is not supported");
            return Err(ZooError::format(metadata.path(), reason));
        }
    };
    let merges = metadata.require::<&[String]>("tokenizer.ggml.merges")?;
    let merges: Vec<_> = merges.iter().filter_map(|m| m.split_once(' ')).map(|(a, b)| [a, b]).collect();
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added_tokens(metadata, tokens)?,
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": null,
        "decoder": byte_level(true),
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "ignore_merges": ignore_merges, "vocab": vocab(tokens), "merges": merges},
    }))
}

fn sentencepiece(metadata: &Metadata) -> Result<Value> {
    let tokens = tokens(metadata)?;
    let scores = metadata.require::<&[f32]>("tokenizer.ggml.scores")?;
    let prefix = metadata.get::<bool>("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let escape = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let normalizer = if prefix {
        json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, escape]})
    } else {
        escape
    };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unk = metadata.get::<u32>("tokenizer.ggml.unknown_token_id")?;
    let unk = unk.and_then(|id| tokens.get(id as usize));
    let vocab = vocab(tokens);
    let merges = merges(tokens, scores, &vocab);
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added_tokens(metadata, tokens)?,
        "normalizer": normalizer, "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"type": "BPE", "dropout": null, "unk_token": unk, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true,
                  "ignore_merges": false, "vocab": vocab, "merges": merges},
    }))
}

/// SentencePiece merges the adjacent pair whose union has the best score: as BPE merges, every way to
/// split a piece in two pieces, in descending order of the piece's score.
fn merges<'a>(tokens: &'a [String], scores: &[f32], vocab: &Map<String, Value>) -> Vec<[&'a str; 2]> {
    let mut found: Vec<(f32, u64, u64, [&str; 2])> = Vec::new();
    let id = |piece: &str| vocab.get(piece).and_then(Value::as_u64);
    for (token, &score) in tokens.iter().zip(scores) {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(a), Some(b)) = (id(left), id(right)) {
                found.push((score, a, b, [left, right]));
            }
        }
    }
    found.sort_by(|x, y| y.0.total_cmp(&x.0).then((x.1, x.2).cmp(&(y.1, y.2))));
    found.into_iter().map(|(.., pair)| pair).collect()
}
