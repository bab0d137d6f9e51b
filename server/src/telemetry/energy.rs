//! Energy: what the meter says, and to whom it was charged.
//!
//! Counters hold whole numbers, so that joules are counted when a whole one is full. `source` and `phase` come from
//! fixed sets, profiles from the operator's configuration.

use metrics::{Counter, Gauge};

use super::instruments::{Definition, Paired};
use super::{Metrics, label, plain};
use crate::energy::{Source, Totals};

const JOULES: Definition = plain(
    "rheostat_energy_joules_total",
    "",
    "Joules charged to prefill, decode and encoded images by what they did, and to nobody (idle); they add up to the metered ones",
);
const METERED: Definition =
    plain("rheostat_energy_metered_joules_total", "", "Joules that the meter has counted");
const RESETS: Definition = plain(
    "rheostat_energy_meter_resets_total",
    "",
    "Times that a counter was set back: what was used meanwhile is in no total",
);
const UNMETERED: Definition = plain(
    "rheostat_energy_unmetered_sequences_total",
    "",
    "Finished sequences that report no joules because a counter was set back while they ran",
);
const WATTS: Definition = plain("rheostat_power_watts", "", "Power drawn during the last second");
const PER_REQUEST: Definition = Definition {
    buckets: &[0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0, 30000.0],
    ..plain("rheostat_request_energy_joules", "", "Joules charged to a finished sequence")
};
const PER_TOKEN: Definition = Definition {
    buckets: &[0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0],
    ..plain(
        "rheostat_output_token_energy_joules",
        "",
        "Joules charged to a finished sequence per token that it sampled",
    )
};

/// Every metric of this file.
pub(super) const DEFINITIONS: &[Definition] =
    &[JOULES, METERED, RESETS, UNMETERED, WATTS, PER_REQUEST, PER_TOKEN];

/// Handles of the metrics of one meter.
#[derive(Debug)]
pub struct EnergyMetrics {
    phases: [Paired<Counter>; 4],
    metered: Paired<Counter>,
    resets: Paired<Counter>,
    watts: Paired<Gauge>,
}

impl EnergyMetrics {
    /// The totals were `before` and are `now`.
    pub fn totals(&self, before: &Totals, now: &Totals) {
        let phases = |totals: &Totals| [totals.prefill, totals.decode, totals.image, totals.idle];
        for ((counter, before), now) in self.phases.iter().zip(phases(before)).zip(phases(now)) {
            counter.add(whole(before, now));
        }
        self.metered.add(whole(before.metered, now.metered));
        self.resets.add(now.resets - before.resets);
    }

    /// What is drawn now.
    pub fn watts(&self, watts: f64) {
        self.watts.set(watts);
    }
}

/// Whole joules that became full on the way.
fn whole(before: f64, now: f64) -> u64 {
    (now as u64).saturating_sub(before as u64)
}

impl Metrics {
    /// Registers the metrics of a meter at zero.
    pub fn energy(&self, source: Source) -> EnergyMetrics {
        let own = || label("source", source.as_str());
        let counter = |def, labels| self.instruments.counter(def, labels, Vec::new());
        counter(&UNMETERED, Vec::new()).add(0);
        EnergyMetrics {
            phases: ["prefill", "decode", "image", "idle"]
                .map(|phase| counter(&JOULES, [own(), label("phase", phase)].concat())),
            metered: counter(&METERED, own()),
            resets: counter(&RESETS, own()),
            watts: self.instruments.gauge(&WATTS, own(), Vec::new()),
        }
    }

    /// A sequence under `profile`, one of a fixed set, ended after `tokens` sampled tokens, and `joules` were
    /// charged to it; `None` where nobody knows how many.
    pub fn sequence_energy(&self, profile: &str, joules: Option<f64>, tokens: usize) {
        let Some(joules) = joules else {
            return self.instruments.counter(&UNMETERED, Vec::new(), Vec::new()).add(1);
        };
        let histogram = |def| self.instruments.histogram(def, label("profile", profile));
        histogram(&PER_REQUEST).record(joules);
        if tokens > 0 {
            histogram(&PER_TOKEN).record(joules / tokens as f64);
        }
    }
}
