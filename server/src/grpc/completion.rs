//! A request's events gathered to its end, for the calls that answer once.

use crate::engine::TokenStream;
use crate::error::Error;
use crate::request::{ChoiceUsage, FinishReason, TokenEvent, TokenLogprob};

use super::status;

/// Everything that a request gave.
#[derive(Debug, Default)]
pub(super) struct Completion {
    /// Log-probabilities of the prompt, when asked for.
    pub(super) prompt: Option<Vec<Option<TokenLogprob>>>,
    /// One a choice, by index.
    pub(super) choices: Vec<ChoiceOutput>,
}

/// Everything that a choice gave.
#[derive(Debug, Default)]
pub(super) struct ChoiceOutput {
    pub(super) text: String,
    pub(super) tokens: Vec<TokenLogprob>,
    /// Why it ended, and the stop text that ended it if one did.
    pub(super) finished: Option<(FinishReason, Option<String>)>,
    pub(super) usage: ChoiceUsage,
}

/// Waits for the end of all `n` choices. Dropping the future cancels the request.
///
/// # Errors
/// The request's own failure, and an internal one when the engine stops first.
pub(super) async fn collect(mut events: TokenStream, n: usize) -> Result<Completion, Error> {
    let mut completion = Completion::default();
    while let Some(event) = events.next().await {
        match event {
            TokenEvent::Prompt { logprobs } => completion.prompt = Some(logprobs),
            TokenEvent::Delta { choice, text, tokens } => {
                let output = completion.choice(choice);
                output.text.push_str(&text);
                output.tokens.extend(tokens);
            }
            TokenEvent::Finished { choice, reason, stop, usage } => {
                let output = completion.choice(choice);
                output.finished = Some((reason, stop));
                output.usage = usage;
            }
            TokenEvent::Failed(error) => return Err(error),
        }
    }
    if completion.choices.len() < n || completion.choices.iter().any(|c| c.finished.is_none()) {
        return Err(status::engine_stopped());
    }
    Ok(completion)
}

impl Completion {
    /// Tokens sampled over all choices.
    pub(super) fn completion_tokens(&self) -> usize {
        self.choices.iter().map(|c| c.usage.completion_tokens).sum()
    }

    fn choice(&mut self, index: usize) -> &mut ChoiceOutput {
        if index >= self.choices.len() {
            self.choices.resize_with(index + 1, ChoiceOutput::default);
        }
        &mut self.choices[index]
    }
}
