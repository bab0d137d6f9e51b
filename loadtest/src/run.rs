//! `rheostat-loadtest run`

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::Serialize;

use crate::client::grpc::GrpcTarget;
use crate::client::http::HttpTarget;
use crate::client::{Settings, Target};
use crate::drive::{Driver, Progress, Record};
use crate::report;
use crate::summary::{Summary, Targets};
use crate::workload::{Lengths, Share, Workload, read_trace};

/// How often progress is shown.
const SHOWN_EVERY: Duration = Duration::from_secs(5);

/// What is sent, and how it is judged.
#[derive(Debug, Clone, clap::Args)]
pub struct LoadOptions {
    /// The model's name [default: none, for servers that have one]
    #[arg(long, default_value = "")]
    pub model: String,
    /// Key sent as a bearer token
    #[arg(long, env = "RHEOSTAT_LOADTEST_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Open loop: requests a second, as a Poisson process [default: what a trace says]
    #[arg(long, value_parser = positive)]
    pub rate: Option<f64>,
    /// Closed loop: clients that each wait for their answer before they send again
    #[arg(long, conflicts_with = "rate")]
    pub concurrency: Option<NonZeroUsize>,
    /// Seconds in which requests are due
    #[arg(long, default_value = "60", value_parser = positive)]
    pub duration: f64,
    /// Requests at most
    #[arg(long)]
    pub requests: Option<usize>,
    /// Seconds from the start whose requests are sent but not counted
    #[arg(long, default_value = "0", value_parser = not_negative)]
    pub warmup: f64,
    /// Tokens of a prompt: TOKENS, uniform:LOW-HIGH or lognormal:MEDIAN,SIGMA,MOST
    #[arg(long, default_value = "lognormal:128,0.6,1024")]
    pub prompt_tokens: Lengths,
    /// Tokens of an output, written as those of a prompt
    #[arg(long, default_value = "lognormal:64,0.6,512")]
    pub output_tokens: Lengths,
    /// JSONL file of requests: `prompt` or `prompt_tokens`, `output_tokens`, `at` in seconds; all optional
    #[arg(long)]
    pub trace: Option<PathBuf>,
    /// A profile's name, a JSON object as under `compression`, or none; =WEIGHT makes a mix of several
    #[arg(long = "plan", default_value = "none")]
    pub plans: Vec<Share>,
    /// Ask for whole answers: no time to first token then
    #[arg(long)]
    pub no_stream: bool,
    /// Send chats instead of text completions
    #[arg(long)]
    pub chat: bool,
    /// Send no `ignore_eos`: the model may end a text by itself
    #[arg(long)]
    pub respect_eos: bool,
    /// Speak rheostat.v1 over gRPC instead of OpenAI's HTTP
    #[arg(long)]
    pub grpc: bool,
    /// Requests at once at most; further ones wait, and their wait counts
    #[arg(long, default_value = "4096")]
    pub max_in_flight: NonZeroUsize,
    /// Seconds that a request may take
    #[arg(long, default_value = "120", value_parser = positive)]
    pub timeout: f64,
    /// Target: milliseconds to the first token
    #[arg(long, value_parser = positive)]
    pub ttft_ms: Option<f64>,
    /// Target: milliseconds per further token
    #[arg(long, value_parser = positive)]
    pub tpot_ms: Option<f64>,
    /// Target: milliseconds to the end
    #[arg(long, value_parser = positive)]
    pub e2e_ms: Option<f64>,
    /// Everything random follows from it
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// `rheostat-loadtest run`'s flags.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Address of the server, such as http://127.0.0.1:8080
    url: String,
    #[command(flatten)]
    load: LoadOptions,
    /// Folder for load.json, load.md and load.png
    #[arg(long)]
    out: Option<PathBuf>,
    /// The report's title
    #[arg(long, default_value = "Load test")]
    title: String,
}

/// A finished run.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The title.
    pub title: String,
    /// What was sent, in words.
    pub load: String,
    /// The seed.
    pub seed: u64,
    /// All requests.
    pub summary: Summary,
    /// By share, where there are several.
    pub shares: Vec<(String, Summary)>,
    /// One a request.
    #[serde(skip)]
    pub records: Vec<Record>,
}

/// Runs the load, prints the report, and writes it where it was asked for.
pub(crate) fn main(options: &Options) -> Result<(), String> {
    let runtime =
        tokio::runtime::Runtime::new().map_err(|e| format!("the async runtime cannot start: {e}"))?;
    let report = runtime.block_on(run(&options.url, &options.load, &options.title))?;
    println!("{}", report::markdown(&report));
    match &options.out {
        Some(folder) => report::write(folder, &report),
        None => Ok(()),
    }
}

