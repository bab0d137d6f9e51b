//! `rheostat-loadtest compare`: the same load to two servers in turn.
//!
//! Rates of different minutes do not compare on a shared machine, so both have a turn in every round, in
//! alternating order, and what is printed are the rounds' ratios: their median and their range.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use serde::Serialize;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

use crate::client::Settings;
use crate::client::http::HttpTarget;
use crate::run::{LoadOptions, run};
use crate::summary::{Percentiles, Summary};

/// How often a server that is starting is asked whether it is up.
const POLL: Duration = Duration::from_millis(100);
/// How long a server may take to stop once it was told to.
const STOP: Duration = Duration::from_secs(10);

/// `rheostat-loadtest compare`'s flags.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Address of the first server
    a: String,
    /// Address of the second
    b: String,
    /// Command that starts the first before its turn and is stopped after it [default: it runs already]
    #[arg(long)]
    a_command: Option<String>,
    /// Command that starts the second before its turn
    #[arg(long)]
    b_command: Option<String>,
    /// Seconds that a server may take to start
    #[arg(long, default_value_t = 120)]
    start_seconds: u64,
    /// Rounds, in each of which both have a turn
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    #[command(flatten)]
    load: LoadOptions,
    /// Plans of the second server's requests, where they differ from the first's
    #[arg(long = "b-plan")]
    b_plans: Vec<crate::workload::Share>,
    /// Folder for compare.json and compare.md
    #[arg(long)]
    out: Option<PathBuf>,
}

/// What a ratio is of.
type Figure = (&'static str, fn(&Summary) -> Option<f64>);

fn p(latency: Option<&Percentiles>, of: fn(&Percentiles) -> f64) -> Option<f64> {
    latency.map(of)
}

const FIGURES: [Figure; 11] = [
    ("time to first token, p50", |s| p(s.ttft_ms.as_ref(), |p| p.p50)),
    ("time to first token, p90", |s| p(s.ttft_ms.as_ref(), |p| p.p90)),
    ("time to first token, p99", |s| p(s.ttft_ms.as_ref(), |p| p.p99)),
    ("time per token, p50", |s| p(s.tpot_ms.as_ref(), |p| p.p50)),
    ("time per token, p99", |s| p(s.tpot_ms.as_ref(), |p| p.p99)),
    ("end to end, p50", |s| p(s.e2e_ms.as_ref(), |p| p.p50)),
    ("end to end, p99", |s| p(s.e2e_ms.as_ref(), |p| p.p99)),
    ("output tokens/s", |s| Some(s.output_tokens_per_second)),
    ("requests/s", |s| Some(s.requests_per_second)),
    ("share within the targets", |s| s.goodput.as_ref().map(|goodput| goodput.share)),
    ("joules per token", |s| s.joules_per_token),
];

/// One figure of both servers over all rounds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Ratio {
    /// What it is of.
    pub figure: &'static str,
    /// Median over rounds of the first's.
    pub a: f64,
    /// Median over rounds of the second's.
    pub b: f64,
    /// First ÷ second: the rounds' least, median and greatest.
    pub ratio: [f64; 3],
}

/// Both servers' summaries, round by round, and their ratios.
#[derive(Debug, Serialize)]
struct Comparison {
    ratios: Vec<Ratio>,
    rounds: Vec<[Summary; 2]>,
}

