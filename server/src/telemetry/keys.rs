//! What the clients of API keys do. The `key` label is a name of the operator's configuration, so that there are
//! as many series as there are keys.

use metrics::{Counter, Label};

use super::instruments::{Definition, Paired};
use super::{Metrics, label, plain};

const ADMITTED: Definition =
    plain("rheostat_key_requests_admitted_total", "", "Requests admitted by API key");
const REFUSED: Definition = plain(
    "rheostat_key_requests_refused_total",
    "",
    "Requests refused by API key and the limit that it had reached",
);
const TOKENS: Definition =
    plain("rheostat_key_tokens_total", "", "Prompt and sampled tokens of ended requests by API key");
const ENERGY: Definition =
    plain("rheostat_key_energy_joules_total", "", "Joules of ended requests by API key, in whole joules");
const UNAUTHENTICATED: Definition = plain(
    "rheostat_unauthenticated_requests_total",
    "",
    "Calls refused because they came without a known API key",
);

/// Every metric of this file.
#[cfg(test)]
pub(super) const DEFINITIONS: &[Definition] = &[ADMITTED, REFUSED, TOKENS, ENERGY, UNAUTHENTICATED];

/// A limit of an API key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyLimit {
    /// Requests at once.
    Requests,
    /// The bucket of tokens.
    Tokens,
    /// The bucket of joules.
    Joules,
}

impl KeyLimit {
    const ALL: [Self; 3] = [Self::Requests, Self::Tokens, Self::Joules];

    /// The `limit` label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Tokens => "tokens",
            Self::Joules => "joules",
        }
    }
}

/// Handles of one key's metrics.
#[derive(Debug)]
pub struct KeyMetrics {
    admitted: Paired<Counter>,
    refused: [Paired<Counter>; 3],
    tokens: Paired<Counter>,
    energy: Paired<Counter>,
    /// Microjoules that do not make a whole joule yet: counters hold whole numbers.
    remainder: std::sync::atomic::AtomicU64,
}

impl KeyMetrics {
    /// A request was admitted.
    pub fn admitted(&self) {
        self.admitted.add(1);
    }

    /// A request was refused because of `limit`.
    pub fn refused(&self, limit: KeyLimit) {
        self.refused[limit as usize].add(1);
    }

    /// A request ended after `tokens` tokens and `microjoules`.
    pub fn used(&self, tokens: u64, microjoules: u64) {
        use std::sync::atomic::Ordering::Relaxed;
        self.tokens.add(tokens);
        let before = self.remainder.fetch_add(microjoules, Relaxed);
        // Each crossing of a whole joule is counted by whoever crosses it; the sum itself never wraps.
        self.energy.add((before + microjoules) / 1_000_000 - before / 1_000_000);
    }
}

impl Metrics {
    /// Registers the metrics of the key `name` at zero, or finds them again.
    pub fn key(&self, name: &str) -> KeyMetrics {
        let counter = |def: &Definition, more: Vec<Label>| {
            let labels = label("key", name).into_iter().chain(more).collect();
            self.instruments.counter(def, labels, Vec::new())
        };
        KeyMetrics {
            admitted: counter(&ADMITTED, Vec::new()),
            refused: KeyLimit::ALL.map(|limit| counter(&REFUSED, label("limit", limit.as_str()))),
            tokens: counter(&TOKENS, Vec::new()),
            energy: counter(&ENERGY, Vec::new()),
            remainder: std::sync::atomic::AtomicU64::new(0),
        }
    }

    /// A call came without a known key.
    pub fn unauthenticated(&self) {
        self.instruments.counter(&UNAUTHENTICATED, Vec::new(), Vec::new()).add(1);
    }
}
