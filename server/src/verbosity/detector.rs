//! What is usual, who is not, and what is done about it.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Class, LEARNED, VerbosityConfig, VerbosityMode, Watch};

/// Below this mean the end is out of sight.
const MIN_END: f32 = 1e-4;
/// Below this share of different trigrams a row runs in circles.
const MIN_DISTINCT: f32 = 0.25;
/// Standard deviations above the mean that are not usual.
const SIGMAS: f64 = 3.0;
/// What the end's logits rise by with every token.
const BIAS_STEP: f32 = 0.25;
/// Buckets an octave of the lengths' histogram.
const PER_OCTAVE: f64 = 8.0;
const BUCKETS: usize = 192;
/// Weight of a flagged request in what is thought of its client; an honest one with one has to send sixteen that
/// end by themselves before it is trusted again.
const FLAG_WEIGHT: f32 = 0.5;
/// Weight of a request that ended by itself.
const END_WEIGHT: f32 = 0.1;
/// Above this share of flagged requests a client's next one begins with lowered priority.
const SUSPECT: f32 = 0.1;

/// What is done about a row.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Measures {
    /// It was flagged just now.
    pub is_new: bool,
    /// Its priority is lowered.
    pub demotes: bool,
    /// Added to the logits of the end.
    pub bias: f32,
    /// It ends.
    pub stops: bool,
}

/// How a row ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// By itself.
    Itself,
    /// By a limit, or it was cancelled: that says nothing about how long it would have been.
    Cut,
}

/// What is usual in a class.
#[derive(Debug, Clone)]
struct Usual {
    lengths: [u64; BUCKETS],
    count: u64,
    /// Mean and sum of squared differences of the mean entropies (Welford).
    mean: f64,
    squares: f64,
}

impl Default for Usual {
    fn default() -> Self {
        Self { lengths: [0; BUCKETS], count: 0, mean: 0.0, squares: 0.0 }
    }
}

impl Usual {
    fn learn(&mut self, length: usize, entropy: f64) {
        self.lengths[bucket(length)] += 1;
        self.count += 1;
        let delta = entropy - self.mean;
        self.mean += delta / self.count as f64;
        self.squares += delta * (entropy - self.mean);
    }

    /// 99th percentile of the lengths, rounded up to a bucket.
    fn length(&self) -> Option<usize> {
        if self.count < LEARNED {
            return None;
        }
        let rank = (self.count as f64 * 0.99).ceil() as u64;
        let mut seen = 0;
        let bucket = self.lengths.iter().position(|count| {
            seen += count;
            seen >= rank
        })?;
        Some(((bucket + 1) as f64 / PER_OCTAVE).exp2().ceil() as usize)
    }

    /// The entropy above which a row is not usual.
    fn entropy(&self) -> Option<f64> {
        (self.count >= LEARNED).then(|| self.mean + SIGMAS * (self.squares / self.count as f64).sqrt())
    }
}

fn bucket(length: usize) -> usize {
    (((length.max(1) as f64).log2() * PER_OCTAVE) as usize).min(BUCKETS - 1)
}

/// Looks for rows that do not end.
#[derive(Debug)]
pub struct Detector {
    config: VerbosityConfig,
    usual: [Usual; Class::COUNT],
    /// How much of what clients sent of late was flagged, by the name of their key.
    suspicion: HashMap<Arc<str>, f32>,
}

impl Detector {
    /// A detector that knows nothing yet.
    pub fn new(config: VerbosityConfig) -> Self {
        Self { config, usual: Default::default(), suspicion: HashMap::new() }
    }

    /// What it does.
    pub fn mode(&self) -> VerbosityMode {
        self.config.mode
    }

    /// Whether a request of `client` begins with lowered priority.
    pub fn suspects(&self, client: Option<&Arc<str>>) -> bool {
        let suspicion = client.and_then(|client| self.suspicion.get(client));
        self.config.mode == VerbosityMode::Act && suspicion.is_some_and(|share| *share > SUSPECT)
    }

    /// Judges a row of `client` after a token; what is to be done about it, if anything.
    pub fn judge(&mut self, watch: &mut Watch, client: Option<&Arc<str>>) -> Option<Measures> {
        let is_new = watch.flagged.is_none();
        if is_new && !(std::mem::take(&mut watch.is_due) && self.is_unusual(watch)) {
            return None;
        }
        let flagged = *watch.flagged.get_or_insert(watch.len());
        if is_new && let Some(client) = client {
            let share = self.suspicion.entry(Arc::clone(client)).or_default();
            *share += FLAG_WEIGHT * (1.0 - *share);
        }
        if self.config.mode != VerbosityMode::Act {
            return Some(Measures { is_new, ..Measures::default() });
        }
        let (since, grace) = (watch.len() - flagged, self.config.grace_tokens);
        let biased = (since + 1).saturating_sub(grace);
        Some(Measures { is_new, demotes: is_new, bias: biased as f32 * BIAS_STEP, stops: since >= 3 * grace })
    }

    fn is_unusual(&self, watch: &Watch) -> bool {
        let usual = &self.usual[watch.class.index()];
        let length = usual.length().unwrap_or(0).max(self.config.min_tokens);
        if watch.len() <= length || watch.end >= MIN_END {
            return false;
        }
        let is_flat = usual.entropy().is_some_and(|most| f64::from(watch.entropy) > most);
        is_flat || watch.distinct() < MIN_DISTINCT
    }

    /// A row of `client` ended.
    pub fn ended(&mut self, watch: &Watch, client: Option<&Arc<str>>, how: Ending) {
        if how == Ending::Cut || watch.flagged.is_some() {
            return;
        }
        if let Some(share) = client.and_then(|client| self.suspicion.get_mut(client)) {
            *share *= 1.0 - END_WEIGHT;
        }
        if let Some(entropy) = watch.mean_entropy() {
            self.usual[watch.class.index()].learn(watch.len(), entropy);
        }
    }
}
