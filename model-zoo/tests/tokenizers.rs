//! Tokenizers built from GGUF metadata against SentencePiece itself (see `fixtures/make_sentencepiece.py`).

use std::path::Path;

use model_zoo::loader::TokenizerSource;
use model_zoo::tokenizer::Tokenizer;
use model_zoo::weights::gguf::{Array, Metadata, Value};
use serde_json::Value as Json;

fn strings(json: &Json) -> Vec<String> {
    json.as_array().into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect()
}

fn integers(json: &Json) -> Vec<i64> {
    json.as_array().into_iter().flatten().filter_map(Json::as_i64).collect()
}

fn tokenizer(model: &Json, prefix: bool) -> Tokenizer {
    let scores = model["scores"].as_array().into_iter().flatten().filter_map(Json::as_f64).map(|s| s as f32);
    let entries = [
        ("model", Value::String("llama".into())),
        ("tokens", Value::Array(Array::Strings(strings(&model["tokens"])))),
        ("scores", Value::Array(Array::Floats(scores.collect()))),
        ("token_type", Value::Array(Array::Integers(integers(&model["types"])))),
        ("bos_token_id", Value::Unsigned(1)),
        ("eos_token_id", Value::Unsigned(2)),
        ("unknown_token_id", Value::Unsigned(0)),
        ("add_space_prefix", Value::Bool(prefix)),
    ];
    let entries = entries.map(|(key, value)| (format!("tokenizer.ggml.{key}"), value));
    let metadata = Metadata::from_entries(Path::new("sentencepiece.json"), entries);
    Tokenizer::load(&TokenizerSource::Gguf(metadata), None).expect("a tokenizer")
}

#[test]
fn sentencepiece_models_encode_and_decode_as_sentencepiece_does() {
    let fixture: Json =
        serde_json::from_str(include_str!("fixtures/tokenizer/sentencepiece.json")).expect("a fixture");
    for (name, prefix) in [("prefix", true), ("plain", false)] {
        let model = &fixture[name];
        let tokenizer = tokenizer(model, prefix);
        let cases = model["cases"].as_array().expect("cases");
        assert_eq!(cases.len(), 10);
        for case in cases {
            let text = case["text"].as_str().expect("a text");
            let expected: Vec<u32> = integers(&case["ids"]).into_iter().map(|id| id as u32).collect();
            assert_eq!(tokenizer.encode(text, false).expect("encodes"), expected, "{name}: {text:?}");
            let with_bos: Vec<u32> = std::iter::once(1).chain(expected.iter().copied()).collect();
            assert_eq!(tokenizer.encode(text, true).expect("encodes"), with_bos, "{name}: {text:?}");
            let decoded = tokenizer.decode(&expected, true).expect("decodes");
            assert_eq!(decoded, case["decoded"].as_str().expect("a text"), "{name}: {text:?}");
            let bytes: Vec<u8> =
                expected.iter().filter_map(|&id| tokenizer.token_bytes(id)).flatten().collect();
            let spelled = String::from_utf8(bytes).expect("whole characters");
            assert_eq!(
                if prefix { spelled.strip_prefix(' ').unwrap_or(&spelled) } else { &spelled },
                decoded
            );
        }
    }
}
