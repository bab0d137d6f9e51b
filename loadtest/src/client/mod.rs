//! How a request reaches a server, and what is noted of the answer.

pub mod grpc;
pub mod http;
mod sse;

use std::fmt;

use tokio::time::Instant;

use crate::workload::Call;

/// A server under load.
pub trait Target: Send + Sync + 'static {
    /// Sends `call` and reads the answer to its end.
    fn call(&self, call: Call) -> impl Future<Output = Result<Answer, Failure>> + Send;
}

/// A complete answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// When the first text came, where the answer was streamed.
    pub first_token: Option<Instant>,
    /// When the last text came, where the answer was streamed.
    pub last_token: Option<Instant>,
    /// When the answer was complete.
    pub end: Instant,
    /// What the server counted.
    pub usage: Usage,
}

/// What the server says that a request took.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens generated; the number of pieces of text, where the server does not say.
    pub completion_tokens: u64,
    /// Joules, where the server says so.
    pub joules: Option<f64>,
    /// Where the joules come from: a meter's name, or `estimate`.
    pub joules_source: Option<String>,
    /// The profile that was run, where the server says so.
    pub profile: Option<String>,
}

/// Why there was no answer.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Failure {
    /// No connection, or it was lost before the answer began.
    Connection,
    /// HTTP status, or gRPC code.
    Refused(String),
    /// The answer began and was never complete.
    Incomplete,
    /// The answer is not what its API says.
    Malformed,
    /// It took longer than was allowed.
    Timeout,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connection => f.write_str("connection"),
            Self::Refused(code) => write!(f, "refused: {code}"),
            Self::Incomplete => f.write_str("incomplete"),
            Self::Malformed => f.write_str("malformed"),
            Self::Timeout => f.write_str("timeout"),
        }
    }
}

/// What every request of a run has in common.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// The model's name; empty where the server has one only.
    pub model: String,
    /// A key, sent as a bearer token.
    pub api_key: Option<String>,
    /// Ask for the answer in pieces.
    pub stream: bool,
    /// Send chats rather than text completions.
    pub chat: bool,
    /// Let the model end a text by itself. Else every output has the length that was planned.
    pub respect_eos: bool,
    /// What the shares have under `compression`, by their index.
    pub compression: Vec<Option<serde_json::Value>>,
}
