//! Text to tokens and back, and chats to text.
//!
//! The algorithms are those of the `tokenizers` crate. [`gguf`] builds its tokenizers from GGUF metadata,
//! [`folder`] reads a Hugging Face folder; [`chat`] renders chat templates.

mod chat;
pub(crate) mod folder;
mod gguf;
mod python_json;
mod strftime;
pub mod toy;

pub use chat::{ChatInput, ChatTemplate};

use std::sync::Arc;

use crate::loader::TokenizerSource;
use crate::{Result, ZooError};

/// A model's tokenizer with its special tokens and its chat template. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    special: SpecialTokens,
    /// Put before a text that is encoded with special tokens, where the inner tokenizer does not.
    prepend_bos: bool,
    pieces: Pieces,
    chat: Option<Arc<ChatTemplate>>,
    class: String,
}

/// The special tokens that a server needs to know.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Beginning of sequence.
    pub bos: Option<u32>,
    /// Tokens that end a completion: end of sequence, end of turn.
    pub eos: Vec<u32>,
    /// Padding.
    pub pad: Option<u32>,
    /// Unknown.
    pub unk: Option<u32>,
}

/// How the vocabulary spells bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pieces {
    /// GPT-2's: each byte is one printable character.
    ByteLevel,
    /// SentencePiece's: ▁ is a space, `<0xAB>` a byte.
    SentencePiece,
}

/// What a client may want to know of the tokenizer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizerInfo {
    /// The kind: the checkpoint's `tokenizer_class`, or one made from GGUF's kind.
    pub class: String,
    /// Spelling of the beginning-of-sequence token.
    pub bos_token: Option<String>,
    /// Spelling of the first end-of-sequence token.
    pub eos_token: Option<String>,
    /// Spelling of the padding token.
    pub pad_token: Option<String>,
    /// Spelling of the unknown token.
    pub unk_token: Option<String>,
    /// The chat template's source.
    pub chat_template: Option<String>,
}

impl Tokenizer {
    /// The tokenizer that a checkpoint carries; `template` overrides its chat template.
    ///
    /// # Errors
    /// [`ZooError::Format`] when the checkpoint's tokenizer is malformed or of an unsupported kind, or
    /// its template is not a template.
    pub fn load(source: &TokenizerSource, template: Option<&str>) -> Result<Self> {
        match source {
            TokenizerSource::Gguf(metadata) => gguf::tokenizer(metadata, template),
            TokenizerSource::Folder(folder) => folder::tokenizer(&folder::read(folder)?, template),
            TokenizerSource::Files(files) => folder::tokenizer(files, template),
        }
    }

    /// Token ids of `text`; with `add_special`, with the tokens that the model expects around it (BOS).
    /// Special tokens that are spelled out in the text are taken as such.
    ///
    /// # Errors
    /// [`ZooError::Tokenize`] when the text cannot be encoded.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, add_special)
            .map_err(|e| ZooError::Tokenize(format!("the text cannot be encoded: {e}")))?;
        let ids = encoding.get_ids();
        match self.special.bos {
            Some(bos) if self.prepend_bos && add_special && ids.first() != Some(&bos) => {
                Ok(std::iter::once(bos).chain(ids.iter().copied()).collect())
            }
            _ => Ok(ids.to_vec()),
        }
    }

    /// Text of `ids`; incomplete UTF-8 becomes U+FFFD. Unknown ids are skipped.
    ///
    /// # Errors
    /// [`ZooError::Tokenize`] when the decoder refuses them.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner
            .decode(ids, skip_special)
            .map_err(|e| ZooError::Tokenize(format!("the tokens cannot be decoded: {e}")))
    }

    /// The vocabulary's spelling of a token.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token spelled as in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The bytes that a token stands for: of a special token, its spelling.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let piece = self.inner.id_to_token(id)?;
        if self.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id) {
            return Some(piece.into_bytes());
        }
        Some(match self.pieces {
            Pieces::ByteLevel => byte_level_bytes(&piece),
            Pieces::SentencePiece => sentencepiece_bytes(&piece),
        })
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The special tokens.
    pub fn special(&self) -> &SpecialTokens {
        &self.special
    }

    /// What a client may want to know.
    pub fn info(&self) -> TokenizerInfo {
        let spelling = |id: Option<u32>| id.and_then(|id| self.id_to_token(id));
        TokenizerInfo {
            class: self.class.clone(),
            bos_token: spelling(self.special.bos),
            eos_token: spelling(self.special.eos.first().copied()),
            pad_token: spelling(self.special.pad),
            unk_token: spelling(self.special.unk),
            chat_template: self.chat.as_ref().map(|chat| chat.source().to_owned()),
        }
    }

    /// The prompt of a chat, by the model's template.
    ///
    /// # Errors
    /// [`ZooError::Tokenize`] when the model has no template, the template refuses the messages, or
    /// rendering them takes too much.
    pub fn apply_chat_template(&self, input: &ChatInput) -> Result<String> {
        let Some(chat) = &self.chat else {
            return Err(ZooError::Tokenize("this model has no chat template; use text completions".into()));
        };
        chat.render(input)
    }
}

/// Spellings of tokens that end a turn.
const TURN_ENDS: [&str; 6] =
    ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end_of_text|>", "<|endoftext|>"];

/// What a reader of a checkpoint found.
struct Parts {
    inner: tokenizers::Tokenizer,
    special: SpecialTokens,
    prepend_bos: bool,
    pieces: Pieces,
    template: Option<String>,
    class: String,
}

impl Parts {
    /// # Errors
    /// The template's mistake.
    fn build(self, origin: &std::path::Path) -> Result<Tokenizer> {
        let mut special = self.special;
        // Chat models end their turn with one of these, which not every checkpoint declares.
        for end in TURN_ENDS {
            let declared = |id: &u32| self.inner.get_added_tokens_decoder().contains_key(id);
            let id = self.inner.token_to_id(end).filter(declared);
            special.eos.extend(id.filter(|id| !special.eos.contains(id)));
        }
        let spelling = |id: Option<u32>| id.and_then(|id| self.inner.id_to_token(id)).unwrap_or_default();
        let (bos, eos) = (spelling(special.bos), spelling(special.eos.first().copied()));
        let chat = match self.template {
            Some(source) => Some(Arc::new(
                ChatTemplate::new(source, bos, eos).map_err(|reason| ZooError::format(origin, reason))?,
            )),
            None => None,
        };
        Ok(Tokenizer {
            inner: Arc::new(self.inner),
            special,
            prepend_bos: self.prepend_bos,
            pieces: self.pieces,
            chat,
            class: self.class,
        })
    }
}

/// GPT-2's table: printable bytes stand for themselves, the others are moved to U+0100 and up, in order.
fn byte_level_bytes(piece: &str) -> Vec<u8> {
    let printable = |b: u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let moved: Vec<u8> = (0u8..=255).filter(|&b| !printable(u32::from(b))).collect();
    let mut bytes = Vec::with_capacity(piece.len());
    for c in piece.chars() {
        let code = c as u32;
        match moved.get(code.wrapping_sub(256) as usize) {
            Some(&byte) => bytes.push(byte),
            None if printable(code) => bytes.push(code as u8),
            None => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    bytes
}

fn sentencepiece_bytes(piece: &str) -> Vec<u8> {
    let byte = piece.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    match byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
        Some(byte) => vec![byte],
        None => piece.replace('▁', " ").into_bytes(),
    }
}
