//! What the engine keeps of a request and of each of its choices, and the one place that ends a choice.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use model_zoo::compression::RowState;
use model_zoo::kv_cache::KvLayout;
use model_zoo::models::Draw;
use model_zoo::tokenizer::Tokenizer;

use super::detokenizer::Detokenizer;
use super::energy::Spent;
use super::events::EventSender;
use super::sampler::Sampler;
use super::stop::{Released, StopMatcher};
use crate::energy::Energy;
use crate::request::{ChoiceUsage, FinishReason, GenerateRequest, Served, TokenEvent, TokenLogprob, Work};
use crate::scheduler::SeqId;
use crate::telemetry::{CompressionSample, Metrics, SequenceTimings};
use crate::verbosity::{Watch, signal};

/// A request that the engine runs.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) request: GenerateRequest,
    events: EventSender,
    arrived: Instant,
    /// What siblings of the choice that scores the prompt sent before the scores, which come first.
    held: Mutex<Option<Vec<TokenEvent>>>,
    /// Bits of the joules charged to all choices. Only the engine thread writes them.
    joules: AtomicU64,
}

impl Live {
    pub(super) fn new(request: GenerateRequest, events: EventSender) -> Self {
        let held = Mutex::new(request.prompt_logprobs.then(Vec::new));
        Self { request, events, arrived: Instant::now(), held, joules: AtomicU64::default() }
    }

    /// Joules charged so far, over all choices.
    pub(super) fn joules(&self) -> f64 {
        f64::from_bits(self.joules.load(Ordering::Relaxed))
    }

    /// A choice was charged `joules`.
    pub(super) fn spend(&self, joules: f64) {
        self.joules.store((self.joules() + joules).to_bits(), Ordering::Relaxed);
    }

    /// The client went away: nobody will read what the request produces.
    pub(super) fn is_cancelled(&self) -> bool {
        self.events.is_cancelled()
    }

    /// Hands an event to whoever answers the client.
    pub(super) fn send(&self, event: TokenEvent) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        match (&mut *held, &event) {
            (Some(waiting), TokenEvent::Delta { .. } | TokenEvent::Finished { .. }) => waiting.push(event),
            (_, TokenEvent::Failed(_)) => {
                *held = None;
                self.events.send(event);
            }
            _ => {
                let waiting = held.take().unwrap_or_default();
                for event in std::iter::once(event).chain(waiting) {
                    self.events.send(event);
                }
            }
        }
    }

    /// No scores will come: what waited for them goes out.
    fn release(&self) {
        let waiting = self.held.lock().unwrap_or_else(PoisonError::into_inner).take();
        for event in waiting.into_iter().flatten() {
            self.events.send(event);
        }
    }
}

/// One choice of a request.
#[derive(Debug)]
pub(super) struct Choice {
    pub(super) id: SeqId,
    pub(super) live: Arc<Live>,
    pub(super) index: usize,
    pub(super) state: RowState,
    /// Scores its prompt: the first choice of a request that asked for it, until it is sent.
    pub(super) prompt_logprobs: Option<Vec<Option<TokenLogprob>>>,
    sampler: Sampler,
    detokenizer: Detokenizer,
    stop: StopMatcher,
    ends: Arc<[u32]>,
    sampled: usize,
    /// Tokens run, again after a preemption included.
    tokens_run: u64,
    kv_layout: KvLayout,
    cached_tokens: usize,
    /// By which weights its tokens were made, where the weights are elastic; the last entry is under way.
    served: Vec<Served>,
    moved_down: usize,
    clock: Clock,
    pub(super) spent: Spent,
    pub(super) energy: Arc<Energy>,
    /// Looks for an end that does not come.
    pub(super) watch: Option<Box<Watch>>,
    /// It ends before its next step.
    stops_for: Option<FinishReason>,
    metrics: Arc<Metrics>,
    /// Why it ended, once it has: what [`Drop`] reports.
    outcome: FinishReason,
}

/// When things happened to a choice.
#[derive(Debug, Default)]
struct Clock {
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

/// Whether a choice goes on after a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    GoesOn(u32),
    Ended,
}

/// What every choice of a request shares.
#[derive(Debug, Clone)]
pub(super) struct Shared {
    pub(super) tokenizer: Arc<Tokenizer>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) energy: Arc<Energy>,
    pub(super) kv_layout: KvLayout,
}

