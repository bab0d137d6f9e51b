//! Prompts to tokens, off the async threads.

use std::sync::Arc;

use model_zoo::tokenizer::{ChatInput, Tokenizer};
use tokio::sync::Semaphore;

use crate::error::{Error, ErrorKind};
use crate::request::Prompt;

/// A text of this many bytes is encoded in less time than handing it to another thread takes.
const INLINE_BYTES: usize = 1024;
/// Prompts that are encoded at once on blocking threads; others wait their turn.
const PARALLEL: usize = 4;

/// Encodes prompts.
#[derive(Debug)]
pub(super) struct PromptEncoder {
    tokenizer: Arc<Tokenizer>,
    /// Spelling of the token that stands for an image, if the model sees.
    image_marker: Option<String>,
    turns: Semaphore,
}

impl PromptEncoder {
    pub(super) fn new(tokenizer: Arc<Tokenizer>, image_token: Option<u32>) -> Self {
        let image_marker = image_token.and_then(|id| tokenizer.id_to_token(id));
        Self { tokenizer, image_marker, turns: Semaphore::new(PARALLEL) }
    }

    /// Token ids of `prompt`; `add_special` as in [`crate::request::RawRequest::add_special_tokens`].
    pub(super) async fn encode(&self, prompt: Prompt, add_special: Option<bool>) -> Result<Vec<u32>, Error> {
        match prompt {
            Prompt::Tokens(tokens) => Ok(tokens),
            Prompt::Text(text) if text.len() <= INLINE_BYTES => {
                encode_text(&self.tokenizer, &text, add_special.unwrap_or(true))
            }
            Prompt::Text(text) => {
                self.blocking(move |tokenizer| encode_text(tokenizer, &text, add_special.unwrap_or(true)))
                    .await
            }
            Prompt::Chat(chat) => {
                let input = ChatInput {
                    messages: chat.messages,
                    tools: chat.tools,
                    template_args: chat.template_args,
                    add_generation_prompt: chat.add_generation_prompt,
                    image_marker: self.image_marker.clone(),
                };
                self.blocking(move |tokenizer| encode_chat(tokenizer, &input, add_special.unwrap_or(false)))
                    .await
            }
        }
    }

    async fn blocking(
        &self,
        work: impl FnOnce(&Tokenizer) -> Result<Vec<u32>, Error> + Send + 'static,
    ) -> Result<Vec<u32>, Error> {
        let failed = |_| Error::new(ErrorKind::Internal, "the prompt could not be encoded");
        let _turn = self.turns.acquire().await.map_err(|e| Error::new(ErrorKind::Internal, e.to_string()))?;
        let tokenizer = Arc::clone(&self.tokenizer);
        tokio::task::spawn_blocking(move || work(&tokenizer)).await.map_err(failed)?
    }
}

fn encode_text(tokenizer: &Tokenizer, text: &str, add_special: bool) -> Result<Vec<u32>, Error> {
    tokenizer.encode(text, add_special).map_err(|e| Error::invalid("prompt", e.to_string()))
}

fn encode_chat(tokenizer: &Tokenizer, chat: &ChatInput, add_special: bool) -> Result<Vec<u32>, Error> {
    let text = tokenizer.apply_chat_template(chat).map_err(|e| Error::invalid("messages", e.to_string()))?;
    tokenizer.encode(&text, add_special).map_err(|e| Error::invalid("messages", e.to_string()))
}
