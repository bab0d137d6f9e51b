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

use std::sync::{Arc, PoisonError, RwLock};
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
    now: RwLock<Chosen>,
    power: Option<PowerGauge>,
    metrics: Arc<Metrics>,
}

/// What it chooses from and by, and the index of what is chosen.
#[derive(Debug, Clone)]
struct Chosen {
    front: Arc<Front>,
    policy: Policy,
    point: usize,
}

impl Chosen {
    fn point(&self) -> &Point {
        // Set from this front alone.
        &self.front.points()[self.point]
    }
}

impl Governor {
    /// A governor over `front` that reports to `metrics` and begins with the whole model. Without `power`, the
    /// policy's cap has no effect.
    pub fn new(front: Front, policy: Policy, power: Option<PowerGauge>, metrics: Arc<Metrics>) -> Self {
        for reason in policy::Reason::ALL {
            metrics.governor_moves(reason.as_str(), 0);
        }
        let now = RwLock::new(Chosen { front: Arc::new(front), policy, point: 0 });
        let governor = Self { now, power, metrics };
        governor.report();
        governor
    }

    /// The profile of a request that is admitted now.
    pub fn choose(&self) -> String {
        let name = self.now().point().name.clone();
        self.metrics.governor_request(&name);
        name
    }

    /// Chooses from `front` by `policy` from now on. What is chosen stays if the front has it, else it becomes the
    /// costliest point that loses no more, so that a lower floor holds at once.
    pub fn set(&self, front: Front, policy: Policy) {
        {
            let mut now = self.now.write().unwrap_or_else(PoisonError::into_inner);
            let before = now.point().clone();
            for gone in now.front.points().iter().filter(|point| !front.points().contains(point)) {
                self.metrics.governor_point(&gone.name, false);
            }
            let points = front.points();
            let same = points.iter().position(|point| point.name == before.name);
            let loses_no_more = |point: &Point| point.perplexity_increase <= before.perplexity_increase;
            let point = same.or_else(|| points.iter().rposition(loses_no_more)).unwrap_or(0);
            *now = Chosen { front: Arc::new(front), policy, point };
        }
        self.report();
    }

    fn now(&self) -> Chosen {
        self.now.read().unwrap_or_else(PoisonError::into_inner).clone()
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
        let (front, next, moved) = {
            let mut now = self.now.write().unwrap_or_else(PoisonError::into_inner);
            // A reload may have put the choice elsewhere.
            let mut state = *state;
            state.point = now.point;
            let (next, moved) = now.policy.decide(&now.front, &state, seen);
            now.point = next.point;
            (Arc::clone(&now.front), next, moved)
        };
        if let Some(moved) = moved {
            self.metrics.governor_moves(moved.reason.as_str(), 1);
            self.report();
            log(&front, &moved, seen);
        }
        next
    }

    fn report(&self) {
        let now = self.now();
        for point in now.front.points() {
            self.metrics.governor_point(&point.name, point == now.point());
        }
        self.metrics.governor_loss(now.point().perplexity_increase);
    }
}

impl std::fmt::Debug for Governor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Governor").field("chosen", &self.now().point().name).finish_non_exhaustive()
    }
}

fn log(front: &Front, moved: &Move, seen: &Observed) {
    let [from, to] = [moved.from, moved.to].map(|index| &front.points()[index]);
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