impl Choice {
    pub(super) fn new(live: &Arc<Live>, (id, index): (SeqId, usize), shared: &Shared) -> Self {
        let request = &live.request;
        let sampling = &request.sampling;
        let model_ends: &[u32] = if sampling.ignore_eos { &[] } else { &shared.tokenizer.special().eos };
        let ends: Arc<[u32]> = model_ends.iter().chain(&sampling.stop_token_ids).copied().collect();
        Self {
            id,
            index,
            state: RowState::default(),
            prompt_logprobs: (request.prompt_logprobs && index == 0).then(Vec::new),
            sampler: Sampler::new(Arc::clone(sampling), index, &request.prompt, Arc::clone(&ends)),
            detokenizer: Detokenizer::new(Arc::clone(&shared.tokenizer), sampling.skip_special_tokens),
            stop: StopMatcher::new(sampling.stop.clone(), sampling.include_stop),
            ends,
            sampled: 0,
            tokens_run: 0,
            kv_layout: shared.kv_layout,
            cached_tokens: 0,
            served: Vec::new(),
            moved_down: 0,
            clock: Clock::default(),
            spent: Spent::default(),
            energy: Arc::clone(&shared.energy),
            watch: None,
            stops_for: None,
            metrics: Arc::clone(&shared.metrics),
            outcome: FinishReason::Abort,
            live: Arc::clone(live),
        }
    }

    /// The choice is in a step. The first time, `cached` of its prompt tokens came from the prefix cache.
    pub(super) fn runs(&mut self, cached: usize) {
        if self.clock.started.is_none() {
            self.clock.started = Some(Instant::now());
            if let Some(place) = &self.live.request.queued {
                place.leave();
            }
            self.cached_tokens = cached;
            let prompt = self.live.request.prompt.len();
            let queried = if self.prompt_logprobs.is_some() { 0 } else { prompt };
            self.metrics.sequence_started(prompt, queried, cached);
            if let Some(charge) = self.live.request.charge.as_ref().filter(|_| self.index == 0) {
                charge.add_tokens(prompt);
            }
        }
    }

    /// Whether it has sampled a token.
    pub(super) fn has_sampled(&self) -> bool {
        self.sampled > 0
    }

    /// The tokens that end it, with what the client adds to their logits.
    pub(super) fn ends(&self) -> Vec<(u32, f32)> {
        let bias = &self.live.request.sampling.logit_bias;
        self.ends.iter().map(|id| (*id, bias.get(id).copied().unwrap_or(0.0))).collect()
    }

    /// It ends before its next step, for `reason`.
    pub(super) fn stop_for(&mut self, reason: FinishReason) {
        self.stops_for = Some(reason);
    }

    /// Why it ends before its next step, if it does.
    pub(super) fn stops_for(&self) -> Option<FinishReason> {
        self.stops_for
    }

    /// Whether it ended by itself.
    pub(super) fn has_stopped(&self) -> bool {
        self.outcome == FinishReason::Stop
    }

    /// Adds `bias` to the logits of what ends it.
    pub(super) fn raise_end(&mut self, bias: f32) {
        self.sampler.raise_end(bias);
    }

    /// Whether the logits of what ends it are raised.
    pub(super) fn is_end_raised(&self) -> bool {
        self.sampler.is_end_raised()
    }

    /// A step ran `tokens` of it, and its plan has decided as `state` says.
    pub(super) fn ran(&mut self, tokens: usize, state: RowState) {
        self.tokens_run += tokens as u64;
        self.state = state;
    }

    /// It is served with `blocks` blocks of elastic weights, of `levels` levels on average, from now on: over the KV
    /// that it has where it `continues`, else computed from the start.
    pub(super) fn serve_with(&mut self, (blocks, levels): (usize, f32), continues: bool) {
        self.state.blocks = Some(blocks);
        if !continues {
            // What it has sampled so far is computed again as a prompt is.
            self.state.decode_from = Some(self.live.request.prompt.len() + self.sampled);
        }
        self.served = self.served();
        self.served.push(Served { blocks, levels, tokens: 0, continues });
    }

    /// It loses blocks to another budget.
    pub(super) fn move_down(&mut self, to: (usize, f32), continues: bool) {
        match self.clock.started {
            // What it was promised before it ran, it never had.
            None => self.served.clear(),
            Some(_) => self.moved_down += 1,
        }
        self.serve_with(to, continues);
    }

