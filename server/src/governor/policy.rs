//! The decision: a pure function of what is observed and of its own previous state.
//!
//! Everything observed becomes a *pressure*: 1 means exactly at the limit. Above [`HIGH`] the governor goes to the
//! point of least loss that is predicted to bring the worst pressure down to [`AIM`], and where none does, to the
//! cheapest. Below [`LOW`] for a while it goes one step back towards the whole model, if that is predicted to stay
//! below [`AIM`]. Between the two nothing moves. After a move nothing moves for [`Policy::hold_s`]; a step back that
//! had to be undone doubles the while before the next one, up to [`MAX_WAIT`] times.

use super::front::{Front, Point};

/// Pressure from which compression rises.
pub const HIGH: f64 = 0.95;
/// Pressure that a move is to lead to.
pub const AIM: f64 = 0.85;
/// Pressure below which compression may fall.
pub const LOW: f64 = 0.7;
/// Share of the KV pool that counts as its limit: above it, sequences soon lose their pages.
pub const KV_LIMIT: f64 = 0.95;
/// The longest wait before a step back, in times of [`Policy::calm_s`].
pub const MAX_WAIT: f64 = 16.0;

/// What the operator wants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Policy {
    /// Milliseconds to the first token at most.
    pub ttft_ms: f64,
    /// Milliseconds per further token at most.
    pub tpot_ms: f64,
    /// Watts at most; `None` for no limit.
    pub cap_watts: Option<f64>,
    /// Seconds after a move in which nothing moves.
    pub hold_s: f64,
    /// Seconds of low pressure before a step back.
    pub calm_s: f64,
}

/// What the server saw since the last decision.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Observed {
    /// Seconds on a clock that never goes back.
    pub now_s: f64,
    /// Sequences in the waiting queue now.
    pub waiting: usize,
    /// Sequences that sampled their first token, a second.
    pub starts_per_s: f64,
    /// 90th percentile of the time to the first token, in milliseconds; `None` when there was none.
    pub ttft_ms: Option<f64>,
    /// Mean time between two tokens of a sequence, in milliseconds; `None` when there was none.
    pub tpot_ms: Option<f64>,
    /// Share of the KV pool that sequences use.
    pub kv_used: f64,
    /// Watts drawn; `None` where no meter is.
    pub watts: Option<f64>,
}

/// Why a move was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// First tokens come late.
    Ttft,
    /// Further tokens come late.
    Tpot,
    /// The queue is longer than can be started within the target.
    Queue,
    /// The KV pool is nearly full.
    Kv,
    /// The server draws more power than it may.
    Power,
    /// All pressures have been low for long enough.
    Calm,
}

impl Reason {
    /// Every reason, for metrics that start at zero.
    pub const ALL: [Self; 6] = [Self::Ttft, Self::Tpot, Self::Queue, Self::Kv, Self::Power, Self::Calm];

    /// The name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ttft => "ttft",
            Self::Tpot => "tpot",
            Self::Queue => "queue",
            Self::Kv => "kv",
            Self::Power => "power",
            Self::Calm => "calm",
        }
    }

    /// What a point costs of the resource that is short.
    fn cost(self, point: &Point) -> f64 {
        if self == Self::Kv { point.kv } else { point.work }
    }
}

/// What the governor remembers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct State {
    /// Index of the chosen point.
    pub point: usize,
    /// When it last moved.
    moved_s: f64,
    /// Since when every pressure has been low.
    calm_since_s: Option<f64>,
    /// When it last stepped back.
    stepped_back_s: f64,
    /// Times of [`Policy::calm_s`] before the next step back.
    wait: f64,
}

impl Default for State {
    /// The whole model, free to move.
    fn default() -> Self {
        let never = f64::NEG_INFINITY;
        Self { point: 0, moved_s: never, calm_since_s: None, stepped_back_s: never, wait: 1.0 }
    }
}