pub(crate) fn main(options: &Options) -> Result<(), String> {
    let runtime =
        tokio::runtime::Runtime::new().map_err(|e| format!("the async runtime cannot start: {e}"))?;
    let comparison = runtime.block_on(compare(options))?;
    let table = markdown(options, &comparison.ratios);
    println!("{table}");
    let Some(folder) = &options.out else { return Ok(()) };
    let json = serde_json::to_string_pretty(&comparison).map_err(|e| e.to_string())?;
    std::fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    for (name, content) in [("compare.json", json), ("compare.md", table)] {
        let path = folder.join(name);
        std::fs::write(&path, content).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(())
}

async fn compare(options: &Options) -> Result<Comparison, String> {
    let mut rounds = Vec::new();
    for round in 0..options.rounds.max(1) {
        // Rounds differ in what is sent, sides of a round do not.
        let load = LoadOptions { seed: options.load.seed + round as u64, ..options.load.clone() };
        let of_b = if options.b_plans.is_empty() { load.plans.clone() } else { options.b_plans.clone() };
        let b = LoadOptions { plans: of_b, ..load.clone() };
        let a_first = round % 2 == 0;
        let (mut first, mut second) = (None, None);
        for is_a in [a_first, !a_first] {
            eprintln!("round {} of {}: {}", round + 1, options.rounds, if is_a { "A" } else { "B" });
            if is_a {
                first = Some(turn(&options.a, options.a_command.as_deref(), (&load, options)).await?);
            } else {
                second = Some(turn(&options.b, options.b_command.as_deref(), (&b, options)).await?);
            }
        }
        rounds.extend(first.zip(second).map(<[Summary; 2]>::from));
    }
    Ok(Comparison { ratios: ratios(&rounds), rounds })
}

/// Starts the server if it has a command, sends the load, and stops it.
async fn turn(
    url: &str,
    command: Option<&str>,
    (load, options): (&LoadOptions, &Options),
) -> Result<Summary, String> {
    let server = match command {
        Some(command) => Some(start(command, url, Duration::from_secs(options.start_seconds)).await?),
        None => None,
    };
    let report = run(url, load, "").await;
    if let Some(server) = server {
        stop(server).await;
    }
    report.map(|report| report.summary)
}

/// Runs `command` in a shell and waits until the server at `url` answers.
async fn start(command: &str, url: &str, limit: Duration) -> Result<Child, String> {
    let mut child = Command::new("sh")
        // `exec`, so that the process that is stopped is the server and not its shell.
        .args(["-c", &format!("exec {command}")])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| format!("`{command}` cannot be started: {e}"))?;
    let settings = Settings::default();
    let probe = HttpTarget::new(url, settings)?;
    let deadline = Instant::now() + limit;
    while !probe.is_up().await {
        if let Ok(Some(status)) = child.try_wait() {
            return Err(format!("`{command}` ended before it served ({status}); see its messages above"));
        }
        if Instant::now() > deadline {
            return Err(format!("`{command}` does not answer at {url} after {} s", limit.as_secs()));
        }
        sleep(POLL).await;
    }
    Ok(child)
}

async fn stop(mut server: Child) {
    // There is no portable way to ask politely; its requests have all been answered.
    let _ = server.start_kill();
    let _ = tokio::time::timeout(STOP, server.wait()).await;
}

/// Every figure that all rounds of both have.
pub fn ratios(rounds: &[[Summary; 2]]) -> Vec<Ratio> {
    let of = |&(figure, value): &Figure| {
        let pairs = rounds.iter().map(|[a, b]| Some((value(a)?, value(b)?))).collect::<Option<Vec<_>>>()?;
        let sorted = |values: Vec<f64>| {
            let mut values = values;
            values.sort_by(f64::total_cmp);
            values
        };
        let median = |values: &[f64]| values.get(values.len() / 2).copied();
        let ratios = sorted(pairs.iter().map(|(a, b)| a / b).collect());
        Some(Ratio {
            figure,
            a: median(&sorted(pairs.iter().map(|pair| pair.0).collect()))?,
            b: median(&sorted(pairs.iter().map(|pair| pair.1).collect()))?,
            ratio: [*ratios.first()?, median(&ratios)?, *ratios.last()?],
        })
    };
    FIGURES.iter().filter_map(of).collect()
}

fn markdown(options: &Options, ratios: &[Ratio]) -> String {
    let mut text = format!(
        "A: {}\nB: {}\n{} rounds; latencies in ms.\n\n| what | A | B | A ÷ B: median (range) |\n|---|---:|---:|---:|\n",
        options.a_command.as_ref().unwrap_or(&options.a),
        options.b_command.as_ref().unwrap_or(&options.b),
        options.rounds.max(1),
    );
    for Ratio { figure, a, b, ratio: [low, middle, high] } in ratios {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "| {figure} | {a:.2} | {b:.2} | {middle:.3} ({low:.3}–{high:.3}) |");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::summary::Targets;

    fn summary(tokens_per_second: f64) -> Summary {
        let empty = Summary::of(&[], Duration::ZERO, Targets::default());
        Summary { output_tokens_per_second: tokens_per_second, requests_per_second: 1.0, ..empty }
    }

    #[test]
    fn ratios_are_of_rounds_and_not_of_medians() {
        // A drifting machine: absolute rates halve from round to round, the ratio hardly moves.
        let rounds = [[80.0, 40.0], [40.0, 19.0], [20.0, 10.5]].map(|pair| pair.map(summary));
        let found = ratios(&rounds);
        let names: Vec<_> = found.iter().map(|ratio| ratio.figure).collect();
        assert_eq!(names, ["output tokens/s", "requests/s"], "what no answer had is left out");
        assert_eq!((found[0].a, found[0].b), (40.0, 19.0));
        assert_eq!(found[0].ratio.map(|r| (r * 100.0).round()), [190.0, 200.0, 211.0]);
    }

    #[tokio::test]
    async fn a_command_that_ends_is_reported_and_not_waited_for() {
        let started = start("false", "http://127.0.0.1:9", Duration::from_secs(60)).await;
        assert!(started.is_err_and(|e| e.contains("ended before it served")));
    }
}