    /// The parts of its output, with the blocks by which each was made; parts without a token are left out.
    fn served(&self) -> Vec<Served> {
        let mut served = self.served.clone();
        let before: usize = served.iter().map(|part| part.tokens).sum();
        if let Some(last) = served.last_mut() {
            last.tokens = self.sampled - before;
        }
        served.retain(|part| part.tokens > 0);
        served
    }

    /// Tells the request's span, if it has one, how long the choice's stages took.
    fn trace(&self) {
        let Some(span) = &self.live.request.span else { return };
        let Clock { started, first_token, last_token } = self.clock;
        let ended = Instant::now();
        let stages = [
            ("queue", Some(self.live.arrived), started.or(Some(ended))),
            ("prefill", started, first_token),
            ("decode", first_token, last_token),
        ];
        for (name, from, to) in stages {
            if let (Some(from), Some(to)) = (from, to) {
                span.stage(name, (from, to), self.index);
            }
        }
        span.choice_ended(self.outcome, self.sampled, self.energy_use());
    }

    fn work(&self) -> Work {
        let request = &self.live.request;
        let [attention_layers, ffn_layers] = self.state.sublayers_run;
        // The last sampled token is never computed.
        let computed = request.prompt.len() + self.sampled.saturating_sub(1);
        let (plan, block_size) = (&request.plan, self.kv_layout.block_size);
        let num_layers = plan.num_layers();
        let slots = |layer| plan.kv_len(layer, computed, &self.state);
        let pages = match plan.filter() {
            Some(_) => (0..num_layers).map(|layer| slots(layer).div_ceil(block_size)).sum(),
            None => plan.kv_demand().num_pages(block_size, computed),
        };
        Work {
            attention_layers,
            ffn_layers,
            ffns_skipped: self.state.ffns_skipped,
            dense_layers: self.tokens_run * request.plan.num_layers() as u64,
            kv_bytes: (pages * self.kv_layout.page_bytes()) as u64,
            visual: plan.visual_use(&self.state),
        }
    }

    /// It lost its KV and will be computed again.
    pub(super) fn preempted(&mut self) {
        let pruning = &mut self.state.pruning;
        pruning.sealed = false;
        pruning.query_sums.clear();
        // The blocks that made a part of its KV may be gone: all of it is made by those that it has now.
        if let Some(&Served { blocks, levels, continues: true, .. }) = self.served.last() {
            self.serve_with((blocks, levels), false);
        }
        // Its plan's decisions stay: computed again, each token has to run what it ran at first.
        if let Some(scores) = &mut self.prompt_logprobs {
            scores.clear();
        }
    }

    /// Samples from `logits`, sends what became final, and says whether the choice goes on.
    ///
    /// # Errors
    /// The message for the client when the logits cannot be sampled from.
    pub(super) fn sample(&mut self, logits: &[f32]) -> Result<Progress, String> {
        if self.live.request.max_tokens == 0 {
            self.end(FinishReason::Length, None);
            return Ok(Progress::Ended);
        }
        if let Some(watch) = self.watch.as_deref_mut().filter(|watch| watch.wants_signal())
            && let Some(signal) = signal(logits, watch.ends())
        {
            watch.look(signal);
        }
        let token = self.sampler.sample(logits).map_err(|e| e.to_string())?;
        if let Some(watch) = &mut self.watch {
            watch.sampled(token.token);
        }
        self.sampled += 1;
        self.tick();
        Ok(self.advance(token))
    }

    /// How its next token is drawn, where the model's device may do it.
    pub(super) fn draw(&self, row: usize) -> Option<Draw> {
        let looks = self.watch.as_deref().is_some_and(|watch| watch.wants_signal());
        let is_free = self.live.request.max_tokens > 0 && self.prompt_logprobs.is_none() && !looks;
        is_free.then(|| self.sampler.draw(row)).flatten()
    }

    /// Goes on with a token that was drawn by [`Choice::draw`].
    ///
    /// # Errors
    /// As [`Choice::sample`].
    pub(super) fn accept(&mut self, token: u32) -> Result<Progress, String> {
        let token = self.sampler.accept(token).map_err(|e| e.to_string())?;
        if let Some(watch) = &mut self.watch {
            watch.sampled(token.token);
        }
        self.sampled += 1;
        self.tick();
        Ok(self.advance(token))
    }

