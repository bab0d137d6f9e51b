//! Sequences that never end, beside honest ones. Time is what the steps cost, counted by the model.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use model_zoo::kv_cache::{KvCache, PageId};
use model_zoo::models::ModelDims;
use model_zoo::step::{LogitRows, StepBatch};
use model_zoo::tokenizer::toy::EOS;

use super::*;
use crate::verbosity::{Detector, VerbosityConfig, VerbosityMode};

/// A prompt that begins with this byte never ends; of others the second byte is the length of the answer.
const VERBOSE: u32 = b'!' as u32;
/// What a step costs beside its rows, in rows: reading the weights.
const STEP: u64 = 4;

/// A model whose outputs end when their prompts say so, or never; it counts what it costs.
struct Model {
    dims: ModelDims,
    /// By the first page of a sequence: its first two tokens, and the length of its prompt.
    sequences: HashMap<PageId, (u32, u32, usize)>,
    rows: Vec<(u32, u32, usize)>,
    logits: Vec<f32>,
    clock: Arc<AtomicU64>,
}

impl CausalLm for Model {
    fn dims(&self) -> &ModelDims {
        &self.dims
    }

    fn forward(&mut self, batch: &mut StepBatch<'_>, _: &mut KvCache) -> model_zoo::Result<()> {
        self.clock.fetch_add(STEP + batch.rows.len() as u64, Ordering::Relaxed);
        self.rows.clear();
        for row in &batch.rows {
            let page = row.block_tables[0][0];
            if row.first_pos == 0 {
                self.sequences.insert(page, (row.tokens[0], row.tokens[1], row.tokens.len()));
            }
            let (kind, length, prompt) = self.sequences[&page];
            let written = row.first_pos + row.tokens.len() - prompt;
            if row.logits == LogitRows::Last {
                self.rows.push((kind, length, written));
            }
        }
        Ok(())
    }

    /// Honest outputs know what they say, and end for certain; verbose ones might say anything, but the end.
    fn logits(&mut self, rows: Range<usize>) -> model_zoo::Result<&[f32]> {
        let vocab = self.dims.vocab_size;
        self.logits.clear();
        self.logits.resize(rows.len() * vocab, -20.0);
        for ((kind, length, written), logits) in self.rows[rows].iter().zip(self.logits.chunks_mut(vocab)) {
            if *kind == VERBOSE {
                logits[usize::from(b'a')..=usize::from(b'z')].fill(0.0);
            } else if written >= &(*length as usize - 1) {
                logits[EOS as usize] = 10.0;
            } else {
                logits[usize::from(b'a') + written % 26] = 10.0;
            }
        }
        Ok(&self.logits)
    }
}

struct Arena {
    bench: Bench,
    clock: Arc<AtomicU64>,
    open: Vec<(GenerateRequest, u64, EventReceiver)>,
    sent: u32,
}

/// A request that has ended: whose it was, its reason, its tokens, and what time it took.
struct Ended {
    client: Arc<str>,
    reason: FinishReason,
    tokens: usize,
    took: u64,
}

impl Arena {
    fn new(mode: VerbosityMode) -> Self {
        let clock = Arc::new(AtomicU64::new(0));
        let dims =
            ModelDims { vocab_size: EOS as usize + 1, ..ToyModel::new(ToyOptions::default()).dims().clone() };
        let (sequences, rows, logits) = Default::default();
        let model = Model { dims, sequences, rows, logits, clock: Arc::clone(&clock) };
        let config = SchedulerConfig { prefix_caching: false, num_pages: 1 << 16, ..ROOMY };
        let mut bench = Bench::of(&config, Box::new(model), Arc::new(Energy::off()));
        bench.engine.detector = Detector::new(VerbosityConfig { mode, min_tokens: 32, grace_tokens: 8 });
        Self { bench, clock, open: Vec::new(), sent: 0 }
    }

    fn now(&self) -> u64 {
        self.clock.load(Ordering::Relaxed)
    }

    fn send(&mut self, client: &str) {
        self.sent += 1;
        let is_verbose = client == "mallory";
        let first = if is_verbose { VERBOSE } else { u32::from(b'h') };
        let mut request = sampled("", |p| (p.temperature, p.seed) = (1.0, Some(self.sent.into())));
        request.prompt = [first, 8 + self.sent * 7 % 17, 0].into();
        request.id = format!("{}", self.sent);
        request.max_tokens = 2000;
        request.client = Some(client.into());
        let events = self.bench.submit(&request);
        self.open.push((request, self.now(), events));
    }

