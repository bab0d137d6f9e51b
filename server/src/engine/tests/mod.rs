//! The engine over the toy model, whose text shows every mistake of paging, prefix sharing and
//! preemption. Most tests turn the engine by hand, without its thread: nothing depends on time.

mod batching;
mod cancel;
mod energy;
mod failures;
mod images;
mod memory;
mod verbosity;
mod vision;

use std::sync::Arc;

use model_zoo::compression::Plan;
use model_zoo::models::CausalLm;
use model_zoo::models::toy::{ToyModel, ToyOptions};
use model_zoo::tokenizer::Tokenizer;

use super::Command;
use super::events::{self, EventReceiver};
use super::run::Engine;
use super::sequence::Shared;
use crate::energy::Energy;
use crate::error::Error;
use crate::memory::MemoryTargets;
use crate::request::{Budget, FinishReason, GenerateRequest, SamplingParams, TokenEvent, TokenLogprob};
use crate::scheduler::SchedulerConfig;
use crate::telemetry::{Metrics, MetricsCompat, ServedModel};

/// Room for everything.
const ROOMY: SchedulerConfig = SchedulerConfig {
    max_num_batched_tokens: 512,
    max_num_seqs: 64,
    block_size: 4,
    num_pages: 1 << 14,
    prefix_caching: true,
};

/// What a choice sent.
#[derive(Debug, Clone, Default, PartialEq)]
struct Output {
    text: String,
    tokens: Vec<TokenLogprob>,
    end: Option<(FinishReason, Option<String>)>,
}

/// What a request sent.
#[derive(Debug, Default, PartialEq)]
struct Received {
    prompt: Option<Vec<Option<TokenLogprob>>>,
    choices: Vec<Output>,
    failed: Option<Error>,
}

impl Received {
    fn reason(&self) -> Option<FinishReason> {
        self.choices.first()?.end.as_ref().map(|(reason, _)| *reason)
    }

    fn open(&mut self, choice: usize) -> &mut Output {
        self.choices.resize(self.choices.len().max(choice + 1), Output::default());
        assert_eq!(self.choices[choice].end, None, "nothing follows a choice's end");
        &mut self.choices[choice]
    }

    fn add(&mut self, event: TokenEvent) {
        assert_eq!(self.failed, None, "nothing follows a failure");
        match event {
            TokenEvent::Prompt { logprobs } => {
                assert!(self.prompt.is_none() && self.choices.is_empty(), "the prompt comes first, once");
                self.prompt = Some(logprobs);
            }
            TokenEvent::Delta { choice, text, tokens } => {
                let output = self.open(choice);
                output.text += &text;
                output.tokens.extend(tokens);
            }
            TokenEvent::Finished { choice, reason, stop, usage } => {
                let output = self.open(choice);
                assert_eq!(usage.completion_tokens, output.tokens.len());
                output.end = Some((reason, stop));
            }
            TokenEvent::Failed(error) => self.failed = Some(error),
        }
    }
}

/// An engine that is turned by hand.
struct Bench {
    engine: Engine,
    metrics: Arc<Metrics>,
}

impl Bench {
    fn new(config: &SchedulerConfig, toy: ToyOptions) -> Self {
        Self::metered(config, toy, Arc::new(Energy::off()))
    }

    /// One whose energy is metered.
    fn metered(config: &SchedulerConfig, toy: ToyOptions, energy: Arc<Energy>) -> Self {
        Self::of(config, Box::new(ToyModel::new(toy)), energy)
    }

    /// One over another model.
    fn over(config: &SchedulerConfig, model: Box<dyn CausalLm>) -> Self {
        Self::of(config, model, Arc::new(Energy::off()))
    }

    fn of(config: &SchedulerConfig, model: Box<dyn CausalLm>, energy: Arc<Energy>) -> Self {
        let metrics = Arc::new(Metrics::new(&ServedModel::default(), MetricsCompat::None));
        let shared = Shared {
            tokenizer: Arc::new(Tokenizer::toy()),
            metrics: Arc::clone(&metrics),
            energy,
            kv_layout: model.dims().kv_layout(config.block_size),
        };
        let engine =
            Engine::new(model, (config, MemoryTargets::default()), shared).expect("memory for the pool");
        Self { engine, metrics }
    }

    fn submit(&mut self, request: &GenerateRequest) -> EventReceiver {
        let (events, receiver) = events::channel();
        self.engine.take(Command::Generate { request: request.clone(), events });
        receiver
    }

    /// Turns the engine until nothing is left to do.
    fn finish(&mut self) {
        while self.engine.scheduler.has_work() {
            self.engine.turn();
        }
        assert_eq!(self.pages_used(), 0);
        assert!(self.engine.choices.is_empty());
    }

    fn pages_used(&self) -> usize {
        self.engine.scheduler.stats().pages_used
    }

    fn num_preemptions(&self) -> u64 {
        self.engine.scheduler.stats().preemptions
    }
}

/// Everything that has come so far.
fn received(events: &mut EventReceiver) -> Received {
    let mut all = Received::default();
    while let Some(event) = events.try_next() {
        all.add(event);
    }
    all
}

/// What a request sends when it runs alone.
fn solo(request: &GenerateRequest) -> Received {
    let mut bench = Bench::new(&ROOMY, ToyOptions::default());
    let mut events = bench.submit(request);
    bench.finish();
    received(&mut events)
}

/// A greedy request for 24 tokens.
fn request(prompt: &str) -> GenerateRequest {
    GenerateRequest {
        id: prompt.to_owned(),
        prompt: prompt.bytes().map(u32::from).collect(),
        images: Arc::default(),
        sampling: Arc::new(SamplingParams { temperature: 0.0, seed: Some(7), ..SamplingParams::default() }),
        max_tokens: 24,
        n: 1,
        prompt_logprobs: false,
        plan: Arc::new(Plan::dense(2)),
        profile: "dense".into(),
        image_joules: Some(0.0),
        cache_salt: 0,
        budget: Budget::default(),
        is_chat: false,
        client: None,
        charge: None,
        queued: None,
        span: None,
    }
}

/// `request` with its sampling parameters changed.
fn sampled(prompt: &str, change: impl FnOnce(&mut SamplingParams)) -> GenerateRequest {
    let mut request = request(prompt);
    change(Arc::make_mut(&mut request.sampling));
    request
}
