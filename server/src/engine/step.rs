//! One step: schedule → batch → forward → sample → commit. A failed step commits nothing.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use model_zoo::compression::{Plan, RowState, think};
use model_zoo::step::{LogitRows, StepBatch, StepRow};
use model_zoo::vision::PromptImage;

use super::run::Engine;
use super::sampler::logprob_of;
use super::sequence::{Choice, Progress};
use crate::error::{Error, ErrorKind};
use crate::request::TokenEvent;
use crate::scheduler::{RowOutcome, ScheduledSeq, SeqId, StepPlan};
use crate::telemetry::StepSample;

/// Logit rows asked for at once: bounds the model's scratch memory.
const LOGIT_TILE: usize = 16;

/// A row of the step with what its batch row borrows.
pub(super) struct Prepared {
    pub(super) scheduled: ScheduledSeq,
    plan: std::sync::Arc<Plan>,
    images: std::sync::Arc<[PromptImage]>,
    logits: LogitRows,
    pub(super) state: RowState,
}

impl Prepared {
    /// Rows of logits that it asks for.
    pub(super) fn num_logit_rows(&self) -> usize {
        match self.logits {
            LogitRows::None => 0,
            LogitRows::Last => 1,
            LogitRows::All => self.scheduled.num_tokens,
        }
    }
}

impl Engine {
    /// Runs one step of whatever the scheduler chose.
    pub(super) fn step(&mut self) {
        let begin = Instant::now();
        self.move_storage();
        let plan = self.scheduler.schedule();
        self.seal();
        self.note_preempted(&plan);
        let scheduled = Instant::now();
        let mut rows = self.prepare(&plan);
        let ran = self.forward(&mut rows);
        let forwarded = Instant::now();
        if let Err(message) = ran {
            return self.isolate(rows, &message);
        }
        self.note_dropped(&rows);
        self.meter(&rows);
        for row in &mut rows {
            if let Some(choice) = self.choices.get_mut(&row.scheduled.id) {
                choice.ran(row.scheduled.num_tokens, std::mem::take(&mut row.state));
            }
        }
        let outcomes = self.sample(&rows);
        let sampled_at = Instant::now();
        let sampled = outcomes.values().filter(|o| !matches!(o, RowOutcome::Prefilled)).count();
        self.commit(&plan, outcomes);
        self.judge(&rows);
        self.shared.metrics.step(&StepSample {
            tokens: plan.rows.iter().map(|row| row.num_tokens).sum(),
            sampled,
            phases: [scheduled - begin, forwarded - scheduled, sampled_at - forwarded, sampled_at.elapsed()],
        });
    }

    /// Packs the prompts that the scheduler has found pages for. A sequence whose pages could not be moved has lost them.
    fn seal(&mut self) {
        for (id, moves) in self.scheduler.drain_seals() {
            let Some(choice) = self.choices.get_mut(&id) else { continue };
            let Some(pruning) = choice.live.request.plan.pruning() else { continue };
            let sealed = think::seal(&mut self.kv, &moves, (pruning, &mut choice.state.pruning));
            if let Err(error) = sealed {
                self.fail(id, &error.to_string());
            }
        }
    }

    /// Tells the scheduler what filters of image tokens have left of the prompts that were computed.
    fn note_dropped(&mut self, rows: &[Prepared]) {
        for Prepared { scheduled, plan, state, .. } in rows {
            let end = scheduled.first_pos + scheduled.num_tokens;
            let is_computed = plan.filter().is_some_and(|filter| filter.prompt_len == end);
            if let Some(outcome) = state.visual.as_ref().filter(|_| is_computed) {
                self.scheduler.drop_slots(scheduled.id, &outcome.dropped);
            }
        }
    }

    fn note_preempted(&mut self, plan: &StepPlan) {
        self.shared.metrics.preempted(plan.preempted.len());
        for id in &plan.preempted {
            if let Some(choice) = self.choices.get_mut(id) {
                choice.preempted();
            }
        }
    }

    fn prepare(&mut self, plan: &StepPlan) -> Vec<Prepared> {
        let mut rows = Vec::with_capacity(plan.rows.len());
        for scheduled in &plan.rows {
            let Some(choice) = self.choices.get_mut(&scheduled.id) else { continue };
            choice.runs(self.scheduler.num_cached_tokens(scheduled.id).unwrap_or(0));
            let logits = if choice.prompt_logprobs.is_some() {
                LogitRows::All
            } else if scheduled.samples {
                LogitRows::Last
            } else {
                LogitRows::None
            };
            let request = &choice.live.request;
            rows.push(Prepared {
                scheduled: scheduled.clone(),
                plan: std::sync::Arc::clone(&request.plan),
                images: std::sync::Arc::clone(&request.images),
                logits,
                state: choice.state.clone(),
            });
        }
        rows
    }