    fn advance(&mut self, token: TokenLogprob) -> Progress {
        let id = token.token;
        let armed = self.sampled > self.live.request.sampling.min_tokens;
        if self.ends.contains(&id) && armed {
            let text = self.stop.finish() + &self.detokenizer.finish();
            self.delta(text, token);
            self.end(FinishReason::Stop, None);
            return Progress::Ended;
        }
        let last = self.sampled >= self.live.request.max_tokens;
        let mut text = self.detokenizer.push(id);
        if last {
            text += &self.detokenizer.finish();
        }
        match self.stop.push(&text, armed) {
            Released::Stopped { text, stop } => {
                self.delta(text, token);
                self.end(FinishReason::Stop, Some(stop));
                Progress::Ended
            }
            Released::Text(mut text) if last => {
                text += &self.stop.finish();
                self.delta(text, token);
                self.end(FinishReason::Length, None);
                Progress::Ended
            }
            Released::Text(text) => {
                self.delta(text, token);
                Progress::GoesOn(id)
            }
        }
    }

    fn tick(&mut self) {
        let now = Instant::now();
        match self.clock.last_token.replace(now) {
            Some(before) => self.metrics.inter_token(now - before),
            None => {
                self.clock.first_token = Some(now);
                self.metrics.first_token(now - self.live.arrived);
            }
        }
    }

    fn delta(&self, text: String, token: TokenLogprob) {
        self.live.send(TokenEvent::Delta { choice: self.index, text, tokens: vec![token] });
    }

    /// Sends the scores of the prompt, once every position has one.
    pub(super) fn send_prompt_scores(&mut self) {
        if let Some(logprobs) = self.prompt_logprobs.take() {
            self.live.send(TokenEvent::Prompt { logprobs });
        }
    }

    /// Sends the last event. Text still held back goes before it.
    pub(super) fn end(&mut self, reason: FinishReason, stop: Option<String>) {
        self.settle_energy();
        if reason.leaves_text_held() {
            self.live.release();
            let text = self.stop.finish() + &self.detokenizer.finish();
            if !text.is_empty() {
                self.live.send(TokenEvent::Delta { choice: self.index, text, tokens: Vec::new() });
            }
        }
        self.outcome = reason;
        let usage = ChoiceUsage {
            prompt_tokens: self.live.request.prompt.len(),
            cached_tokens: self.cached_tokens,
            completion_tokens: self.sampled,
            work: self.work(),
            served: self.served(),
            moved_down: self.moved_down,
            energy: self.energy_use(),
        };
        self.live.send(TokenEvent::Finished { choice: self.index, reason, stop, usage });
    }

    /// Marks it as failed; the request's failure is sent by the engine.
    pub(super) fn fail(&mut self) {
        self.outcome = FinishReason::Error;
    }
}

impl Drop for Choice {
    /// Counts the choice, however it ended.
    fn drop(&mut self) {
        self.settle_energy();
        let Clock { started, first_token, last_token } = self.clock;
        let request = &self.live.request;
        if let Some(charge) = &request.charge {
            charge.add_tokens(self.sampled);
            charge.add_joules(self.spent.known());
        }
        if started.is_some() && self.energy.source().is_some() {
            self.metrics.sequence_energy(&request.profile, self.spent.total(), self.sampled);
        }
        self.trace();
        self.metrics.sequence_finished(&SequenceTimings {
            queue: started.map(|at| at - self.live.arrived),
            prefill: started.zip(first_token).map(|(from, to)| to - from),
            decode: first_token.zip(last_token).map(|(from, to)| to - from),
            total: self.live.arrived.elapsed(),
            prompt_tokens: request.prompt.len(),
            completion_tokens: self.sampled,
            max_tokens: request.max_tokens,
            n: request.n,
            reason: self.outcome,
        });
        let work = self.work();
        let dropped = self.tokens_run * request.plan.num_dropped() as u64;
        let run = work.attention_layers + work.ffn_layers;
        self.metrics.compression(&CompressionSample {
            methods: request.plan.options().methods(),
            sublayers_run: [work.attention_layers, work.ffn_layers],
            dropped,
            ffns_skipped: work.ffns_skipped,
            too_deep: (2 * work.dense_layers)
                .saturating_sub(run + dropped + work.ffns_skipped + self.state.visual_left_out),
            visual_left_out: self.state.visual_left_out,
        });
        if let Some(visual) = work.visual.filter(|_| started.is_some()) {
            self.metrics.images.prompt(request.plan.options().vision.as_ref(), visual);
        }
    }
}
