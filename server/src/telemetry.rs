//! All metrics: the one file that names them, with their units and meaning.
//!
//! Every metric has a `rheostat_` name; with [`MetricsCompat::Vllm`] the core ones are repeated under
//! vLLM's names, types, labels and buckets, so that routers, autoscalers and dashboards made for vLLM
//! work unchanged. (`promtool check metrics` finds nothing in our names; in vLLM's it objects to the colon and to
//! the histogram that is called a total.)
//!
//! [`Metrics`] is made once a server and passed down; there is no global recorder.

mod energy;
mod governor;
pub mod images;
mod instruments;
mod keys;
pub mod logs;
mod memory;
mod recent;
mod responses;
mod samples;
#[cfg(test)]
mod tests;
mod verbosity;

use std::time::Duration;

pub use energy::EnergyMetrics;
use images::ImageMetrics;
use instruments::{Definition, Instruments, Paired};
pub use keys::{KeyLimit, KeyMetrics};
use metrics::{Counter, Gauge, Histogram, Label, Unit};
use model_zoo::compression::options::METHODS;
pub use recent::Load;
use recent::Recent;
pub use samples::{
    CompressionSample, MemoryGauges, SchedulerGauges, SequenceTimings, ServedModel, StepPhase, StepSample,
};

use crate::request::FinishReason;

const TTFT_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const TOKEN_BUCKETS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5,
    5.0, 10.0,
];
const VLLM_TOKEN_BUCKETS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const REQUEST_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
    2560.0,
];
const VLLM_REQUEST_BUCKETS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
const STEP_BUCKETS: &[f64] =
    &[0.00001, 0.00005, 0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5];
const COUNT_BUCKETS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 20000.0, 50000.0,
    100000.0,
];
const ITERATION_BUCKETS: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
const N_BUCKETS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];

