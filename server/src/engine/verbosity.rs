//! Rows that do not end: what the engine shows the detector, and does on its word (see [`crate::verbosity`]).

use std::sync::Arc;

use super::run::Engine;
use super::sequence::Choice;
use super::step::Prepared;
use crate::request::FinishReason;
use crate::scheduler::SeqId;
use crate::verbosity::{Class, Ending, VerbosityMode, Watch};

impl Engine {
    /// A choice arrives: it is watched from now on, and stands back if its client is known for flooding.
    pub(super) fn watch(&mut self, choice: &mut Choice) {
        let request = &choice.live.request;
        if self.detector.mode() == VerbosityMode::Off || request.sampling.ignore_eos {
            return;
        }
        let class = Class { is_chat: request.is_chat, has_images: !request.images.is_empty() };
        choice.watch = Some(Box::new(Watch::new(class, choice.ends())));
        if self.detector.suspects(request.client.as_ref()) {
            self.shared.metrics.verbosity_action("suspect");
            self.scheduler.demote(choice.id);
        }
    }

    /// A step has sampled: judges its rows.
    pub(super) fn judge(&mut self, rows: &[Prepared]) {
        if self.detector.mode() == VerbosityMode::Off {
            return;
        }
        for row in rows {
            let id = row.scheduled.id;
            let Some(choice) = self.choices.get_mut(&id) else { continue };
            let client = choice.live.request.client.clone();
            let Some(watch) = choice.watch.as_deref_mut() else { continue };
            let class = watch.class();
            let Some(measures) = self.detector.judge(watch, client.as_ref()) else { continue };
            if measures.is_new {
                self.shared.metrics.verbosity_flagged(class.as_str());
                log(choice, self.detector.mode());
            }
            if measures.demotes {
                self.shared.metrics.verbosity_action("demote");
                self.scheduler.demote(id);
            }
            if measures.bias > 0.0 {
                if !choice.is_end_raised() {
                    self.shared.metrics.verbosity_action("bias");
                }
                choice.raise_end(measures.bias);
            }
            if measures.stops {
                self.shared.metrics.verbosity_action("stop");
                choice.stop_for(FinishReason::Verbosity);
            }
        }
    }

    /// A choice is gone: one that ended by itself says what is usual.
    pub(super) fn learn(&mut self, choice: &Choice) {
        if let Some(watch) = choice.watch.as_deref() {
            let how = if choice.has_stopped() { Ending::Itself } else { Ending::Cut };
            self.detector.ended(watch, choice.live.request.client.as_ref(), how);
        }
    }
}

fn log(choice: &Choice, mode: VerbosityMode) {
    let request = &choice.live.request;
    let SeqId(sequence) = choice.id;
    tracing::warn!(
        request_id = request.id,
        key = request.client.as_ref().map(Arc::as_ref),
        sequence,
        mode = mode.as_str(),
        "a sequence does not end when others of its kind do"
    );
}
