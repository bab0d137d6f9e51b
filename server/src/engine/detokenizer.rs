//! Tokens to text, as they come, never half a character.
//!
//! A token's text is what the decoding of the last few tokens gains by it, so that rules that look at the
//! neighbours (SentencePiece's leading space, byte fallback) hold. While the gain ends in U+FFFD the bytes
//! of a character may be incomplete, and it is held back.

use std::sync::Arc;

use model_zoo::tokenizer::Tokenizer;

/// Tokens after which an unfinished character is taken for invalid bytes: no character has more bytes.
const MAX_PENDING: usize = 5;

/// One choice's detokenization.
#[derive(Debug)]
pub(crate) struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    /// The last released tokens, for context, then the tokens whose text is pending.
    window: Vec<u32>,
    /// Tokens of `window` whose text is released.
    released: usize,
}

impl Detokenizer {
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, window: Vec::new(), released: 0 }
    }

    /// Text that became final with `token`.
    pub(crate) fn push(&mut self, token: u32) -> String {
        self.window.push(token);
        self.release(false)
    }

    /// The rest, when the choice ends: incomplete bytes become U+FFFD.
    pub(crate) fn finish(&mut self) -> String {
        self.release(true)
    }

    fn release(&mut self, all: bool) -> String {
        let context = self.decode(&self.window[..self.released]);
        let whole = self.decode(&self.window);
        let pending = self.window.len() - self.released;
        let gain = whole.strip_prefix(context.as_str()).unwrap_or("");
        if !all && gain.ends_with('\u{FFFD}') && pending < MAX_PENDING {
            return String::new();
        }
        let gain = gain.to_owned();
        // What was pending is the context of what comes; a token without text of its own is none.
        if !gain.is_empty() || pending >= MAX_PENDING {
            self.window.drain(..self.released);
            self.released = self.window.len();
        }
        gain
    }

    fn decode(&self, tokens: &[u32]) -> String {
        self.tokenizer.decode(tokens, self.skip_special).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]
        #[test]
        fn deltas_join_to_the_decoded_whole_and_never_hold_half_a_character(
            text in "[a-z é日🎉\u{200d}👩\u{301}]{0,24}",
            cut in 0usize..64,
        ) {
            let tokenizer = Arc::new(Tokenizer::toy());
            let mut tokens = tokenizer.encode(&text, false).expect("the toy encodes any text");
            // The last character may be cut in its bytes: what is left of it is replaced at the end.
            tokens.truncate(tokens.len().saturating_sub(cut % 3));
            let whole = tokenizer.decode(&tokens, true).expect("decodes");
            let mut detokenizer = Detokenizer::new(tokenizer, true);
            let mut joined = String::new();
            for token in tokens {
                let delta = detokenizer.push(token);
                prop_assert!(!delta.contains('\u{FFFD}'), "{delta:?}");
                joined += &delta;
            }
            prop_assert_eq!(joined + &detokenizer.finish(), whole);
        }
    }
}
