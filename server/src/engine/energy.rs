//! What the engine tells the energy books (see [`crate::energy`]), and what each choice was charged.

use std::time::Instant;

use crate::energy::work::RowWork;
use crate::energy::{EnergyUse, Paid, Phase, Work};
use crate::request::FinishReason;
use crate::scheduler::SeqId;

use super::run::Engine;
use super::sequence::Choice;
use super::step::Prepared;

/// What a choice was charged.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Spent {
    joules: f64,
    /// The newest charge: about what its next step will cost.
    newest: f64,
    /// A counter was set back while it ran: the sum is a part.
    is_partial: bool,
}

impl Spent {
    fn add(&mut self, joules: Option<f64>) {
        match joules {
            Some(joules) => {
                self.joules += joules;
                self.newest = joules;
            }
            None => self.is_partial = true,
        }
    }

    /// All of it; `None` when it is not known in full.
    pub(super) fn total(&self) -> Option<f64> {
        (!self.is_partial).then_some(self.joules)
    }

    /// What is known of it.
    pub(super) fn known(&self) -> f64 {
        self.joules
    }
}

impl Engine {
    /// A forward pass has ended: says what its rows did, and charges what came due.
    pub(super) fn meter(&mut self, rows: &[Prepared]) {
        if self.shared.energy.source().is_none() {
            return;
        }
        let done: Vec<RowWork> = rows.iter().map(|row| self.row_work(row)).collect();
        let shares = rows.iter().zip(self.costs.shares(&done));
        let choices = &self.choices;
        let work = shares.map(|(row, amount)| {
            let id = row.scheduled.id;
            let samples = choices.get(&id).is_some_and(Choice::has_sampled);
            let is_decode = samples && row.scheduled.num_tokens == 1;
            Work { id: id.0, phase: if is_decode { Phase::Decode } else { Phase::Prefill }, amount }
        });
        let mut paid = std::mem::take(&mut self.paid);
        self.shared.energy.step(work, &mut paid);
        for Paid { id, joules, .. } in paid.drain(..) {
            if let Some(choice) = self.choices.get_mut(&SeqId(id)) {
                choice.pay(joules);
            }
        }
        self.paid = paid;
    }

    fn row_work(&self, row: &Prepared) -> RowWork {
        let id = row.scheduled.id;
        let before = self.choices.get(&id).map_or([0; 2], |choice| choice.state.sublayers_run);
        let slots = self.scheduler.kv_len(id).unwrap_or_default();
        RowWork {
            tokens: row.scheduled.num_tokens as u64,
            sublayers: std::array::from_fn(|i| row.state.sublayers_run[i].saturating_sub(before[i])),
            logits: row.num_logit_rows() as u64,
            kv_slots: slots.iter().sum::<usize>() as u64,
        }
    }

    /// Steps begin, or there is nothing left to run.
    pub(super) fn set_busy(&mut self, busy: bool) {
        if std::mem::replace(&mut self.is_busy, busy) != busy {
            match busy {
                true => self.shared.energy.resume(),
                false => self.shared.energy.rest(),
            }
        }
    }

    /// Ends the choices of requests that have used up a budget, waiting or running, with what they have.
    pub(super) fn end_over_budget(&mut self) {
        let now = Instant::now();
        let over = |(id, choice): (&SeqId, &Choice)| Some((*id, choice.over_budget(now)?));
        let over: Vec<_> = self.choices.iter().filter_map(over).collect();
        for (id, reason) in over {
            if let Some(choice) = self.choices.get_mut(&id) {
                choice.end(reason, None);
            }
            self.remove(id);
        }
    }
}

impl Choice {
    /// It was charged this; `None` where nobody knows how much.
    fn pay(&mut self, joules: Option<f64>) {
        self.spent.add(joules);
        self.live.spend(joules.unwrap_or(0.0));
    }

    /// Its request's images were encoded for this. What its next step will cost does not follow from it.
    pub(super) fn pay_for_images(&mut self) {
        let newest = self.spent.newest;
        self.pay(self.live.request.image_joules);
        self.spent.newest = newest;
    }

    /// It ends: what it did in the window that is still open is charged now.
    pub(super) fn settle_energy(&mut self) {
        match self.energy.leave(self.id.0) {
            None => self.pay(None),
            Some(joules) => {
                let joules: f64 = joules.iter().sum();
                if joules > 0.0 {
                    self.pay(Some(joules));
                }
            }
        }
    }

    /// What it was charged, where there is a meter and all of it is known.
    pub(super) fn energy_use(&self) -> Option<EnergyUse> {
        Some(EnergyUse { joules: self.spent.total()?, source: self.energy.source()? })
    }

    /// The budget that its request has used up. Of joules, what one more step of all choices would cost counts as
    /// used: so the limit holds, but for a prompt that costs more.
    fn over_budget(&self, now: Instant) -> Option<FinishReason> {
        let budget = &self.live.request.budget;
        if let Some(reason) = self.stops_for() {
            return Some(reason);
        }
        if budget.deadline.is_some_and(|deadline| deadline <= now) {
            return Some(FinishReason::Deadline);
        }
        let next = self.spent.newest * self.live.request.n as f64;
        let is_spent = |max: f64| self.live.joules() + next > max;
        budget.max_joules.is_some_and(is_spent).then_some(FinishReason::MaxJoules)
    }
}