const fn seconds(
    name: &'static str,
    vllm: &'static str,
    help: &'static str,
    [buckets, vllm_buckets]: [&'static [f64]; 2],
) -> Definition {
    Definition { name, vllm, unit: Unit::Seconds, help, buckets, vllm_buckets }
}

const fn sizes(
    name: &'static str,
    vllm: &'static str,
    help: &'static str,
    buckets: &'static [f64],
) -> Definition {
    Definition { name, vllm, unit: Unit::Count, help, buckets, vllm_buckets: buckets }
}

const fn plain(name: &'static str, vllm: &'static str, help: &'static str) -> Definition {
    Definition { name, vllm, unit: Unit::Count, help, buckets: &[], vllm_buckets: &[] }
}

const fn bytes(name: &'static str, help: &'static str) -> Definition {
    Definition { unit: Unit::Bytes, ..plain(name, "", help) }
}

// Of a choice's life. A request with n > 1 is observed once a choice, as vLLM does.
const QUEUE: Definition = seconds(
    "rheostat_request_queue_seconds",
    "vllm:request_queue_time_seconds",
    "Time from arrival to the first step that ran the sequence",
    [REQUEST_BUCKETS, VLLM_REQUEST_BUCKETS],
);
const TTFT: Definition = seconds(
    "rheostat_time_to_first_token_seconds",
    "vllm:time_to_first_token_seconds",
    "Time from arrival to the first sampled token",
    [TTFT_BUCKETS, TTFT_BUCKETS],
);
const INTER_TOKEN: Definition = seconds(
    "rheostat_inter_token_seconds",
    "vllm:inter_token_latency_seconds",
    "Time between two sampled tokens of a sequence",
    [TOKEN_BUCKETS, VLLM_TOKEN_BUCKETS],
);
const TPOT: Definition = seconds(
    "rheostat_time_per_output_token_seconds",
    "vllm:request_time_per_output_token_seconds",
    "Mean time per sampled token after the first, one observation a finished sequence",
    [TOKEN_BUCKETS, VLLM_TOKEN_BUCKETS],
);
const E2E: Definition = seconds(
    "rheostat_request_duration_seconds",
    "vllm:e2e_request_latency_seconds",
    "Time from arrival to the end of the sequence",
    [REQUEST_BUCKETS, VLLM_REQUEST_BUCKETS],
);
const PREFILL: Definition = seconds(
    "rheostat_request_prefill_seconds",
    "vllm:request_prefill_time_seconds",
    "Time from the first step that ran the sequence to its first sampled token",
    [REQUEST_BUCKETS, VLLM_REQUEST_BUCKETS],
);
const DECODE: Definition = seconds(
    "rheostat_request_decode_seconds",
    "vllm:request_decode_time_seconds",
    "Time from the first to the last sampled token",
    [REQUEST_BUCKETS, VLLM_REQUEST_BUCKETS],
);
const INFERENCE: Definition = seconds(
    "",
    "vllm:request_inference_time_seconds",
    "Time from the first step that ran the sequence to its last sampled token",
    [&[], VLLM_REQUEST_BUCKETS],
);
const PROMPT_SIZE: Definition = sizes(
    "rheostat_request_prompt_tokens",
    "vllm:request_prompt_tokens",
    "Prompt tokens of a finished sequence",
    COUNT_BUCKETS,
);
const OUTPUT_SIZE: Definition = sizes(
    "rheostat_request_generation_tokens",
    "vllm:request_generation_tokens",
    "Tokens sampled for a finished sequence",
    COUNT_BUCKETS,
);
const PARAM_MAX_TOKENS: Definition = sizes(
    "",
    "vllm:request_params_max_tokens",
    "The max_tokens parameter of a finished sequence's request",
    COUNT_BUCKETS,
);
const PARAM_N: Definition =
    sizes("", "vllm:request_params_n", "The n parameter of a finished sequence's request", N_BUCKETS);
const FINISHED: Definition = plain(
    "rheostat_sequences_finished_total",
    "vllm:request_success_total",
    "Finished sequences by finish reason",
);

// Of the engine's steps.
const STEP_PHASE: Definition =
    seconds("rheostat_step_phase_seconds", "", "Time of a step by phase", [STEP_BUCKETS, &[]]);
const STEP_TOKENS: Definition = sizes(
    "rheostat_step_tokens",
    "vllm:iteration_tokens_total",
    "Tokens run in a step, prefill and decode together",
    ITERATION_BUCKETS,
);
const PROMPT_TOKENS: Definition = plain(
    "rheostat_prompt_tokens_total",
    "vllm:prompt_tokens_total",
    "Prompt tokens prefilled or answered from the prefix cache",
);
const GENERATION_TOKENS: Definition =
    plain("rheostat_generation_tokens_total", "vllm:generation_tokens_total", "Sampled tokens");
const PREFIX_QUERIES: Definition = plain(
    "rheostat_prefix_cache_queried_tokens_total",
    "vllm:prefix_cache_queries_total",
    "Prompt tokens looked up in the prefix cache",
);
const PREFIX_HITS: Definition = plain(
    "rheostat_prefix_cache_hit_tokens_total",
    "vllm:prefix_cache_hits_total",
    "Prompt tokens whose KV came from the prefix cache",
);
const PREEMPTIONS: Definition = plain(
    "rheostat_preemptions_total",
    "vllm:num_preemptions_total",
    "Sequences that lost their KV pages and were queued again",
);
const COMPRESSED: Definition =
    plain("rheostat_compression_sequences_total", "", "Finished sequences whose plan had the method");
const SUBLAYERS_RUN: Definition =
    plain("rheostat_sublayers_run_total", "", "Sublayers run, over all tokens of finished sequences");
const SUBLAYERS_SKIPPED: Definition = plain(
    "rheostat_sublayers_skipped_total",
    "",
    "Sublayers that the method left out, over all tokens of finished sequences",
);

// What the server holds now.
const RUNNING: Definition =
    plain("rheostat_sequences_running", "vllm:num_requests_running", "Sequences in the running batch");
const WAITING: Definition =
    plain("rheostat_sequences_waiting", "vllm:num_requests_waiting", "Sequences in the waiting queue");
const KV_PAGES: Definition = plain(
    "rheostat_kv_pages",
    "",
    "Pages of the KV pool by state: used by sequences, cached for reuse, free; they add up to the pool",
);
const KV_USAGE: Definition = plain(
    "rheostat_kv_usage_ratio",
    "vllm:kv_cache_usage_perc",
    "Share of the KV pool used by sequences, 1 means all",
);
const CACHE_CONFIG: Definition =
    plain("", "vllm:cache_config_info", "Geometry of the KV pool, in the labels; the value is 1");
const BUILD: Definition =
    plain("rheostat_build_info", "", "Version of the server, in the labels; the value is 1");
const MODEL: Definition = plain("rheostat_model_info", "", "The served model, in the labels; the value is 1");

const DEFINITIONS: &[Definition] = &[
    QUEUE,
    TTFT,
    INTER_TOKEN,
    TPOT,
    E2E,
    PREFILL,
    DECODE,
    INFERENCE,
    PROMPT_SIZE,
    OUTPUT_SIZE,
    PARAM_MAX_TOKENS,
    PARAM_N,
    FINISHED,
    STEP_PHASE,
    STEP_TOKENS,
    PROMPT_TOKENS,
    GENERATION_TOKENS,
    PREFIX_QUERIES,
    PREFIX_HITS,
    PREEMPTIONS,
    COMPRESSED,
    SUBLAYERS_RUN,
    SUBLAYERS_SKIPPED,
    RUNNING,
    WAITING,
    KV_PAGES,
    KV_USAGE,
    CACHE_CONFIG,
    BUILD,
    MODEL,
    responses::HTTP_REQUESTS,
    responses::GRPC_REQUESTS,
];

/// Whether metrics are repeated under another server's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum MetricsCompat {
    /// The core `vllm:` names too.
    #[default]
    Vllm,
    /// Only `rheostat_` names.
    None,
}

