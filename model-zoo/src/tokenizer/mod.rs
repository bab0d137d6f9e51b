//! Text to tokens and back, and chats to text.

use std::path::Path;

use crate::{Result, ZooError};

/// A model's tokenizer with its special tokens.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: SpecialTokens,
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

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// [`ZooError::Format`] when the file is not a tokenizer.
    pub fn from_json_file(path: &Path, special: SpecialTokens) -> Result<Self> {
        let inner =
            tokenizers::Tokenizer::from_file(path).map_err(|e| ZooError::format(path, e.to_string()))?;
        Ok(Self { inner, special })
    }

    /// Token ids of `text`; with `add_special`, with the tokens that the model expects around it (BOS).
    ///
    /// # Errors
    /// [`ZooError::Tokenize`] when the text cannot be encoded.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, add_special)
            .map_err(|e| ZooError::Tokenize(format!("the text cannot be encoded: {e}")))?;
        Ok(encoding.get_ids().to_vec())
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

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The special tokens.
    pub fn special(&self) -> &SpecialTokens {
        &self.special
    }
}
