//! The errors that a client can see, and the one table from their kinds to HTTP and gRPC codes.

/// A request that could not be served, with a message for the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What class of failure it is.
    pub kind: ErrorKind,
    /// What is wrong and what to do about it.
    pub message: String,
    /// The request field that caused it, as OpenAI's `param`.
    pub param: Option<String>,
}

/// Classes of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// A field is missing, malformed, out of range or unsupported.
    InvalidArgument,
    /// The body could not be parsed.
    Malformed,
    /// The body is larger than the limit.
    TooLarge,
    /// The model, path or request id does not exist.
    NotFound,
    /// The path exists, the method does not.
    MethodNotAllowed,
    /// The call came without a known API key.
    Unauthenticated,
    /// The API key may not do this.
    Forbidden,
    /// A client is over a limit of its own.
    RateLimited {
        /// Seconds after which it may come back.
        retry_after_s: u32,
    },
    /// The queue is full; try again later.
    Overloaded,
    /// The server is starting or stopping.
    Unavailable,
    /// The client cancelled, or went away.
    Cancelled,
    /// A defect of the server.
    Internal,
}

impl ErrorKind {
    /// The one table: kind → (HTTP status, gRPC code, OpenAI `type`).
    pub fn codes(self) -> (u16, tonic::Code, &'static str) {
        use tonic::Code;
        match self {
            Self::InvalidArgument | Self::Malformed => (400, Code::InvalidArgument, "invalid_request_error"),
            Self::TooLarge => (413, Code::ResourceExhausted, "invalid_request_error"),
            Self::NotFound => (404, Code::NotFound, "not_found_error"),
            Self::MethodNotAllowed => (405, Code::Unimplemented, "invalid_request_error"),
            Self::Unauthenticated => (401, Code::Unauthenticated, "invalid_request_error"),
            Self::Forbidden => (403, Code::PermissionDenied, "permission_error"),
            Self::RateLimited { .. } => (429, Code::ResourceExhausted, "rate_limit_error"),
            Self::Overloaded => (503, Code::Unavailable, "server_error"),
            Self::Unavailable => (503, Code::Unavailable, "server_error"),
            Self::Cancelled => (499, Code::Cancelled, "cancelled"),
            Self::Internal => (500, Code::Internal, "server_error"),
        }
    }

    /// Seconds after which a refused client may come back, where coming back helps.
    pub fn retry_after_s(self) -> Option<u32> {
        match self {
            Self::RateLimited { retry_after_s } => Some(retry_after_s),
            Self::Overloaded | Self::Unavailable => Some(1),
            _ => None,
        }
    }
}

impl Error {
    /// An error of `kind` with a message for the client.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), param: None }
    }

    /// An invalid value of the request field `param`.
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        Self { kind: ErrorKind::InvalidArgument, message: message.into(), param: Some(param.to_owned()) }
    }
}