/// Handles of every metric of one server. Recording is lock-free but for what is looked up by label.
#[derive(Debug)]
pub struct Metrics {
    /// Images in prompts.
    pub images: ImageMetrics,
    instruments: Instruments,
    queue: Paired<Histogram>,
    ttft: Paired<Histogram>,
    inter_token: Paired<Histogram>,
    tpot: Paired<Histogram>,
    e2e: Paired<Histogram>,
    prefill: Paired<Histogram>,
    decode: Paired<Histogram>,
    inference: Paired<Histogram>,
    prompt_size: Paired<Histogram>,
    output_size: Paired<Histogram>,
    param_max_tokens: Paired<Histogram>,
    param_n: Paired<Histogram>,
    finished: [Paired<Counter>; FinishReason::ALL.len()],
    step_phases: [Paired<Histogram>; 4],
    step_tokens: Paired<Histogram>,
    prompt_tokens: Paired<Counter>,
    generation_tokens: Paired<Counter>,
    prefix_queries: Paired<Counter>,
    prefix_hits: Paired<Counter>,
    preemptions: Paired<Counter>,
    compressed: [Paired<Counter>; METHODS.len()],
    sublayers_run: [Paired<Counter>; 2],
    sublayers_skipped: [Paired<Counter>; 4],
    running: Paired<Gauge>,
    waiting: Paired<Gauge>,
    kv_pages: [Paired<Gauge>; 3],
    kv_usage: Paired<Gauge>,
    recent: Recent,
    responses: responses::Responses,
    memory: memory::MemoryInstruments,
}

fn label(key: &'static str, value: impl Into<String>) -> Vec<Label> {
    vec![Label::new(key, value.into())]
}

impl Metrics {
    /// Registers every metric at zero.
    pub fn new(served: &ServedModel, compat: MetricsCompat) -> Self {
        let vllm_model = (compat == MetricsCompat::Vllm).then_some(served.model.as_str());
        let definitions =
            [DEFINITIONS, images::DEFINITIONS, &memory::DEFINITIONS, energy::DEFINITIONS].concat();
        let instruments = Instruments::new(&definitions, vllm_model);
        let histogram = |def| instruments.histogram(def, Vec::new());
        let counter = |def| instruments.counter(def, Vec::new(), Vec::new());
        let gauge = |def| instruments.gauge(def, Vec::new(), Vec::new());
        describe_served(&instruments, served);
        Self {
            queue: histogram(&QUEUE),
            ttft: histogram(&TTFT),
            inter_token: histogram(&INTER_TOKEN),
            tpot: histogram(&TPOT),
            e2e: histogram(&E2E),
            prefill: histogram(&PREFILL),
            decode: histogram(&DECODE),
            inference: histogram(&INFERENCE),
            prompt_size: histogram(&PROMPT_SIZE),
            output_size: histogram(&OUTPUT_SIZE),
            param_max_tokens: histogram(&PARAM_MAX_TOKENS),
            param_n: histogram(&PARAM_N),
            finished: FinishReason::ALL.map(|r| {
                instruments.counter(
                    &FINISHED,
                    label("reason", r.as_str()),
                    label("finished_reason", r.as_openai()),
                )
            }),
            step_phases: StepPhase::ALL
                .map(|p| instruments.histogram(&STEP_PHASE, label("phase", p.as_str()))),
            step_tokens: histogram(&STEP_TOKENS),
            prompt_tokens: counter(&PROMPT_TOKENS),
            generation_tokens: counter(&GENERATION_TOKENS),
            prefix_queries: counter(&PREFIX_QUERIES),
            prefix_hits: counter(&PREFIX_HITS),
            preemptions: counter(&PREEMPTIONS),
            compressed: METHODS.map(|m| instruments.counter(&COMPRESSED, label("method", m), Vec::new())),
            sublayers_run: ["attention", "ffn"]
                .map(|s| instruments.counter(&SUBLAYERS_RUN, label("sublayer", s), Vec::new())),
            sublayers_skipped: ["drop", "skip_decode", "ffn_skip", "vision"]
                .map(|m| instruments.counter(&SUBLAYERS_SKIPPED, label("method", m), Vec::new())),
            running: gauge(&RUNNING),
            waiting: gauge(&WAITING),
            kv_pages: ["used", "cached", "free"]
                .map(|s| instruments.gauge(&KV_PAGES, label("state", s), Vec::new())),
            kv_usage: gauge(&KV_USAGE),
            images: ImageMetrics::new(&instruments),
            recent: Recent::default(),
            responses: responses::Responses::default(),
            memory: memory::MemoryInstruments::new(&instruments),
            instruments,
        }
    }

