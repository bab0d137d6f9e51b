//! Sequences of low priority: those that do not end when others of their kind do.
//!
//! A demoted sequence decodes in every [`DEMOTED_EVERY`]th step only, while there are others, and is always behind
//! them: they are admitted before it in the running list, so that it is the first to lose its pages.

use super::{Scheduler, SeqId};

/// Steps of others for one of a demoted sequence.
pub const DEMOTED_EVERY: u64 = 4;

impl Scheduler {
    /// Lowers the priority of a live sequence for the rest of its life.
    pub fn demote(&mut self, id: SeqId) {
        let Some(seq) = self.sequences.0.get_mut(&id).filter(|seq| !seq.demoted) else { return };
        seq.demoted = true;
        self.plan = None;
        if let Some(index) = self.running.iter().position(|&running| running == id) {
            self.running.remove(index);
            self.running.push(id);
        }
    }

    /// Whether demoted sequences sit this step out: others are there, and it is not their turn.
    pub(super) fn demoted_rest(&self) -> bool {
        !self.num_steps.is_multiple_of(DEMOTED_EVERY) && self.sequences.0.values().any(|seq| !seq.demoted)
    }

    /// Where a sequence that is admitted belongs in the running list.
    pub(super) fn place_of(&self, id: SeqId) -> usize {
        if self.sequences[id].demoted {
            return self.running.len();
        }
        let demoted = self.running.iter().rev().take_while(|&&id| self.sequences[id].demoted).count();
        self.running.len() - demoted
    }
}
