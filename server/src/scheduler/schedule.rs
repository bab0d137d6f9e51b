//! Planning a step: decode rows, prefill chunks, admission, preemption.
//!
//! What has to run whole (a prompt whose image tokens are filtered) is never cut, and so may run more tokens than the
//! step's budget; nothing else does.

use super::kv_pages::PrefixHit;
use super::{Scheduler, SeqId, Sequence, StepPlan};

/// Candidates passed over in one step because their prefix is being computed: each costs a lookup.
const MAX_PASSED_OVER: usize = 16;

impl Scheduler {
    /// Plans the next step and allocates its pages. Until something else changes, it answers the same
    /// plan; what an uncommitted plan allocated stays with its sequences for the next one.
    pub fn schedule(&mut self) -> StepPlan {
        if let Some(plan) = &self.plan {
            return plan.clone();
        }
        for &id in &self.running {
            self.sequences[id].num_scheduled = 0;
        }
        let mut budget = self.config.max_num_batched_tokens;
        let demoted_rest = self.demoted_rest();
        self.schedule_decodes(&mut budget, demoted_rest);
        self.schedule_prefills(&mut budget);
        self.admit_waiting(&mut budget);
        self.top_up_prefills(&mut budget);
        if demoted_rest && self.running.iter().all(|&id| self.sequences[id].num_scheduled == 0) {
            // The others wait for what demoted sequences hold.
            self.schedule_decodes(&mut budget, false);
        }
        let plan = self.build_plan();
        self.plan = Some(plan.clone());
        plan
    }

    fn schedule_decodes(&mut self, budget: &mut usize, demoted_rest: bool) {
        let mut index = 0;
        // Preemption shortens the list from its end while it is walked.
        while index < self.running.len() && *budget > 0 {
            let seq = &self.sequences[self.running[index]];
            if seq.is_decoding() && !(demoted_rest && seq.demoted) {
                self.claim(index, 1, budget);
            }
            index += 1;
        }
    }

    fn schedule_prefills(&mut self, budget: &mut usize) {
        let is_prefilling = |seq: &Sequence| !seq.is_decoding();
        let mut num_behind = self.running.iter().filter(|&&id| is_prefilling(&self.sequences[id])).count()
            + self.waiting.len();
        let mut index = 0;
        while index < self.running.len() && *budget > 0 {
            let seq = &self.sequences[self.running[index]];
            if is_prefilling(seq) {
                num_behind -= 1;
                let chunk = self.prefill_chunk(seq, *budget, num_behind > 0);
                if chunk > 0 {
                    self.claim(index, chunk, budget);
                }
            }
            index += 1;
        }
    }

    /// Admits candidates while there are seats, budget and pages.
    fn admit_waiting(&mut self, budget: &mut usize) {
        let anyone_scheduled = self.running.iter().any(|&id| self.sequences[id].num_scheduled > 0);
        let preempting = !self.preempted.is_empty() || !self.reported.is_empty();
        // Where sequences are losing their pages, none is free for others.
        if self.waiting.is_empty() || (preempting && anyone_scheduled) {
            return;
        }
        let mut reserved = self.prefill_backlog();
        let mut num_passed_over = 0;
        while *budget > 0 && self.running.len() < self.config.max_num_seqs {
            let Some(id) = self.waiting.candidate(num_passed_over) else { return };
            let hit = self.lookup(id);
            if self.is_being_computed(id, &hit) {
                num_passed_over += 1;
                if num_passed_over == MAX_PASSED_OVER {
                    return;
                }
                continue;
            }
            if !self.can_admit(id, &hit, reserved) || !self.has_turn(id, &hit, *budget) {
                return;
            }
            self.waiting.admit(num_passed_over);
            let place = self.place_of(id);
            self.admit(id, hit, place);
            let chunk = self.prefill_chunk(&self.sequences[id], *budget, !self.waiting.is_empty());
            self.claim(place, chunk, budget);
            let seq = &self.sequences[id];
            reserved += self.kv.pages_missing(seq, seq.tokens.len());
        }
    }

    /// Gives budget that nobody else took to the prefills in order, as far as pages are to be had.
    fn top_up_prefills(&mut self, budget: &mut usize) {
        for &id in &self.running {
            let seq = &mut self.sequences[id];
            let extra = seq.chunk(*budget);
            if seq.num_scheduled == 0 || extra == 0 {
                continue;
            }
            if self.kv.grow(seq, seq.num_computed + seq.num_scheduled + extra) {
                seq.num_scheduled += extra;
                *budget -= extra;
            }
        }
    }

    fn build_plan(&mut self) -> StepPlan {
        self.reported.append(&mut self.preempted);
        let scheduled = || self.running.iter().map(|&id| &self.sequences[id]).filter(|s| s.num_scheduled > 0);
        let decodes = scheduled().filter(|seq| seq.is_decoding());
        let prefills = scheduled().filter(|seq| !seq.is_decoding());
        let rows = decodes.chain(prefills).map(Sequence::row).collect();
        StepPlan { rows, preempted: self.reported.clone() }
    }

