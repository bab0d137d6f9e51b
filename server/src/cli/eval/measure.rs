//! All measurements of all plans.

use indexmap::IndexMap;
use model_zoo::calibrate::Progress;
use model_zoo::compression::{CompressionOptions, Context, Offer, Plan, registry};
use model_zoo::eval::probes::{Question, needles, short_questions};
use model_zoo::eval::speed::{Load, decode};
use model_zoo::eval::{Runner, Score, Windows, score};
use model_zoo::models::{CausalLm, ModelDims};
use model_zoo::tokenizer::Tokenizer;
use model_zoo::{Result, ZooError};
use serde::Serialize;

const WINDOW: usize = 1024;
const PROMPT: usize = 512;
/// Words of a needle's text: about 1.3 tokens each.
const NEEDLE_WORDS: usize = 700;
const DEPTHS: [f64; 10] = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9];
const ANSWER_TOKENS: usize = 8;
const BATCHES: [usize; 2] = [1, 8];
const TIMED_PROMPT: usize = 128;
const TIMED_TOKENS: usize = 64;
const BLOCK_SIZE: usize = 16;

/// What is measured.
pub(super) struct Subject<'a> {
    pub(super) dims: ModelDims,
    pub(super) offer: &'a Offer,
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) text: &'a str,
}

/// How much is measured.
pub(super) struct Settings {
    pub(super) windows: usize,
    pub(super) rounds: usize,
}

/// One plan's figures.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Row {
    pub(super) name: String,
    /// With every default filled in, for the scored windows.
    pub(super) plan: CompressionOptions,
    pub(super) perplexity: f64,
    /// Over dense, as a share.
    pub(super) perplexity_increase: f64,
    pub(super) agreement: f64,
    pub(super) kl_nats: f64,
    pub(super) short_answers: f64,
    pub(super) needles: f64,
    /// Work in the layers as a share of dense, by closed form from the counters.
    pub(super) layer_work: f64,
    /// KV at the end of a scored window.
    pub(super) kv_bytes: usize,
    pub(super) decode: Vec<Decode>,
}

/// Decode speed of one batch size.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Decode {
    pub(super) batch: usize,
    /// Median over rounds.
    pub(super) tokens_per_second: f64,
    /// Median over rounds of dense's time ÷ this plan's in the same round.
    pub(super) speedup: f64,
}

/// Measures `plans`, of which the first is dense.
pub(super) fn all(
    model: &mut dyn CausalLm,
    subject: &Subject<'_>,
    (options, settings): (&IndexMap<String, CompressionOptions>, &Settings),
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<Row>> {
    let tokens = subject.tokenizer.encode(subject.text, false)?;
    if tokens.len() < WINDOW {
        return Err(ZooError::Step(format!("the text has {} tokens; {WINDOW} are needed", tokens.len())));
    }
    let bos = subject.tokenizer.special().bos;
    let windows = Windows { tokens: &tokens, len: WINDOW, prompt: PROMPT, max: settings.windows, bos };
    let plans = options
        .values()
        .map(|options| subject.compile(options, PROMPT, WINDOW - PROMPT))
        .collect::<Result<Vec<_>>>()?;
    let mut runner = Runner::new(model, *BATCHES.last().unwrap_or(&1), WINDOW + ANSWER_TOKENS + 512)?;
    let scores = score(&mut runner, &windows, &plans, |done, total| {
        progress(Progress { stage: "perplexity", done, total })
    })?;
    let questions = [short_questions(), needles(subject.text, NEEDLE_WORDS, &DEPTHS)];
    let mut answered = Vec::new();
    for (index, options) in options.values().enumerate() {
        answered.push([
            subject.answered(&mut runner, options, &questions[0])?,
            subject.answered(&mut runner, options, &questions[1])?,
        ]);
        progress(Progress { stage: "probes", done: index + 1, total: plans.len() });
    }
    let mut rows = Vec::new();
    let dense = scores[0].perplexity();
    for (((name, plan), score), answered) in options.keys().zip(&plans).zip(&scores).zip(answered) {
        rows.push(subject.row((name, plan), (score, dense), answered));
    }
    time(&mut runner, subject, (options, settings), (&tokens, &mut rows), progress)?;
    Ok(rows)
}

impl Subject<'_> {
    fn compile(&self, options: &CompressionOptions, prompt_len: usize, max_tokens: usize) -> Result<Plan> {
        let context = Context {
            num_layers: self.dims.num_layers,
            head_dim: self.dims.head_dim,
            prompt_len,
            max_tokens,
            images: &[],
            offer: self.offer,
        };
        registry::compile(options, &context)
    }

    /// Share of the questions that the plan answers.
    fn answered(
        &self,
        runner: &mut Runner<'_>,
        options: &CompressionOptions,
        questions: &[Question],
    ) -> Result<f64> {
        let mut right = 0usize;
        for question in questions {
            let prompt = self.tokenizer.encode(&question.prompt, true)?;
            let plan = self.compile(options, prompt.len(), ANSWER_TOKENS)?;
            let tokens = runner.generate(&plan, &prompt, (ANSWER_TOKENS, &self.tokenizer.special().eos))?;
            let text = self.tokenizer.decode(&tokens, true)?;
            right += usize::from(question.is_answered_by(&text));
        }
        Ok(right as f64 / questions.len() as f64)
    }

    fn row(&self, (name, plan): (&str, &Plan), (score, dense): (&Score, f64), answered: [f64; 2]) -> Row {
        let pages = plan.kv_demand().num_pages(BLOCK_SIZE, WINDOW);
        Row {
            name: name.to_owned(),
            plan: plan.options().clone(),
            perplexity: score.perplexity(),
            perplexity_increase: score.perplexity() / dense - 1.0,
            agreement: score.agreement(),
            kl_nats: score.mean_kl(),
            short_answers: answered[0],
            needles: answered[1],
            layer_work: score.cost(self.dims.sublayer_weights),
            kv_bytes: pages * self.dims.kv_layout(BLOCK_SIZE).page_bytes(),
            decode: Vec::new(),
        }
    }
}

/// Times decoding of every plan in every batch size.
fn time(
    runner: &mut Runner<'_>,
    subject: &Subject<'_>,
    (options, settings): (&IndexMap<String, CompressionOptions>, &Settings),
    (tokens, rows): (&[u32], &mut [Row]),
    progress: &mut dyn FnMut(Progress),
) -> Result<()> {
    let prompt = &tokens[..TIMED_PROMPT];
    let plans = options
        .values()
        .map(|options| subject.compile(options, prompt.len(), TIMED_TOKENS))
        .collect::<Result<Vec<_>>>()?;
    for (batch, stage) in BATCHES.into_iter().zip(["decode 1", "decode 8"]) {
        let load = Load { prompt, tokens: TIMED_TOKENS, rounds: settings.rounds };
        let batches: Vec<_> = plans.iter().map(|plan| vec![plan.clone(); batch]).collect();
        let timings =
            decode(runner, (&batches, load), |done, total| progress(Progress { stage, done, total }))?;
        for (row, own) in rows.iter_mut().zip(&timings) {
            let speedups = timings[0].iter().zip(own).map(|(dense, own)| dense.seconds / own.seconds);
            row.decode.push(Decode {
                batch,
                tokens_per_second: (batch * TIMED_TOKENS) as f64
                    / median(own.iter().map(|timing| timing.seconds).collect()),
                speedup: median(speedups.collect()),
            });
        }
    }
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
