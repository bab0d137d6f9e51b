//! Bounds on everything that a client can make large.

use crate::error::{Error, ErrorKind};

/// Limits with safe defaults. The operator can change them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Requests that are queued or running at once.
    pub max_concurrent_requests: usize,
    /// Requests of those that have not had their first step.
    pub max_queued_requests: usize,
    /// Choices of a request.
    pub max_n: usize,
    /// Tokens that all choices of a request may generate together.
    pub max_total_tokens: usize,
    /// Stop texts of a request.
    pub max_stop_texts: usize,
    /// Bytes of a stop text.
    pub max_stop_bytes: usize,
    /// Stop token ids of a request.
    pub max_stop_tokens: usize,
    /// Entries of `logit_bias`.
    pub max_logit_bias: usize,
    /// Alternatives reported per token.
    pub max_logprobs: usize,
    /// Messages of a chat.
    pub max_messages: usize,
    /// Bytes of a prompt as the client wrote it, over all messages, tools and template arguments.
    pub max_prompt_bytes: usize,
    /// Bytes of a request id.
    pub max_id_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_concurrent_requests: 512,
            max_queued_requests: usize::MAX,
            max_n: 128,
            max_total_tokens: 1 << 20,
            max_stop_texts: 16,
            max_stop_bytes: 256,
            max_stop_tokens: 64,
            max_logit_bias: 1024,
            max_logprobs: 20,
            max_messages: 1024,
            max_prompt_bytes: 1 << 20,
            max_id_bytes: 128,
        }
    }
}

impl Limits {
    /// Fails when `n` choices of `max_tokens` each are too much together.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`].
    pub(super) fn check_total(&self, n: usize, max_tokens: usize) -> Result<(), Error> {
        if n.saturating_mul(max_tokens) <= self.max_total_tokens {
            return Ok(());
        }
        let limit = self.max_total_tokens;
        let message = format!("n × max_tokens is {n} × {max_tokens}; together they may be {limit} at most");
        Err(Error { kind: ErrorKind::InvalidArgument, message, param: Some("n".into()) })
    }
}
