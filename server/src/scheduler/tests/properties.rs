//! Random traces on tiny pools. [`Simulation`] checks every plan and every page on the way; here every
//! accepted sequence must end and every page come back.

use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;

use model_zoo::compression::options::{Think, Vision};
use model_zoo::compression::{CompressionOptions, Context, KvDemand, Offer, PlanKey, registry};
use model_zoo::vision::{EncodedImage, ImageEmbeddings, PromptImage};

use super::simulation::Simulation;
use crate::scheduler::{ImageSpan, SchedulerConfig, SeqId, SequenceSpec};

#[derive(Debug, Clone)]
enum Op {
    Add(Request),
    Step,
    /// A step that fails.
    Fail,
    /// Something happens between a plan and its commit.
    Interrupt(Box<Op>),
    /// Of the live sequence at this index.
    Abort(prop::sample::Index),
    Stop(prop::sample::Index),
    Resize(usize),
    Demote(prop::sample::Index),
    /// A sequence gets another key.
    Recompute(prop::sample::Index, u64),
}

#[derive(Debug, Clone)]
struct Request {
    /// Prompts begin with one of three texts, so that they share prefixes of any length.
    text: u64,
    text_len: usize,
    rest: Vec<u32>,
    max_tokens: usize,
    num_choices: u64,
    salt: u64,
    plan_key: u64,
    bypass: bool,
    /// Recent tokens where keys are pruned.
    pruned: Option<usize>,
    /// Where an image begins that is filtered, its tokens, and how many may be kept.
    filtered: Option<(usize, usize, Option<usize>)>,
}

fn request() -> impl Strategy<Value = Request> {
    let rare = || prop::bool::weighted(0.1);
    let pruned = || prop::option::weighted(0.3, 0..12usize);
    let filtered = (0..12usize, 1..12usize, prop::option::of(1..4usize));
    let filtered = prop::option::weighted(0.3, filtered);
    let flags = (rare(), rare(), rare(), pruned(), filtered);
    (0..3u64, 0..30usize, vec(0..2u32, 0..4), 0..12usize, 1..4u64, flags).prop_map(
        |(text, text_len, rest, max_tokens, num_choices, (salt, plan_key, bypass, pruned, filtered))| {
            Request {
                text,
                text_len,
                rest,
                max_tokens,
                num_choices,
                salt: salt.into(),
                plan_key: plan_key.into(),
                bypass,
                pruned,
                filtered,
            }
        },
    )
}

fn op() -> impl Strategy<Value = Op> {
    let index = any::<prop::sample::Index>;
    let between = prop_oneof![
        3 => index().prop_map(Op::Abort),
        1 => index().prop_map(Op::Demote),
        1 => request().prop_map(Op::Add),
        1 => (0..40usize).prop_map(Op::Resize),
        1 => (index(), 0..3u64).prop_map(|(index, key)| Op::Recompute(index, key)),
    ];
    prop_oneof![
        6 => request().prop_map(Op::Add),
        20 => Just(Op::Step),
        3 => Just(Op::Fail),
        4 => between.prop_map(|op| Op::Interrupt(Box::new(op))),
        2 => index().prop_map(Op::Abort),
        2 => index().prop_map(Op::Demote),
        3 => index().prop_map(Op::Stop),
        1 => (0..40usize).prop_map(Op::Resize),
        1 => (index(), 0..3u64).prop_map(|(index, key)| Op::Recompute(index, key)),
    ]
}

fn config() -> impl Strategy<Value = SchedulerConfig> {
    (1..24usize, 1..7usize, 1..6usize, 4..40usize, prop::bool::weighted(0.85)).prop_map(
        |(max_num_batched_tokens, max_num_seqs, block_size, num_pages, prefix_caching)| SchedulerConfig {
            max_num_batched_tokens,
            max_num_seqs,
            block_size,
            num_pages,
            prefix_caching,
        },
    )
}

struct Run {
    simulation: Simulation,
    num_layers: usize,
    next_id: u64,
    next_group: u64,
}

impl Run {
    fn apply(&mut self, op: &Op) {
        match op {
            Op::Add(request) => self.add(request),
            Op::Step => drop(self.simulation.step()),
            Op::Fail => {
                let plan = self.simulation.schedule();
                self.simulation.fail(&plan);
            }
            Op::Interrupt(op) => {
                let plan = self.simulation.schedule();
                self.simulation.forward(&plan);
                self.apply(op);
                self.simulation.commit(&plan);
            }
            Op::Abort(index) => {
                if let Some(id) = self.pick(index) {
                    self.simulation.abort(id);
                }
            }
            Op::Stop(index) => {
                let id = self.pick(index);
                self.simulation.finishing.extend(id);
            }
            Op::Demote(index) => {
                if let Some(id) = self.pick(index) {
                    self.simulation.demote(id);
                }
            }
            Op::Resize(num_pages) => drop(self.simulation.resize(*num_pages)),
            Op::Recompute(index, key) => {
                if let Some(id) = self.pick(index) {
                    self.simulation.recompute(id, PlanKey(*key));
                }
            }
        }
    }