    /// A sequence sampled its first token, `since_arrival` after it arrived.
    pub fn first_token(&self, since_arrival: Duration) {
        self.ttft.record(since_arrival.as_secs_f64());
        self.recent.first_token(since_arrival);
    }

    /// A sequence sampled a further token, `gap` after the one before.
    pub fn inter_token(&self, gap: Duration) {
        self.inter_token.record(gap.as_secs_f64());
        self.recent.inter_token(gap);
    }

    /// A sequence was admitted to the batch with `prompt` tokens, of which the prefix cache answered `hit`.
    /// `queried` is 0 when the sequence bypassed the cache. Not called again after a preemption.
    pub fn sequence_started(&self, prompt: usize, queried: usize, hit: usize) {
        self.prompt_tokens.add(prompt as u64);
        self.prefix_queries.add(queried as u64);
        self.prefix_hits.add(hit as u64);
    }

    /// `count` sequences were preempted.
    pub fn preempted(&self, count: usize) {
        self.preemptions.add(count as u64);
    }

    /// A step ended.
    pub fn step(&self, sample: &StepSample) {
        self.step_tokens.record(sample.tokens as f64);
        self.generation_tokens.add(sample.sampled as u64);
        for (histogram, time) in self.step_phases.iter().zip(sample.phases) {
            histogram.record(time.as_secs_f64());
        }
    }

    /// Sets what the scheduler holds now.
    pub fn scheduler(&self, now: &SchedulerGauges) {
        self.recent.scheduler(now);
        self.running.set(now.running as f64);
        self.waiting.set(now.waiting as f64);
        let pages = [now.pages_used, now.pages_cached, now.pages_free];
        for (gauge, count) in self.kv_pages.iter().zip(pages) {
            gauge.set(count as f64);
        }
        let total = pages.iter().sum::<usize>().max(1);
        self.kv_usage.set(now.pages_used as f64 / total as f64);
    }

    /// A sequence ended, for whatever reason. Called once a choice.
    pub fn sequence_finished(&self, life: &SequenceTimings) {
        self.finished[life.reason as usize].add(1);
        self.e2e.record(life.total.as_secs_f64());
        self.prompt_size.record(life.prompt_tokens as f64);
        self.output_size.record(life.completion_tokens as f64);
        self.param_max_tokens.record(life.max_tokens as f64);
        self.param_n.record(life.n as f64);
        if let Some(queue) = life.queue {
            self.queue.record(queue.as_secs_f64());
        }
        if let (Some(prefill), Some(decode)) = (life.prefill, life.decode) {
            self.prefill.record(prefill.as_secs_f64());
            self.decode.record(decode.as_secs_f64());
            self.inference.record((prefill + decode).as_secs_f64());
            if life.completion_tokens > 1 {
                self.tpot.record(decode.as_secs_f64() / (life.completion_tokens - 1) as f64);
            }
        }
    }

    /// What a sequence that ended ran of the model. Called once a choice.
    pub fn compression(&self, sample: &CompressionSample) {
        for (counter, method) in self.compressed.iter().zip(METHODS) {
            counter.add(u64::from(sample.methods.contains(&method)));
        }
        for (counter, count) in self.sublayers_run.iter().zip(sample.sublayers_run) {
            counter.add(count);
        }
        let skipped = [sample.dropped, sample.too_deep, sample.ffns_skipped, sample.visual_left_out];
        for (counter, count) in self.sublayers_skipped.iter().zip(skipped) {
            counter.add(count);
        }
    }

    /// Everything in Prometheus' text format.
    pub fn render(&self) -> String {
        self.instruments.recorder().handle().render()
    }

    /// Folds histogram samples into their buckets. Call every few seconds: samples are kept one by one
    /// until then, and a server that nobody scrapes must not grow.
    pub fn upkeep(&self) {
        self.instruments.recorder().handle().run_upkeep();
    }
}

/// Sets the metrics that never change while the server runs.
fn describe_served(instruments: &Instruments, served: &ServedModel) {
    let gauge = |def, labels: Vec<Label>| instruments.gauge(def, labels, Vec::new());
    gauge(&BUILD, label("version", env!("CARGO_PKG_VERSION"))).set(1.0);
    let model = [label("model", &*served.model), label("architecture", &*served.architecture)].concat();
    gauge(&MODEL, model).set(1.0);
    let geometry = [
        label("block_size", served.block_size.to_string()),
        label("num_gpu_blocks", served.num_pages.to_string()),
    ];
    instruments.gauge(&CACHE_CONFIG, Vec::new(), geometry.concat()).set(1.0);
}
