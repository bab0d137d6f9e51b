//! What a key's clients have running and what they have used: the limits of one key, kept.
//!
//! **The rule.** A request takes from the token bucket what it can cost at most, its prompt and `n ×
//! max_tokens`, when it is admitted. When its last part ends, that is corrected to what it used: prompt
//! tokens if it ran at all, and the tokens sampled. From the joule bucket it takes the same number of tokens
//! at the key's own joules per token so far (nothing before the first request has ended), and that too is
//! corrected to what was measured. So requests of one key that run at once can never have been promised more
//! than the bucket held; one that wants more than the burst needs a full bucket and may leave a debt, which
//! has to flow in before anything else is admitted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::bucket::{Bucket, Rate};
use crate::error::{Error, ErrorKind};
use crate::telemetry::{KeyLimit, KeyMetrics};

/// Weight of the newest request in a key's joules per token.
const NEWEST: f64 = 0.2;

/// The limits of a key. What is `None` is not limited.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct KeyLimits {
    /// Requests that are queued or running at once.
    pub max_concurrent_requests: Option<usize>,
    /// Prompt and sampled tokens.
    pub tokens: Option<Rate>,
    /// Joules attributed to its requests.
    pub joules: Option<Rate>,
}

/// The account of a key. It outlives reloads of the configuration, so that these forgive nothing.
#[derive(Debug)]
pub(super) struct Account {
    state: Mutex<State>,
    metrics: KeyMetrics,
}

#[derive(Debug)]
struct State {
    max_concurrent_requests: Option<usize>,
    running: usize,
    tokens: Option<Bucket>,
    joules: Option<Bucket>,
    joules_per_token: f64,
}

impl State {
    /// Takes what `tokens` tokens can cost out of both buckets, or nothing; says how much that was.
    ///
    /// # Errors
    /// The limit that is in the way, and how long it will be.
    fn take(&mut self, tokens: f64, now: Instant) -> Result<(f64, f64), (KeyLimit, Duration)> {
        let joules = tokens * self.joules_per_token;
        let take = |bucket: &mut Option<Bucket>, amount| match bucket {
            Some(bucket) => bucket.take(amount, now),
            None => Ok(0.0),
        };
        let took_tokens = take(&mut self.tokens, tokens).map_err(|wait| (KeyLimit::Tokens, wait))?;
        match take(&mut self.joules, joules) {
            Ok(took_joules) => Ok((took_tokens, took_joules)),
            Err(wait) => {
                if let Some(bucket) = &mut self.tokens {
                    bucket.settle(took_tokens, 0.0, now);
                }
                Err((KeyLimit::Joules, wait))
            }
        }
    }
}

impl Account {
    /// An account with full buckets.
    pub(super) fn new(limits: &KeyLimits, metrics: KeyMetrics) -> Self {
        let state = State {
            max_concurrent_requests: None,
            running: 0,
            tokens: None,
            joules: None,
            joules_per_token: 0.0,
        };
        let account = Self { state: Mutex::new(state), metrics };
        account.set_limits(limits);
        account
    }

    /// Goes on under other limits.
    pub(super) fn set_limits(&self, limits: &KeyLimits) {
        let now = Instant::now();
        let mut state = self.state();
        state.max_concurrent_requests = limits.max_concurrent_requests;
        renew(&mut state.tokens, limits.tokens, now);
        renew(&mut state.joules, limits.joules, now);
    }

    /// Takes one of the places for requests that run at once.
    pub(super) fn enter(self: &Arc<Self>) -> Result<Place, Error> {
        let mut state = self.state();
        if let Some(limit) = state.max_concurrent_requests.filter(|&limit| state.running >= limit) {
            drop(state);
            self.metrics.refused(KeyLimit::Requests);
            let message = format!(
                "{limit} requests of this API key are queued or running, which is its limit; retry later"
            );
            return Err(Error::new(ErrorKind::RateLimited { retry_after_s: 1 }, message));
        }
        state.running += 1;
        Ok(Place(Arc::clone(self)))
    }

    /// Takes what a request of `tokens` tokens can cost at most out of both buckets, or out of none.
    pub(super) fn charge(self: &Arc<Self>, tokens: usize) -> Result<Charge, Error> {
        let taken = self.state().take(tokens as f64, Instant::now());
        match taken {
            Ok((took_tokens, took_joules)) => {
                self.metrics.admitted();
                Ok(Charge {
                    account: Arc::clone(self),
                    took_tokens,
                    took_joules,
                    tokens: AtomicU64::new(0),
                    microjoules: AtomicU64::new(0),
                })
            }
            Err((limit, wait)) => {
                self.metrics.refused(limit);
                let (what, retry_after_s) = (limit.as_str(), whole_seconds(wait));
                let message = format!(
                    "this API key has used up its {what} for now; this request fits again in {retry_after_s} s"
                );
                Err(Error::new(ErrorKind::RateLimited { retry_after_s }, message))
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A bucket under another rate: what was in it stays, a new one is full.
fn renew(bucket: &mut Option<Bucket>, rate: Option<Rate>, now: Instant) {
    match (bucket.as_mut(), rate) {
        (Some(bucket), Some(rate)) => bucket.set_rate(rate, now),
        (_, rate) => *bucket = rate.map(|rate| Bucket::new(rate, now)),
    }
}

/// Whole seconds, rounded up: who comes back then is not refused for a fraction of one.
fn whole_seconds(wait: Duration) -> u32 {
    wait.as_secs_f64().ceil().clamp(1.0, f64::from(u32::MAX)) as u32
}

/// One of a key's places for requests that run at once; free again when it is dropped.
#[derive(Debug)]
pub struct Place(Arc<Account>);

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.running = state.running.saturating_sub(1);
    }
}

/// What a request took from its key's buckets, and what it has used. Settled when it is dropped: by the
/// engine, after the last choice has ended.
#[derive(Debug)]
pub struct Charge {
    account: Arc<Account>,
    took_tokens: f64,
    took_joules: f64,
    tokens: AtomicU64,
    microjoules: AtomicU64,
}

impl Charge {
    /// The request ran `tokens` more tokens: its prompt, once, and what each choice sampled.
    pub fn add_tokens(&self, tokens: usize) {
        self.tokens.fetch_add(tokens as u64, Ordering::Relaxed);
    }

    /// `joules` more were attributed to the request.
    pub fn add_joules(&self, joules: f64) {
        self.microjoules.fetch_add((joules.max(0.0) * 1e6) as u64, Ordering::Relaxed);
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let now = Instant::now();
        let (tokens, microjoules) = (*self.tokens.get_mut(), *self.microjoules.get_mut());
        let (used, joules) = (tokens as f64, microjoules as f64 / 1e6);
        let mut state = self.account.state();
        if let Some(bucket) = &mut state.tokens {
            bucket.settle(self.took_tokens, used, now);
        }
        if let Some(bucket) = &mut state.joules {
            bucket.settle(self.took_joules, joules, now);
        }
        if tokens > 0 && joules > 0.0 {
            let newest = joules / used;
            let known = state.joules_per_token;
            state.joules_per_token = if known > 0.0 { known + NEWEST * (newest - known) } else { newest };
        }
        drop(state);
        self.account.metrics.used(tokens, microjoules);
    }
}
