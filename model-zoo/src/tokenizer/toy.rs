//! A tokenizer of one token a byte, for [`ToyModel`](crate::models::toy::ToyModel): the id of a byte's
//! token is the byte, so that tests can split characters wherever they like.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{Parts, Pieces, SpecialTokens, Tokenizer};

/// Tokens of the toy vocabulary: the bytes, then [`BOS`] to [`IM_END`].
pub const VOCAB_SIZE: usize = 260;
/// `<s>`, before every text.
pub const BOS: u32 = 256;
/// `</s>`, which ends a completion.
pub const EOS: u32 = 257;
/// `<|im_start|>`, which opens a chat message.
pub const IM_START: u32 = 258;
/// `<|im_end|>`, which closes one, and ends a completion too.
pub const IM_END: u32 = 259;

const TEMPLATE: &str = "{{ bos_token }}{% for message in messages %}\
    {{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

impl Tokenizer {
    /// The byte-level tokenizer of [`toy`](self), with a chat template.
    pub fn toy() -> Self {
        let inner = tokenizers::Tokenizer::from_bytes(description().to_string());
        let parts = Parts {
            inner: inner.expect("invariant: the description is a tokenizer's"),
            special: SpecialTokens { bos: Some(BOS), eos: vec![EOS], pad: None, unk: None },
            prepend_bos: true,
            pieces: Pieces::ByteLevel,
            template: Some(TEMPLATE.into()),
            class: "ToyTokenizer".into(),
        };
        parts.build(Path::new("toy")).expect("invariant: the template is one")
    }
}

/// As in a `tokenizer.json`.
fn description() -> Value {
    let printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut vocab = Map::new();
    // GPT-2's table: bytes that do not print are spelled by U+0100 and up, in order.
    let mut moved = '\u{100}'..;
    for byte in 0..=u8::MAX {
        let spelling = if printable(byte) { Some(char::from(byte)) } else { moved.next() };
        vocab.extend(spelling.map(|c| (c.to_string(), json!(byte))));
    }
    let special = [("<s>", BOS), ("</s>", EOS), ("<|im_start|>", IM_START), ("<|im_end|>", IM_END)];
    let added = special.map(|(content, id)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    });
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": added, "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_is_a_token_and_special_tokens_are_one() {
        let toy = Tokenizer::toy();
        assert_eq!(toy.vocab_size(), VOCAB_SIZE);
        assert_eq!(toy.special().eos, [EOS, IM_END]);
        let text = "aé日\u{0}\n";
        let bytes: Vec<u32> = text.bytes().map(u32::from).collect();
        assert_eq!(toy.encode(text, false).unwrap(), bytes);
        assert_eq!(toy.decode(&bytes, true).unwrap(), text);
        assert_eq!(toy.encode("a<|im_end|>", true).unwrap(), [BOS, u32::from(b'a'), IM_END]);
        assert!((0..=255).all(|byte| toy.token_bytes(u32::from(byte)) == Some(vec![byte])));
    }
}