/// A change of the chosen point.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Move {
    /// Index of the point before.
    pub from: usize,
    /// Index of the point from now on.
    pub to: usize,
    /// Why.
    pub reason: Reason,
    /// The worst pressure.
    pub pressure: f64,
}

impl Policy {
    /// How near every limit is.
    fn pressures(&self, seen: &Observed) -> [(Reason, f64); 5] {
        // By Little's law, the queue's last one waits for as long as it takes to start the queue's length.
        let wait_ms = if seen.waiting == 0 { 0.0 } else { 1000.0 * seen.waiting as f64 / seen.starts_per_s };
        [
            (Reason::Ttft, seen.ttft_ms.map_or(0.0, |ms| ms / self.ttft_ms)),
            (Reason::Tpot, seen.tpot_ms.map_or(0.0, |ms| ms / self.tpot_ms)),
            (Reason::Queue, wait_ms / self.ttft_ms),
            (Reason::Kv, seen.kv_used / KV_LIMIT),
            (Reason::Power, seen.watts.zip(self.cap_watts).map_or(0.0, |(watts, cap)| watts / cap)),
        ]
    }

    /// The next state, and the move that led to it, if there was one.
    pub fn decide(&self, front: &Front, state: &State, seen: &Observed) -> (State, Option<Move>) {
        let pressures = self.pressures(seen);
        let worst = pressures.into_iter().fold((Reason::Calm, 0.0), |a, b| if b.1 > a.1 { b } else { a });
        let mut next = *state;
        next.calm_since_s = (worst.1 < LOW).then(|| state.calm_since_s.unwrap_or(seen.now_s));
        let waited = |since: f64| seen.now_s - since >= self.calm_s * state.wait;
        let wanted = if worst.1 > HIGH {
            cheaper(front, state.point, worst).map(|to| (to, worst.0))
        } else if next.calm_since_s.is_some_and(waited) {
            let back = state.point.checked_sub(1);
            back.filter(|&to| stays_low(front, (state.point, to), &pressures)).map(|to| (to, Reason::Calm))
        } else {
            None
        };
        let is_held = seen.now_s - state.moved_s < self.hold_s;
        let Some((to, reason)) = wanted.filter(|_| !is_held) else { return (next, None) };
        if reason == Reason::Calm {
            next.stepped_back_s = seen.now_s;
            // The next step back needs its own while.
            next.calm_since_s = None;
        } else {
            let is_undone = seen.now_s - state.stepped_back_s < 2.0 * self.calm_s * state.wait;
            next.wait = if is_undone { (2.0 * state.wait).min(MAX_WAIT) } else { 1.0 };
        }
        next.point = to;
        next.moved_s = seen.now_s;
        (next, Some(Move { from: state.point, to, reason, pressure: worst.1 }))
    }
}

/// The point of least loss that is predicted to bring the pressure down to [`AIM`], else the cheapest of all;
/// `None` when none is cheaper than the present one.
fn cheaper(front: &Front, now: usize, (reason, pressure): (Reason, f64)) -> Option<usize> {
    let points = front.points();
    let own = reason.cost(&points[now]);
    let cheaper =
        || points.iter().map(|point| reason.cost(point)).enumerate().filter(|(_, cost)| *cost < own);
    let enough = cheaper().find(|(_, cost)| *cost <= own * AIM / pressure);
    enough.or_else(|| cheaper().min_by(|(_, a), (_, b)| a.total_cmp(b))).map(|(index, _)| index)
}

/// Whether every pressure is predicted to stay below [`AIM`] after a step from one point to another.
fn stays_low(front: &Front, (from, to): (usize, usize), pressures: &[(Reason, f64)]) -> bool {
    let [from, to] = [from, to].map(|index| &front.points()[index]);
    pressures.iter().all(|&(reason, pressure)| pressure * reason.cost(to) / reason.cost(from) < AIM)
}
