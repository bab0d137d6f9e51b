//! The governor's metrics, and what it looks at.

use super::instruments::Definition;
use super::recent::Load;
use super::{Metrics, label, plain};

const PROFILE: Definition = plain(
    "rheostat_governor_profile",
    "",
    "1 for the profile that requests with profile auto get now, 0 for the others",
);
const LOSS: Definition = plain(
    "rheostat_governor_perplexity_increase_ratio",
    "",
    "Perplexity of that profile over dense, less 1, as calibration measured it",
);
const MOVES: Definition =
    plain("rheostat_governor_moves_total", "", "Changes of that profile by what led to them");
const REQUESTS: Definition =
    plain("rheostat_governor_requests_total", "", "Requests with profile auto by the profile that they got");

impl Metrics {
    /// What the server does now, and what came since the last call. For one caller: it takes the samples away.
    pub fn take_load(&self) -> Load {
        self.recent.take()
    }

    /// Whether requests with `profile: auto` get `profile` now. Profiles come from a fixed set, as do reasons.
    pub fn governor_point(&self, profile: &str, is_chosen: bool) {
        let gauge = self.instruments.gauge(&PROFILE, label("profile", profile), Vec::new());
        gauge.set(f64::from(u8::from(is_chosen)));
        // So that the counter is there before its first request.
        self.instruments.counter(&REQUESTS, label("profile", profile), Vec::new()).add(0);
    }

    /// Loss of quality of the profile that `auto` gets now, as a share.
    pub fn governor_loss(&self, perplexity_increase: f64) {
        self.instruments.gauge(&LOSS, Vec::new(), Vec::new()).set(perplexity_increase);
    }

    /// The governor moved `count` times for `reason`.
    pub fn governor_moves(&self, reason: &'static str, count: u64) {
        self.instruments.counter(&MOVES, label("reason", reason), Vec::new()).add(count);
    }

    /// A request with `profile: auto` was admitted and got `profile`.
    pub fn governor_request(&self, profile: &str) {
        self.instruments.counter(&REQUESTS, label("profile", profile), Vec::new()).add(1);
    }
}