    fn add(&mut self, request: &Request) {
        let mut prompt: Vec<u32> =
            (0..request.text_len as u64).map(|i| (text_bit(request.text, i)) as u32).collect();
        prompt.extend(&request.rest);
        self.next_group += 1;
        for choice in 0..request.num_choices {
            // Refusal (an empty prompt, a pool too small) is among what is tried.
            let added = self.simulation.add(SequenceSpec {
                id: SeqId(self.next_id),
                group: self.next_group,
                prompt: prompt.as_slice().into(),
                images: request.images(prompt.len()).iter().map(span).collect(),
                max_tokens: request.max_tokens,
                demand: demand(self.num_layers, prompt.len(), request),
                plan_key: PlanKey(request.plan_key),
                cache_salt: request.salt,
                bypass_prefix_cache: request.bypass && choice == 0,
            });
            self.next_id += u64::from(added.is_ok());
        }
    }

    fn pick(&self, index: &prop::sample::Index) -> Option<SeqId> {
        let live = self.simulation.live();
        if live.is_empty() { None } else { Some(*index.get(&live)) }
    }
}

impl Request {
    /// The image, if the prompt has room for it.
    fn images(&self, prompt_len: usize) -> Vec<PromptImage> {
        let Some((start, num_tokens, _)) = self.filtered else { return Vec::new() };
        let encoded = EncodedImage {
            rows: vec![0.0; num_tokens],
            places: None,
            salience: (0..num_tokens).map(|token| token as f32).collect(),
        };
        let embeddings = Arc::new(ImageEmbeddings::of((1, num_tokens), encoded, [num_tokens as u8; 32]));
        let fits = start + num_tokens <= prompt_len;
        fits.then_some(PromptImage { start, embeddings }).into_iter().collect()
    }
}

fn span(image: &PromptImage) -> ImageSpan {
    let num_tokens = image.embeddings.num_tokens();
    ImageSpan { start: image.start, num_tokens, digest: [num_tokens as u32; 8] }
}

fn demand(num_layers: usize, prompt_len: usize, request: &Request) -> KvDemand {
    let think = request.pruned.map(|recent| Think { ratio: Some(0.5), recent: Some(recent) });
    let vision =
        request.filtered.map(|(_, _, keep)| Vision { keep, layers: Some(vec![0]), ..Vision::default() });
    let think = think.filter(|_| vision.is_none());
    let options = CompressionOptions { think, vision, ..CompressionOptions::default() };
    let context = Context {
        num_layers,
        head_dim: 64,
        prompt_len,
        max_tokens: request.max_tokens,
        images: &request.images(prompt_len),
        offer: &Offer::default(),
    };
    registry::compile(&options, &context).expect("a valid plan").kv_demand()
}

/// Token `i` of an endless text that does not repeat.
fn text_bit(text: u64, i: u64) -> u64 {
    ((i + 1) * (i + 1) * 0x9e37 + text * 0x79b9 * (i + 3)) >> 5 & 1
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn pages_and_sequences_survive_any_order_of_events(
        config in config(),
        num_layers in 1..4usize,
        ops in vec(op(), 1..80),
    ) {
        let mut run = Run { simulation: Simulation::new(config), num_layers, next_id: 0, next_group: 0 };
        for op in &ops {
            run.apply(op);
        }
        let mut simulation = run.simulation;
        for id in simulation.live() {
            simulation.finishing.remove(&id);
        }
        let (num_live, num_finished) = (simulation.live().len(), simulation.num_finished);
        for _ in 0..20_000 {
            if !simulation.scheduler.has_work() {
                break;
            }
            simulation.step();
        }
        prop_assert_eq!(simulation.num_finished, num_finished + num_live, "every sequence ends");
        prop_assert_eq!(simulation.scheduler.stats().pages_used, 0, "every page comes back");
        prop_assert_eq!(simulation.resize(0), 0, "cached prefixes are evicted");
        simulation.resize(7);
        prop_assert_eq!(simulation.scheduler.stats().pages_free, 7);
    }
}
