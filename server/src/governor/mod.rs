//! Picks the profile of requests that leave the choice to the server (`"profile": "auto"`).
//!
//! Once a second it looks at queue, latency, KV and power, and chooses a point of the model's calibrated
//! [`front`] by a pure [`policy`]. A request takes the point that is chosen when it is admitted and keeps it to its
//! end, because its KV is of its plan; the choice moves at most every [`Policy::hold_s`] seconds. So all `auto` rows
//! of a step share one plan, except that after a move the rows admitted before it run out under theirs.

pub mod front;
pub mod policy;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

pub use front::{Front, Point};
use policy::{Move, State};
pub use policy::{Observed, Policy};
use tokio::time::Instant;

use crate::telemetry::Metrics;

/// The profile's name in requests.
pub use model_zoo::compression::registry::AUTO;

/// How often it looks.
const TICK: Duration = Duration::from_secs(1);

/// Where watts come from.
pub type PowerGauge = Box<dyn Fn() -> Option<f64> + Send + Sync>;

/// The chosen point, and what it is chosen by.
pub struct Governor {
    front: Front,
    policy: Policy,
    chosen: AtomicUsize,
    power: Option<PowerGauge>,
    metrics: Arc<Metrics>,
}

impl Governor {
    /// A governor over `front` that reports to `metrics` and begins with the whole model. Without `power`, the
    /// policy's cap has no effect.
    pub fn new(front: Front, policy: Policy, power: Option<PowerGauge>, metrics: Arc<Metrics>) -> Self {
        for reason in policy::Reason::ALL {
            metrics.governor_moves(reason.as_str(), 0);
        }
        let governor = Self { front, policy, chosen: AtomicUsize::new(0), power, metrics };
        governor.report();
        governor
    }

    /// The profile of a request that is admitted now.
    pub fn choose(&self) -> &str {
        let name = &self.chosen().name;
        self.metrics.governor_request(name);
        name
    }

    fn chosen(&self) -> &Point {
        // Stored by `tick` alone, from this front.
        &self.front.points()[self.chosen.load(Ordering::Relaxed)]
    }

    /// Looks and decides, for ever.
    pub async fn run(self: Arc<Self>) {
        let start = Instant::now();
        let mut state = State::default();
        let mut ticks = tokio::time::interval(TICK);
        // A machine that stood still has no second to make up for.
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut last = start;
        loop {
            ticks.tick().await;
            let now = Instant::now();
            let seen = self.observe(now - start, now - last);
            last = now;
            state = self.tick(&state, &seen);
        }
    }

    fn observe(&self, now: Duration, since_last: Duration) -> Observed {
        let load = self.metrics.take_load();
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        Observed {
            now_s: now.as_secs_f64(),
            waiting: load.waiting,
            starts_per_s: load.first_tokens as f64 / since_last.as_secs_f64().max(1e-3),
            ttft_ms: load.ttft_p90.map(ms),
            tpot_ms: load.inter_token_mean.map(ms),
            kv_used: load.kv_used,
            watts: self.power.as_ref().and_then(|watts| watts()),
        }
    }

    fn tick(&self, state: &State, seen: &Observed) -> State {
        let (next, moved) = self.policy.decide(&self.front, state, seen);
        if let Some(moved) = moved {
            self.chosen.store(next.point, Ordering::Relaxed);
            self.metrics.governor_moves(moved.reason.as_str(), 1);
            self.report();
            self.log(&moved, seen);
        }
        next
    }

    fn report(&self) {
        let chosen = self.chosen();
        for point in self.front.points() {
            self.metrics.governor_point(&point.name, point == chosen);
        }
        self.metrics.governor_loss(chosen.perplexity_increase);
    }

    fn log(&self, moved: &Move, seen: &Observed) {
        let [from, to] = [moved.from, moved.to].map(|index| &self.front.points()[index]);
        tracing::info!(
            from = from.name,
            to = to.name,
            reason = moved.reason.as_str(),
            pressure = moved.pressure,
            perplexity_increase = to.perplexity_increase,
            ttft_ms = seen.ttft_ms,
            tpot_ms = seen.tpot_ms,
            waiting = seen.waiting,
            kv_used = seen.kv_used,
            watts = seen.watts,
            "the governor moved"
        );
    }
}

impl std::fmt::Debug for Governor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Governor").field("chosen", &self.chosen().name).finish_non_exhaustive()
    }
}
