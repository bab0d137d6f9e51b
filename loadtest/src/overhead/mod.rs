//! `rheostat-loadtest overhead`: what the server adds to a model, from HTTP in to the engine and back.
//!
//! The model is a toy that does nothing to speak of, in a process of its own, so that its processor time is the
//! server's alone and the client's is not in it. In every round each measurement has a turn:
//!
//! - a *request*: one token, whole, one connection. From its time is taken what the same client needs with a
//!   responder that answers fixed bytes: the operating system's loopback and the client itself;
//! - a *token*: a stream of many less one of few, a token, with a client that reads all the time and with one
//!   that looks once a millisecond and so leaves the machine to the server;
//! - both again as processor time of the server's process, which no client can be in; the toy's own forward
//!   pass, as the server's metrics tell it, is taken off.

mod client;
pub(crate) mod stub;

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

pub(crate) use client::{RawClient, is_end_of_stream};

/// Tokens of a long stream and of a short one.
const TOKENS: [usize; 2] = [1024, 24];
/// Streams at once, where several are measured.
const STREAMS: usize = 8;
const PAUSE: Duration = Duration::from_millis(1);

/// `rheostat-loadtest overhead`'s flags.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Rounds, in each of which every measurement has a turn
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Requests of a measurement
    #[arg(long, default_value_t = 300)]
    requests: usize,
}

/// The stub server's process; it ends with its standard input.
struct Stub {
    child: Child,
    http: SocketAddr,
    canned: SocketAddr,
}