    /// Runs the model over `rows`.
    ///
    /// # Errors
    /// What went wrong, for the log.
    fn forward(&mut self, rows: &mut [Prepared]) -> Result<(), String> {
        let mut batch = StepBatch::default();
        for row in rows {
            let ScheduledSeq { id, first_pos, num_tokens, .. } = row.scheduled;
            let (Some(tokens), Some(kv_len), Some(block_tables)) =
                (self.scheduler.tokens(id), self.scheduler.kv_len(id), self.scheduler.block_tables(id))
            else {
                return Err(format!("sequence {} is scheduled but unknown", id.0));
            };
            batch.rows.push(StepRow {
                tokens: &tokens[first_pos..first_pos + num_tokens],
                first_pos,
                images: &row.images,
                kv_len,
                block_tables,
                logits: row.logits,
                plan: &row.plan,
                state: &mut row.state,
            });
        }
        let (model, kv) = (&mut self.model, &mut self.kv);
        // A step's KV is committed only when it succeeds, so that a model that panicked half way leaves
        // nothing that is read again.
        match catch_unwind(AssertUnwindSafe(|| model.forward(&mut batch, kv))) {
            Ok(result) => result.map_err(|e| e.to_string()),
            Err(_) => Err("the model panicked".to_owned()),
        }
    }

    /// Finds the rows that made a step fail, by running each alone, and fails their requests. If every row
    /// runs alone, the batch as such fails, and all of it has to go: else it would be tried for ever.
    fn isolate(&mut self, rows: Vec<Prepared>, message: &str) {
        tracing::error!(message, rows = rows.len(), "a step failed");
        let ids: Vec<SeqId> = rows.iter().map(|row| row.scheduled.id).collect();
        let mut bad: Vec<(SeqId, String)> = Vec::new();
        if rows.len() > 1 {
            for mut row in rows {
                let id = row.scheduled.id;
                if let Some(choice) = self.choices.get(&id) {
                    row.state = choice.state.clone();
                }
                if let Err(message) = self.forward(std::slice::from_mut(&mut row)) {
                    bad.push((id, message));
                }
            }
        }
        if bad.is_empty() {
            bad = ids.into_iter().map(|id| (id, message.to_owned())).collect();
        }
        for (id, message) in bad {
            self.fail(id, &message);
        }
    }

    /// Ends the whole request of a choice that failed; its siblings have the same prompt and parameters.
    fn fail(&mut self, id: SeqId, message: &str) {
        let Some(live) = self.choices.get(&id).map(|choice| std::sync::Arc::clone(&choice.live)) else {
            return;
        };
        let error = Error::new(ErrorKind::Internal, format!("the request could not be computed: {message}"));
        live.send(TokenEvent::Failed(error));
        let siblings: Vec<_> = self
            .choices
            .iter_mut()
            .filter(|(_, choice)| std::sync::Arc::ptr_eq(&choice.live, &live))
            .map(|(id, choice)| {
                choice.fail();
                *id
            })
            .collect();
        siblings.into_iter().for_each(|id| self.remove(id));
    }

    /// Reads the step's logits in tiles, scores prompts and samples; rows that fail are left out.
    fn sample(&mut self, rows: &[Prepared]) -> HashMap<SeqId, RowOutcome> {
        // (row, token of its chunk) of every logit row, in order.
        let mut wanted = Vec::new();
        for (index, row) in rows.iter().enumerate() {
            match row.logits {
                LogitRows::None => {}
                LogitRows::Last => wanted.push((index, row.scheduled.num_tokens - 1)),
                LogitRows::All => wanted.extend((0..row.scheduled.num_tokens).map(|i| (index, i))),
            }
        }
        let mut outcomes: HashMap<_, _> =
            rows.iter().map(|row| (row.scheduled.id, RowOutcome::Prefilled)).collect();
        let mut failed = Vec::new();
        let drawn = self.draw(rows, &wanted, (&mut outcomes, &mut failed));
        let vocab = self.model.dims().vocab_size;
        for start in (0..wanted.len()).step_by(LOGIT_TILE) {
            let tile = &wanted[start..(start + LOGIT_TILE).min(wanted.len())];
            if drawn[start..start + tile.len()].iter().all(|&drawn| drawn) {
                continue;
            }
            let logits = match self.model.logits(start..start + tile.len()) {
                Ok(logits) => logits,
                Err(error) => {
                    failed.extend(tile.iter().map(|(row, _)| (rows[*row].scheduled.id, error.to_string())));
                    continue;
                }
            };
            let own = tile.iter().zip(&drawn[start..]).zip(logits.chunks_exact(vocab));
            for ((&(row, token), _), logits) in own.filter(|((_, drawn), _)| !**drawn) {
                let scheduled = &rows[row].scheduled;
                let Some(choice) = self.choices.get_mut(&scheduled.id) else { continue };
                match take_logits(choice, scheduled, token, logits) {
                    Ok(Some(outcome)) => _ = outcomes.insert(scheduled.id, outcome),
                    Ok(None) => {}
                    Err(message) => failed.push((scheduled.id, message)),
                }
            }
        }
        for (id, message) in failed {
            outcomes.remove(&id);
            self.fail(id, &message);
        }
        outcomes
    }