/// Sends the load to the server at `url` and sums up what came back.
///
/// # Errors
/// A sentence, when the options do not fit together or no request could be sent.
pub async fn run(url: &str, load: &LoadOptions, title: &str) -> Result<Report, String> {
    let workload = load.workload()?;
    let settings = Settings {
        model: load.model.clone(),
        api_key: load.api_key.clone(),
        stream: !load.no_stream,
        chat: load.chat,
        respect_eos: load.respect_eos,
        compression: workload.shares.iter().map(|share| share.compression.clone()).collect(),
    };
    let records = if load.grpc {
        drive(GrpcTarget::new(url, settings)?, load, workload.clone()).await
    } else {
        drive(HttpTarget::new(url, settings)?, load, workload.clone()).await
    };
    if records.is_empty() {
        return Err("no request was due: raise --duration or --rate".into());
    }
    let (warmup, targets) = (Duration::from_secs_f64(load.warmup), load.targets());
    let of_share = |(index, share): (usize, &Share)| {
        let own: Vec<_> = records.iter().filter(|record| record.share == index).cloned().collect();
        (share.name.clone(), Summary::of(&own, warmup, targets))
    };
    let several = workload.shares.len() > 1;
    Ok(Report {
        title: title.to_owned(),
        load: load.describe(&workload),
        seed: load.seed,
        summary: Summary::of(&records, warmup, targets),
        shares: workload.shares.iter().enumerate().filter(|_| several).map(of_share).collect(),
        records,
    })
}

async fn drive<T: Target>(target: T, load: &LoadOptions, workload: Workload) -> Vec<Record> {
    let driver = Driver::new(target, Duration::from_secs_f64(load.timeout));
    let until = (Duration::from_secs_f64(load.duration), load.requests.unwrap_or(usize::MAX));
    let shown = tokio::spawn(show(Arc::clone(driver.progress())));
    let records = match load.concurrency {
        Some(clients) => driver.closed_loop(&Arc::new(workload), clients.get(), until).await,
        None => {
            // Without a rate the trace has the times, which `workload` has checked.
            let planned = workload.open_loop(load.rate.unwrap_or(1.0), until);
            driver.open_loop(planned, load.max_in_flight.get()).await
        }
    };
    shown.abort();
    records
}

/// Shows progress until it is aborted.
async fn show(progress: Arc<Progress>) {
    let start = tokio::time::Instant::now();
    let mut ticks = tokio::time::interval_at(start + SHOWN_EVERY, SHOWN_EVERY);
    loop {
        ticks.tick().await;
        let of = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let (sent, answered, failed) = (of(&progress.sent), of(&progress.answered), of(&progress.failed));
        let seconds = start.elapsed().as_secs();
        let open = sent.saturating_sub(answered + failed);
        eprintln!("{seconds:>4} s: {sent} sent, {answered} answered, {failed} failed, {open} under way");
    }
}

impl LoadOptions {
    /// The targets that were given.
    pub fn targets(&self) -> Targets {
        Targets { ttft_ms: self.ttft_ms, tpot_ms: self.tpot_ms, e2e_ms: self.e2e_ms }
    }

    fn workload(&self) -> Result<Workload, String> {
        let trace = self.trace.as_deref().map(read_trace).transpose()?.unwrap_or_default();
        let timed = trace.first().is_some_and(|entry| entry.at.is_some());
        if self.rate.is_none() && self.concurrency.is_none() && !timed {
            return Err("say how much to send: --rate, --concurrency, or a --trace with times".into());
        }
        if timed && (self.rate.is_some() || self.concurrency.is_some()) {
            return Err(
                "the trace has times: leave --rate and --concurrency out, or `at` in the trace".into()
            );
        }
        Ok(Workload {
            seed: self.seed,
            prompt: self.prompt_tokens,
            output: self.output_tokens,
            shares: self.plans.clone(),
            trace,
        })
    }

    fn describe(&self, workload: &Workload) -> String {
        let arrivals = match (self.rate, self.concurrency) {
            (Some(rate), _) => format!("open loop, Poisson, {rate} requests/s"),
            (None, Some(clients)) => format!("closed loop, {clients} clients"),
            (None, None) => "open loop, times of the trace".to_owned(),
        };
        let lengths = match &self.trace {
            Some(path) => format!("trace {}", path.file_name().unwrap_or_default().to_string_lossy()),
            None => format!("prompt {}, output {} tokens", self.prompt_tokens, self.output_tokens),
        };
        let plans: Vec<_> =
            workload.shares.iter().map(|share| format!("{} × {}", share.name, share.weight)).collect();
        let api = if self.grpc { "gRPC" } else { "HTTP" };
        let stream = if self.no_stream { "whole answers" } else { "streamed" };
        format!("{arrivals}; {lengths}; plans: {}; {api}, {stream}; {} s", plans.join(", "), self.duration)
    }
}

fn positive(text: &str) -> Result<f64, String> {
    not_negative(text).and_then(|x| if x > 0.0 { Ok(x) } else { Err("must be above 0".into()) })
}

fn not_negative(text: &str) -> Result<f64, String> {
    // Up to a year, so that every duration made of it is one.
    match text.parse::<f64>() {
        Ok(x) if (0.0..=31_536_000.0).contains(&x) => Ok(x),
        _ => Err("must be a number of 0 or more".into()),
    }
}