    /// Keeps so many requests of each client open until `count` of alice's have ended.
    fn run(&mut self, open: [(&str, usize); 2], count: usize) -> Vec<Ended> {
        let mut ended = Vec::new();
        let mut honest = 0;
        while honest < count {
            for (client, wanted) in open {
                let live =
                    |(request, ..): &&(GenerateRequest, _, _)| request.client.as_deref() == Some(client);
                let missing = wanted.saturating_sub(self.open.iter().filter(live).count());
                (0..missing).for_each(|_| self.send(client));
            }
            self.bench.engine.turn();
            let now = self.now();
            let mut still = Vec::new();
            for (request, since, mut events) in self.open.drain(..) {
                if self.bench.engine.choices.values().any(|choice| choice.live.request.id == request.id) {
                    still.push((request, since, events));
                    continue;
                }
                let mut tokens = 0;
                let mut reason = None;
                while let Some(event) = events.try_next() {
                    if let TokenEvent::Finished { reason: why, usage, .. } = event {
                        (reason, tokens) = (Some(why), usage.completion_tokens);
                    }
                }
                let client = request.client.clone().expect("a client");
                honest += usize::from(&*client == "alice");
                ended.push(Ended {
                    client,
                    reason: reason.expect("it has ended"),
                    tokens,
                    took: now - since,
                });
            }
            self.open = still;
        }
        ended
    }
}

fn p99(ended: &[Ended]) -> u64 {
    let mut times: Vec<_> = ended.iter().filter(|e| &*e.client == "alice").map(|e| e.took).collect();
    times.sort_unstable();
    times[times.len() * 99 / 100]
}

/// What 2,000 requests of alice's see without a flood, and with eight requests of mallory's open at all times.
fn flood(mode: VerbosityMode) -> (f64, Vec<Ended>) {
    let mut arena = Arena::new(mode);
    let quiet = arena.run([("alice", 4), ("mallory", 0)], 500);
    let flooded = arena.run([("alice", 4), ("mallory", 8)], 2000);
    (p99(&flooded) as f64 / p99(&quiet) as f64, flooded)
}

#[test]
fn a_flood_of_verbose_requests_is_bounded_and_leaves_the_others_their_time() {
    let (slower, ended) = flood(VerbosityMode::Act);
    let (honest, verbose): (Vec<_>, Vec<_>) = ended.iter().partition(|e| &*e.client == "alice");
    assert!(slower < 1.5, "p99 of the honest is {slower} times that without a flood");
    // min_tokens, a look, three times grace, and the token that is on its way.
    let longest = verbose.iter().map(|e| e.tokens).max().expect("some");
    assert!(verbose.len() > 20 && longest <= 32 + 8 + 24 + 1, "{} of up to {longest}", verbose.len());
    assert!(verbose.iter().all(|e| matches!(e.reason, FinishReason::Verbosity | FinishReason::Stop)));
    // Nobody else was touched: each output has the length that its prompt asks for.
    assert!(honest.iter().all(|e| e.reason == FinishReason::Stop && e.tokens <= 24));

    // Without the detector the same flood does what it came for.
    let (slower, ended) = flood(VerbosityMode::Off);
    assert!(slower > 1.8, "{slower}");
    let longest = ended.iter().map(|e| e.tokens).max().expect("some");
    assert_eq!(longest, 2000);
}

#[test]
fn a_model_that_never_ends_is_stopped_at_each_limit_and_its_pages_come_back() {
    let ends = |change: &dyn Fn(&mut GenerateRequest), mode| {
        let mut arena = Arena::new(mode);
        arena.run([("alice", 4), ("mallory", 0)], 40);
        arena.send("mallory");
        let (mut request, ..) = arena.open.pop().expect("sent");
        arena.bench.engine.turn();
        change(&mut request);
        let mut events = arena.bench.submit(&request);
        arena.bench.finish();
        received(&mut events)
    };
    let by_length = ends(&|_| {}, VerbosityMode::Report);
    assert_eq!((by_length.reason(), by_length.choices[0].tokens.len()), (Some(FinishReason::Length), 2000));
    let by_detector = ends(&|_| {}, VerbosityMode::Act);
    let reason = by_detector.reason();
    assert!(matches!(reason, Some(FinishReason::Verbosity | FinishReason::Stop)), "{reason:?}");
    assert!(by_detector.choices[0].tokens.len() <= 65);
    let long_ago = std::time::Instant::now();
    let by_deadline = ends(&|request| request.budget.deadline = Some(long_ago), VerbosityMode::Off);
    assert_eq!(by_deadline.reason(), Some(FinishReason::Deadline));
    // Up to its flag, an output is what it is without a detector.
    let common = 32;
    assert_eq!(by_detector.choices[0].tokens[..common], by_length.choices[0].tokens[..common]);
}
