//! Sequences that do not end. Classes and actions come from fixed sets.

use super::instruments::Definition;
use super::{Metrics, label, plain};

const FLAGGED: Definition = plain(
    "rheostat_verbosity_flagged_total",
    "",
    "Sequences that did not end when others of their class do, by class",
);
const ACTIONS: Definition = plain(
    "rheostat_verbosity_actions_total",
    "",
    "What was done about such sequences, or at once about those of clients that had sent some",
);

impl Metrics {
    /// A sequence of `class` was flagged.
    pub fn verbosity_flagged(&self, class: &'static str) {
        self.instruments.counter(&FLAGGED, label("class", class), Vec::new()).add(1);
    }

    /// This was done about a sequence.
    pub fn verbosity_action(&self, action: &'static str) {
        self.instruments.counter(&ACTIONS, label("action", action), Vec::new()).add(1);
    }
}