    /// Lets the model's device draw the tokens that it can; returns for each of the `wanted` logit rows whether that is
    /// done. A device that fails leaves all of them to the logits, and so to their errors.
    fn draw(
        &mut self,
        rows: &[Prepared],
        wanted: &[(usize, usize)],
        (outcomes, failed): (&mut HashMap<SeqId, RowOutcome>, &mut Vec<(SeqId, String)>),
    ) -> Vec<bool> {
        let mut drawn = vec![false; wanted.len()];
        if !self.model.is_on_gpu() {
            return drawn;
        }
        let samples = |&(_, &(row, token)): &(usize, &(usize, usize))| {
            rows[row].scheduled.samples && token + 1 == rows[row].scheduled.num_tokens
        };
        let of = |(at, &(row, _)): (usize, &(usize, usize))| {
            let id = rows[row].scheduled.id;
            Some((id, self.choices.get(&id)?.draw(at)?))
        };
        let (ids, draws): (Vec<_>, Vec<_>) = wanted.iter().enumerate().filter(samples).filter_map(of).unzip();
        let Ok(Some(tokens)) = self.model.choose(&draws) else { return drawn };
        for ((id, draw), token) in ids.into_iter().zip(draws).zip(tokens) {
            let Some(choice) = self.choices.get_mut(&id) else { continue };
            drawn[draw.row] = true;
            match choice.accept(token) {
                Ok(Progress::GoesOn(token)) => _ = outcomes.insert(id, RowOutcome::Sampled(token)),
                Ok(Progress::Ended) => _ = outcomes.insert(id, RowOutcome::Finished),
                Err(message) => failed.push((id, message)),
            }
        }
        drawn
    }

    /// Tells the scheduler what came of the step; rows that failed are unknown to it by now.
    fn commit(&mut self, plan: &StepPlan, outcomes: HashMap<SeqId, RowOutcome>) {
        let in_order: Vec<_> = plan
            .rows
            .iter()
            .map(|row| outcomes.get(&row.id).cloned().unwrap_or(RowOutcome::Prefilled))
            .collect();
        self.scheduler.commit(plan, &in_order);
        for (id, outcome) in outcomes {
            if outcome == RowOutcome::Finished
                && let Some(choice) = self.choices.remove(&id)
            {
                self.learn(&choice);
            }
        }
    }
}

/// One token's logits: the score of the prompt token after it, or the choice's next token.
fn take_logits(
    choice: &mut Choice,
    scheduled: &ScheduledSeq,
    token: usize,
    logits: &[f32],
) -> Result<Option<RowOutcome>, String> {
    let position = scheduled.first_pos + token;
    let request = std::sync::Arc::clone(&choice.live);
    let prompt = &request.request.prompt;
    if let Some(scores) = &mut choice.prompt_logprobs {
        if scores.is_empty() {
            scores.push(None);
        }
        if let Some(&next) = prompt.get(position + 1) {
            let top = request.request.sampling.logprobs.unwrap_or(0) as usize;
            scores.push(Some(logprob_of(logits, next, top).map_err(|e| e.to_string())?));
        }
        if position + 1 == prompt.len() {
            choice.send_prompt_scores();
        }
    }
    if !scheduled.samples || token + 1 != scheduled.num_tokens {
        return Ok(None);
    }
    Ok(Some(match choice.sample(logits)? {
        Progress::GoesOn(token) => RowOutcome::Sampled(token),
        Progress::Ended => RowOutcome::Finished,
    }))
}
