//! The crate's error type. Every message says what is wrong and, where the user can act, what to do.

use std::path::PathBuf;

/// Shorthand for this crate's results.
pub type Result<T, E = ZooError> = std::result::Result<T, E>;

/// What can go wrong between a catalogue entry and a logit.
#[derive(Debug, thiserror::Error)]
pub enum ZooError {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// A weight, config or tokenizer file is malformed or of an unsupported kind.
    #[error("{}: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The model's architecture or a feature of its config is not implemented.
    #[error("unsupported model: {0}")]
    Unsupported(String),
    /// A model could not be found or fetched.
    #[error("{0}")]
    Fetch(String),
    /// A compression option is out of range or does not go with another.
    #[error("{0}")]
    Compression(String),
    /// A prompt or chat could not be rendered or encoded.
    #[error("{0}")]
    Tokenize(String),
    /// An image cannot be shown to the model.
    #[error("{0}")]
    Image(String),
    /// A step was given inputs that break the contract of [`crate::models::CausalLm::forward`].
    #[error("invalid step: {0}")]
    Step(String),
    /// A model cannot be held in the bytes that it was given.
    #[error("the budget for weights is {budget} bytes ({:.2} MiB); this model needs at least {least} ({:.2} MiB)", mib(*.budget), mib(*.least))]
    WeightBudget {
        /// Bytes allowed.
        budget: u64,
        /// Bytes that it cannot do without.
        least: u64,
    },
    /// The operating system gave no memory.
    #[error("cannot take {bytes} bytes of memory: {source}")]
    Memory {
        /// Bytes asked for.
        bytes: u64,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// A GPU cannot be used, or failed.
    #[error("{0}")]
    Device(String),
    /// candle refused an operation.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

impl ZooError {
    /// An I/O error at `path`.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }

    /// A malformed file at `path`.
    pub fn format(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::Format { path: path.into(), reason: reason.into() }
    }
}
