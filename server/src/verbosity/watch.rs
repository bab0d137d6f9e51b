//! What is kept of one row.

use std::collections::HashSet;

use super::{Class, EVERY, Signal};

/// Tokens in which circles are looked for.
const WINDOW: usize = 128;
/// Weight of the newest look in the means.
const NEWEST: f32 = 0.25;

/// One row that is looked at.
#[derive(Debug)]
pub struct Watch {
    pub(super) class: Class,
    /// Tokens that end it, with what the client adds to their logits.
    ends: Vec<(u32, f32)>,
    /// The last tokens, in a ring.
    recent: Vec<u32>,
    sampled: usize,
    pub(super) end: f32,
    pub(super) entropy: f32,
    /// Sum and number of the entropies looked at.
    entropies: (f64, u32),
    /// A look came since the detector judged it.
    pub(super) is_due: bool,
    /// Tokens sampled when it was flagged.
    pub(super) flagged: Option<usize>,
}

impl Watch {
    /// Of a row that begins, which `ends` end, each with what the client adds to its logit.
    pub fn new(class: Class, ends: Vec<(u32, f32)>) -> Self {
        Self {
            class,
            ends,
            recent: Vec::new(),
            sampled: 0,
            end: 0.0,
            entropy: 0.0,
            entropies: (0.0, 0),
            is_due: false,
            flagged: None,
        }
    }

    /// Whether the next token's logits are to be looked at. A flagged row is not looked at any more.
    pub fn wants_signal(&self) -> bool {
        self.flagged.is_none() && self.sampled.is_multiple_of(EVERY)
    }

    /// The signal of the next token's logits.
    pub fn look(&mut self, signal: Signal) {
        let is_first = self.entropies.1 == 0;
        let weight = if is_first { 1.0 } else { NEWEST };
        self.end += weight * (signal.end - self.end);
        self.entropy += weight * (signal.entropy - self.entropy);
        self.entropies.0 += f64::from(signal.entropy);
        self.entropies.1 += 1;
        self.is_due = true;
    }

    /// `token` was sampled.
    pub fn sampled(&mut self, token: u32) {
        match self.recent.len() < WINDOW {
            true => self.recent.push(token),
            false => self.recent[self.sampled % WINDOW] = token,
        }
        self.sampled += 1;
    }

    /// Tokens that end it, with what the client adds to their logits.
    pub fn ends(&self) -> &[(u32, f32)] {
        &self.ends
    }

    /// What it is compared with.
    pub fn class(&self) -> Class {
        self.class
    }

    /// Tokens sampled.
    pub(super) fn len(&self) -> usize {
        self.sampled
    }

    /// Mean entropy of its looks.
    pub(super) fn mean_entropy(&self) -> Option<f64> {
        let (sum, count) = self.entropies;
        (count > 0).then(|| sum / f64::from(count))
    }

    /// Different trigrams among the last tokens, as a share of all; 1 before there are enough to say.
    pub(super) fn distinct(&self) -> f32 {
        if self.recent.len() < WINDOW {
            return 1.0;
        }
        // Where the ring is cut, two trigrams are none of the text's.
        let trigrams: HashSet<&[u32]> = self.recent.windows(3).collect();
        trigrams.len() as f32 / (WINDOW - 2) as f32
    }
}
