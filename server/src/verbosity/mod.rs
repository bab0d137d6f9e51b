//! Requests made to cost: outputs that some input keeps from ending.
//!
//! Verbose Images (arXiv 2401.11170, ICLR 2024) shows how: an image is perturbed until the model's probability of
//! the end of sequence is near nothing at every position and its distribution is flat, so that it writes seven times
//! as much. This detector looks at every [`EVERY`]th token of a row, and keeps exponentially weighted means of
//!
//! ```text
//! p(EOS)     sum of the end tokens' probabilities under the model's own logits, and the client's bias of the end
//! entropy    −Σ p ln p under the model's own logits, in nats
//! distinct   different trigrams among the last 128 tokens, as a share of all of them
//! ```
//!
//! **A row is flagged** when all of this holds; rows that are not are never touched:
//!
//! ```text
//! length  > max(min_tokens, 99th percentile of outputs that ended by themselves)      by class
//! p(EOS)  < 10⁻⁴
//! entropy > μ + 3σ of outputs that ended by themselves,  or  distinct < 0.25          by class; or it runs in circles
//! ```
//!
//! A class is chat or text, with or without images. Only outputs that ended by themselves teach what is usual, so
//! that a flood teaches nothing; before [`LEARNED`] of them the percentile is taken to be `min_tokens`, and entropy
//! flags nobody. (Circles are our addition: a model that repeats itself has a low entropy, and ends as little.)
//!
//! **What follows** under `act`, counted in tokens from the flag:
//!
//! ```text
//! 0           its priority is lowered: it decodes in every fourth step while others run, and is the first to lose
//!             its pages (see [`crate::scheduler`])
//! grace       the end tokens' logits rise by ¼ with every token
//! 3 · grace   it ends, with finish reason `verbosity`
//! ```
//!
//! A client (an API key) of whose requests more than a tenth were flagged of late has its next ones begin with
//! lowered priority: else each would have `min_tokens` at full speed. `report` only counts.
//!
//! Requests with `ignore_eos` said themselves how long they are to be: their `max_tokens` holds, and the detector
//! does not look.

mod detector;
mod signal;
#[cfg(test)]
mod tests;
mod watch;

pub use detector::{Detector, Ending, Measures};
pub use signal::{Signal, signal};
pub use watch::Watch;

/// Tokens from one look at a row to the next.
pub const EVERY: usize = 8;
/// Outputs that ended by themselves before anything is known of a class.
pub const LEARNED: u64 = 30;

/// What to do about rows that do not end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum VerbosityMode {
    /// Nothing: nobody looks.
    #[default]
    Off,
    /// Count them, and say so in the log.
    Report,
    /// Lower their priority, then raise their end's logits, then end them.
    Act,
}

impl VerbosityMode {
    /// The name in logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Report => "report",
            Self::Act => "act",
        }
    }
}

/// How to detect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerbosityConfig {
    /// What to do.
    pub mode: VerbosityMode,
    /// No output below this length is flagged.
    pub min_tokens: usize,
    /// Tokens from a flag to the first change of its logits; three times as many to its end.
    pub grace_tokens: usize,
}

impl Default for VerbosityConfig {
    fn default() -> Self {
        Self { mode: VerbosityMode::default(), min_tokens: 256, grace_tokens: 64 }
    }
}

/// Outputs that are compared with each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Class {
    /// A chat, not a text to complete.
    pub is_chat: bool,
    /// Its prompt shows images.
    pub has_images: bool,
}

impl Class {
    const COUNT: usize = 4;

    fn index(self) -> usize {
        2 * usize::from(self.is_chat) + usize::from(self.has_images)
    }

    /// The name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match (self.is_chat, self.has_images) {
            (false, false) => "text",
            (false, true) => "text_images",
            (true, false) => "chat",
            (true, true) => "chat_images",
        }
    }
}