impl Stub {
    fn start() -> Result<Self, String> {
        let program = std::env::current_exe().map_err(|e| e.to_string())?;
        let mut child = Command::new(program)
            .args(["stub-server", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("the stub server cannot be started: {e}"))?;
        match server_addresses(&mut child)?[..] {
            [http, canned] => Ok(Self { child, http, canned }),
            _ => Err("the stub server did not start".into()),
        }
    }

    /// Processor time of its threads so far.
    fn cpu(&self) -> Result<Duration, String> {
        cpu_of(self.child.id())
    }

    /// Seconds that the toy's forward pass took so far, and tokens sampled.
    fn forward(&self) -> Result<[f64; 2], String> {
        let mut client = RawClient::connect(self.http).map_err(|e| e.to_string())?;
        client.exchange(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").map_err(|e| e.to_string())?;
        let text = client.text();
        let value = |name: &str| {
            let line = text.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or(0.0)
        };
        Ok([
            value("rheostat_step_phase_seconds_sum{phase=\"forward\"}"),
            value("rheostat_generation_tokens_total"),
        ])
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// What a server's process says when it starts: where it listens for HTTP.
fn server_addresses(child: &mut Child) -> Result<Vec<SocketAddr>, String> {
    let mut line = String::new();
    let stdout = child.stdout.take().ok_or("no standard output")?;
    BufReader::new(stdout).read_line(&mut line).map_err(|e| e.to_string())?;
    Ok(stub::addresses(&line))
}

/// The first of them, of a server that was just started.
///
/// # Errors
/// A sentence, when it did not start.
pub(crate) fn server_address(child: &mut Child) -> Result<SocketAddr, String> {
    server_addresses(child)?.first().copied().ok_or("the server did not start".into())
}

/// Time on a processor of all threads of the process, from the kernel's scheduler statistics.
fn cpu_of(pid: u32) -> Result<Duration, String> {
    let folder = format!("/proc/{pid}/task");
    let tasks = std::fs::read_dir(&folder)
        .map_err(|e| format!("{folder}: {e}; processor time is measured on Linux only"))?;
    let nanos = tasks.flatten().filter_map(|task| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    Ok(Duration::from_nanos(nanos.sum()))
}

/// A request for exactly `tokens` tokens.
pub(crate) fn completion(tokens: usize, stream: bool) -> Vec<u8> {
    let body = format!(
        r#"{{"prompt":"the quick brown fox","max_tokens":{tokens},"temperature":0,"ignore_eos":true,"stream":{stream}}}"#
    );
    let length = body.len();
    format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}

/// One figure a round, in microseconds.
#[derive(Debug, Default)]
struct Figures {
    canned: Vec<f64>,
    health: Vec<f64>,
    request: Vec<f64>,
    request_cpu: Vec<f64>,
    token: Vec<f64>,
    token_lazy: Vec<f64>,
    token_cpu: Vec<f64>,
    token_forward: Vec<f64>,
    batched: Vec<f64>,
    batched_cpu: Vec<f64>,
}

/// Measures, and prints a table.
pub(crate) fn main(options: &Options) -> Result<(), String> {
    let stub = Stub::start()?;
    let mut figures = Figures::default();
    // The first round warms caches and pools, and is not counted.
    for round in 0..=options.rounds {
        let mut of_round = Figures::default();
        measure_requests(&stub, options.requests, &mut of_round)?;
        measure_tokens(&stub, &mut of_round)?;
        measure_batch(&stub, &mut of_round)?;
        if round > 0 {
            figures.extend(of_round);
        }
    }
    print!("{}", figures.table());
    Ok(())
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The median time of `count` exchanges over one connection.
fn exchanges(to: SocketAddr, request: &[u8], count: usize) -> Result<f64, String> {
    let mut client = RawClient::connect(to).map_err(|e| e.to_string())?;
    let times = (0..count).map(|_| client.exchange(request).map(micros));
    times.collect::<Result<_, _>>().map(median).map_err(|e| e.to_string())
}

fn measure_requests(stub: &Stub, count: usize, figures: &mut Figures) -> Result<(), String> {
    let request = completion(1, false);
    figures.canned.push(exchanges(stub.canned, &request, count)?);
    figures.health.push(exchanges(stub.http, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n", count)?);
    let before = stub.cpu()?;
    figures.request.push(exchanges(stub.http, &request, count)?);
    figures.request_cpu.push(micros(stub.cpu()? - before) / count as f64);
    Ok(())
}

fn measure_tokens(stub: &Stub, figures: &mut Figures) -> Result<(), String> {
    let mut client = RawClient::connect(stub.http).map_err(|e| e.to_string())?;
    let [long, short] = TOKENS.map(|tokens| completion(tokens, true));
    let further = (TOKENS[0] - TOKENS[1]) as f64;
    let mut repeat = |request: &[u8], lazy: bool| {
        let times = (0..8).map(|_| {
            let time = if lazy { client.exchange_lazily(request, PAUSE) } else { client.exchange(request) };
            time.map(micros).map_err(|e| e.to_string())
        });
        times.collect::<Result<Vec<_>, _>>().map(median)
    };
    let few = repeat(&short, false)?;
    figures.token.push((repeat(&long, false)? - few) / further);
    let few = repeat(&short, true)?;
    let (before, [forward, tokens]) = (stub.cpu()?, stub.forward()?);
    figures.token_lazy.push((repeat(&long, true)? - few) / further);
    let (cpu, after) = (stub.cpu()? - before, stub.forward()?);
    let made = after[1] - tokens;
    figures.token_cpu.push(micros(cpu) / made);
    figures.token_forward.push((after[0] - forward) * 1e6 / made);
    Ok(())
}

/// Several streams at once, of clients that look once in a while.
fn measure_batch(stub: &Stub, figures: &mut Figures) -> Result<(), String> {
    let request = completion(TOKENS[0], true);
    let (before, begin) = (stub.cpu()?, std::time::Instant::now());
    let results: Vec<_> = std::thread::scope(|scope| {
        let call = || {
            let mut client = RawClient::connect(stub.http).map_err(|e| e.to_string())?;
            client.exchange_lazily(&request, PAUSE).map_err(|e| e.to_string())
        };
        let threads: Vec<_> = (0..STREAMS).map(|_| scope.spawn(call)).collect();
        threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
    });
    for result in results {
        result.map_err(|_| "a client panicked".to_owned())??;
    }
    let tokens = (STREAMS * TOKENS[0]) as f64;
    figures.batched.push(micros(begin.elapsed()) / tokens);
    figures.batched_cpu.push(micros(stub.cpu()? - before) / tokens);
    Ok(())
}

impl Figures {
    fn extend(&mut self, round: Self) {
        self.canned.extend(round.canned);
        self.health.extend(round.health);
        self.request.extend(round.request);
        self.request_cpu.extend(round.request_cpu);
        self.token.extend(round.token);
        self.token_lazy.extend(round.token_lazy);
        self.token_cpu.extend(round.token_cpu);
        self.token_forward.extend(round.token_forward);
        self.batched.extend(round.batched);
        self.batched_cpu.extend(round.batched_cpu);
    }

    /// Medians of the rounds, and their quartiles.
    fn table(&self) -> String {
        let less = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<_>>();
        let rows = [
            ("fixed answer of no server: loopback and client", self.canned.clone()),
            ("GET /health", self.health.clone()),
            ("request of one token", self.request.clone()),
            (
                "**request: server overhead**, the fixed answer's time taken off",
                less(&self.request, &self.canned),
            ),
            ("request: processor time of the server", self.request_cpu.clone()),
            ("token of a stream, client reads all the time", self.token.clone()),
            ("token of a stream, client looks once a millisecond", self.token_lazy.clone()),
            ("of it the toy's forward pass", self.token_forward.clone()),
            (
                "**token: server overhead**, the forward pass taken off",
                less(&self.token_lazy, &self.token_forward),
            ),
            ("token: processor time of the server, forward pass included", self.token_cpu.clone()),
            ("token of eight streams at once", self.batched.clone()),
            ("token of eight streams: processor time of the server", self.batched_cpu.clone()),
        ];
        let mut text = String::from("| what | µs: median of rounds (quartiles) |\n|---|---:|\n");
        for (what, mut values) in rows {
            values.sort_by(f64::total_cmp);
            let at = |share: f64| {
                let index = (share * values.len().saturating_sub(1) as f64).round() as usize;
                values.get(index).copied().unwrap_or(f64::NAN)
            };
            text += &format!("| {what} | {:.1} ({:.1}–{:.1}) |\n", at(0.5), at(0.25), at(0.75));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_subtracts_round_by_round() {
        let mut figures = Figures::default();
        for (canned, request) in [(10.0, 110.0), (30.0, 120.0), (20.0, 140.0)] {
            figures.extend(Figures { canned: vec![canned], request: vec![request], ..Figures::default() });
        }
        let table = figures.table();
        assert!(table.contains("| request of one token | 120.0 (120.0–140.0) |"), "{table}");
        assert!(table.contains("time taken off | 100.0 (100.0–120.0) |"), "{table}");
        assert!(cpu_of(std::process::id()).is_ok_and(|time| time > Duration::ZERO));
    }
}