    /// Schedules `num_tokens` of the running sequence at `index`, with the pages that they need, which it
    /// takes from later ones if need be. Without enough even so, it sits the step out.
    fn claim(&mut self, index: usize, num_tokens: usize, budget: &mut usize) {
        loop {
            let seq = &mut self.sequences[self.running[index]];
            if self.kv.grow(seq, seq.num_computed + num_tokens) {
                seq.num_scheduled = num_tokens;
                *budget = budget.saturating_sub(num_tokens);
                return;
            }
            if index + 1 == self.running.len() {
                return;
            }
            let freed = self.preempt(self.running.len() - 1);
            *budget = (*budget + freed).min(self.config.max_num_batched_tokens);
        }
    }

    /// Preempts the running sequence at `index` and returns the tokens that it was scheduled for.
    pub(super) fn preempt(&mut self, index: usize) -> usize {
        let id = self.running.remove(index);
        let seq = &mut self.sequences[id];
        let num_scheduled = seq.num_scheduled;
        self.kv.release(seq);
        self.waiting.push_preempted(id);
        self.preempted.push(id);
        self.counters.preemptions += 1;
        num_scheduled
    }

    /// Tokens of a prefill that the next step runs. What has to run whole takes all of the budget if it needs to, and
    /// more than there is where no other prefill is in the step: it could never run else.
    fn prefill_chunk(&self, seq: &Sequence, budget: usize, others_behind: bool) -> usize {
        let chunk = seq.chunk(self.share(budget, others_behind));
        let whole = seq.num_runnable();
        if chunk == 0 && (whole <= budget || !self.is_prefilling()) { whole } else { chunk }
    }

    /// Whether a waiting sequence, with `hit`, could run anything now.
    fn has_turn(&self, id: SeqId, hit: &PrefixHit, budget: usize) -> bool {
        let Some(filter) = self.sequences[id].spec.demand.filter() else { return true };
        let whole = filter.whole();
        hit.num_tokens < whole.start || whole.end - hit.num_tokens <= budget || !self.is_prefilling()
    }

    /// Whether a prompt's tokens are in the step so far.
    fn is_prefilling(&self) -> bool {
        self.running
            .iter()
            .map(|&id| &self.sequences[id])
            .any(|seq| seq.num_scheduled > 0 && !seq.is_decoding())
    }

    /// Budget that one prefill may take.
    fn share(&self, budget: usize, others_behind: bool) -> usize {
        if others_behind { budget.div_ceil(2).max(self.config.block_size).min(budget) } else { budget }
    }

    /// Pages that running sequences lack to finish their prefill.
    fn prefill_backlog(&self) -> usize {
        let running = self.running.iter().map(|&id| &self.sequences[id]);
        running.map(|seq| self.kv.pages_missing(seq, seq.tokens.len())).sum()
    }

    fn lookup(&self, id: SeqId) -> PrefixHit {
        if self.config.prefix_caching { self.kv.lookup(&self.sequences[id]) } else { PrefixHit::default() }
    }

    /// Whether a running sequence is about to publish the first block that `hit` lacks.
    fn is_being_computed(&self, id: SeqId, hit: &PrefixHit) -> bool {
        let seq = &self.sequences[id];
        if !self.config.prefix_caching || !seq.reads_cache() {
            return false;
        }
        let Some(wanted) = self.kv.next_block(seq, hit) else { return false };
        let mut running = self.running.iter().map(|&id| &self.sequences[id]);
        running.any(|seq| self.kv.unpublished_block(seq).as_ref() == Some(&wanted))
    }

    /// Whether the known tokens of a waiting sequence fit without soon costing another one its pages.
    /// `reserved` pages are spoken for.
    fn can_admit(&self, id: SeqId, hit: &PrefixHit, reserved: usize) -> bool {
        if self.running.is_empty() {
            return true;
        }
        let seq = &self.sequences[id];
        let demand = &seq.spec.demand;
        let needed = self.kv.peak_of(demand, seq.tokens.len()) - self.kv.pages_of(demand, hit.num_tokens);
        let watermark = self.kv.num_pages() / 100 + demand.num_layers();
        needed + reserved + watermark <= self.kv.num_available() - hit.num_idle_pages
    }

    fn admit(&mut self, id: SeqId, hit: PrefixHit, place: usize) {
        let seq = &mut self.sequences[id];
        if seq.num_cached.is_none() {
            seq.num_cached = Some(hit.num_tokens);
            if self.config.prefix_caching && seq.reads_cache() {
                self.counters.prefix_query_tokens += seq.tokens.len() as u64;
                self.counters.prefix_hit_tokens += hit.num_tokens as u64;
            }
        }
        self.kv.adopt(seq, hit);
        self.running.insert(place, id);
    }
}
