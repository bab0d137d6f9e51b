//! Recording what a step produced: the only way in which sequences advance.

use super::{RowOutcome, ScheduledSeq, Scheduler, SeqId, Sequence, StepPlan};

impl Scheduler {
    /// Records the outcomes of `plan`, the latest one, row by row. Rows of sequences that were aborted or
    /// preempted since are ignored. Computed full blocks become available to others.
    ///
    /// A sequence ends with [`RowOutcome::Finished`], and at the latest with its `max_tokens`th token.
    pub fn commit(&mut self, plan: &StepPlan, outcomes: &[RowOutcome]) {
        debug_assert_eq!(plan.rows.len(), outcomes.len(), "one outcome a row");
        self.plan = None;
        self.num_steps = self.num_steps.wrapping_add(1);
        self.reported.clear();
        for (row, outcome) in plan.rows.iter().zip(outcomes) {
            self.commit_row(row, outcome);
        }
        let sequences = &self.sequences;
        self.running.retain(|id| sequences.0.contains_key(id));
        self.settle_num_pages();
    }

    /// Says, just before the step that computes its prompt is committed, how many slots of it filters have dropped,
    /// `[layer]`. The step has moved what is left to the front.
    pub fn drop_slots(&mut self, id: SeqId, dropped: &[usize]) {
        if let Some(seq) = self.sequences.0.get_mut(&id) {
            seq.dropping = Some(dropped.to_vec());
        }
    }

    fn commit_row(&mut self, row: &ScheduledSeq, outcome: &RowOutcome) {
        let Some(seq) = self.sequences.0.get_mut(&row.id) else { return };
        // A row of no tokens is in no plan, so this also passes over who is not scheduled any more.
        if seq.row() != *row {
            seq.dropping = None;
            return;
        }
        let drops = seq.dropping.is_some();
        seq.advance();
        if drops {
            self.kv.trim(seq);
        }
        if self.config.prefix_caching {
            self.kv.publish(seq);
        }
        if record(seq, row, outcome) {
            self.drop_sequence(row.id);
        }
    }
}

/// Appends a sampled token and says whether the sequence has ended.
fn record(seq: &mut Sequence, row: &ScheduledSeq, outcome: &RowOutcome) -> bool {
    match outcome {
        RowOutcome::Finished => true,
        RowOutcome::Sampled(token) if row.samples => {
            seq.tokens.push(*token);
            seq.num_outputs() >= seq.spec.max_tokens
        }
        // Nothing was sampled: past its last known token there is nothing left to run.
        RowOutcome::Prefilled | RowOutcome::Sampled(_) => row.samples,
    }
}
