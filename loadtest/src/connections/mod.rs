//! `rheostat-loadtest connections`: what idle connections and clients that do not read cost a server.
//!
//! In each round two clients stream texts for a while: first alone, then beside many idle connections (half of them
//! never said anything, half were served once and kept) and requests whose answers nobody reads. Reported are the
//! tail of the two clients' times with and without the others, and the server's resident memory before, while and
//! after.

mod crowd;
mod streams;

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crowd::Crowd;
use streams::Tail;

use crate::overhead::server_address;

/// How long memory may take to settle after connections came or went.
const SETTLE: Duration = Duration::from_secs(2);
/// How long after connections went what they held may take to go back to the operating system: allocators keep what
/// is freed for ten seconds.
const GIVE_BACK: Duration = Duration::from_secs(15);

/// `rheostat-loadtest connections`'s flags.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Command that starts the server, such as `target/release/rheostat serve`; ports and limits are added to it
    /// [default: the server over a toy model]
    #[arg(long)]
    server: Option<String>,
    /// Idle connections
    #[arg(long, default_value_t = 10_000)]
    idle: usize,
    /// Clients that ask for a stream and never read it
    #[arg(long, default_value_t = 100)]
    deaf: usize,
    /// Tokens that each of those asks for
    #[arg(long, default_value_t = 256)]
    deaf_tokens: usize,
    /// Seconds that each part of a round lasts
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Rounds
    #[arg(long, default_value_t = 3)]
    rounds: usize,
}

/// The server under test; killed when dropped.
struct Server {
    child: Child,
    http: std::net::SocketAddr,
}

impl Server {
    fn start(options: &Options) -> Result<Self, String> {
        let own = std::env::current_exe().map_err(|e| e.to_string())?;
        let own = format!("{} stub-server", own.display());
        let command = options.server.as_deref().unwrap_or(&own);
        let mut words = command.split_whitespace();
        let room = (options.idle + options.deaf + 1000).to_string();
        let mut child = Command::new(words.next().ok_or("--server is empty")?)
            .args(words)
            .args(["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--http-max-connections", &room])
            // Idle connections are to stay while they are measured.
            .args(["--http-header-timeout-seconds", "3600", "--http-write-timeout-seconds", "3600"])
            .args(["--max-concurrent-requests", &room])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("{command}: {e}"))?;
        let http = server_address(&mut child)?;
        Ok(Self { child, http })
    }

    /// Resident memory in bytes.
    fn resident(&self) -> Result<u64, String> {
        let path = format!("/proc/{}/status", self.child.id());
        let text = std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        kib.map(|kib| kib << 10).ok_or(format!("{path} has no VmRSS"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One round's figures.
#[derive(Debug)]
struct Round {
    alone: Tail,
    beside: Tail,
    /// Resident bytes before, with idle connections, with deaf clients too, and after all have gone.
    resident: [u64; 4],
}

/// Measures, and prints a table.
pub(crate) fn main(options: &Options) -> Result<(), String> {
    let open = crowd::raise_file_limit().map_err(|e| format!("the limit of open files: {e}"))?;
    let needed = (options.idle + options.deaf + 64) as u64;
    if open < needed {
        return Err(format!("{needed} open files are needed and {open} are allowed: raise `ulimit -Hn`"));
    }
    let server = Server::start(options)?;
    let time = Duration::from_secs(options.seconds);
    // What the first streams allocate stays: it is not the connections'.
    streams::measure(server.http, time / 4)?;
    let mut rounds = Vec::new();
    for _ in 0..options.rounds {
        rounds.push(round(&server, options, time)?);
    }
    print!("{}", table(options, &rounds));
    Ok(())
}

fn round(server: &Server, options: &Options, time: Duration) -> Result<Round, String> {
    let alone = streams::measure(server.http, time)?;
    let before = server.resident()?;
    let mut crowd = Crowd::idle(server.http, options.idle)?;
    std::thread::sleep(SETTLE);
    let idle = server.resident()?;
    crowd.add_deaf(options.deaf, options.deaf_tokens)?;
    streams::until_idle(server.http)?;
    std::thread::sleep(SETTLE);
    let deaf = server.resident()?;
    let beside = streams::measure(server.http, time)?;
    drop(crowd);
    std::thread::sleep(GIVE_BACK);
    Ok(Round { alone, beside, resident: [before, idle, deaf, server.resident()?] })
}

fn table(options: &Options, rounds: &[Round]) -> String {
    let spread = |mut values: Vec<f64>, digits: usize| {
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        let (middle, last) = (values.len() / 2, values.len().saturating_sub(1));
        format!("{:.digits$} ({:.digits$}–{:.digits$})", at(middle), at(0), at(last))
    };
    let of = |figure: &dyn Fn(&Round) -> f64, digits| spread(rounds.iter().map(figure).collect(), digits);
    let mib = |index: usize| move |round: &Round| round.resident[index] as f64 / f64::from(1 << 20);
    let per = |from: usize, to: usize, count: usize| {
        move |round: &Round| {
            let [from, to] = [round.resident[from], round.resident[to]];
            (to as f64 - from as f64) / count.max(1) as f64 / 1024.0
        }
    };
    let rows = [
        ("resident memory before, MiB".to_owned(), of(&mib(0), 1)),
        (format!("with {} idle connections, MiB", options.idle), of(&mib(1), 1)),
        ("an idle connection, KiB".to_owned(), of(&per(0, 1, options.idle), 2)),
        (
            format!("with {} clients that never read {} tokens too, MiB", options.deaf, options.deaf_tokens),
            of(&mib(2), 1),
        ),
        ("a client that never reads, KiB".to_owned(), of(&per(1, 2, options.deaf), 2)),
        ("after all have gone, MiB".to_owned(), of(&mib(3), 1)),
        (
            "others' p99 time of a stream, with ÷ without".to_owned(),
            of(&|r| r.beside.stream_p99 / r.alone.stream_p99, 3),
        ),
        (
            "others' p99 time between two pieces, with ÷ without".to_owned(),
            of(&|r| r.beside.gap_p99 / r.alone.gap_p99, 3),
        ),
        (
            "others' median time of a stream, with ÷ without".to_owned(),
            of(&|r| r.beside.stream_p50 / r.alone.stream_p50, 3),
        ),
        ("others' streams in a part of a round".to_owned(), of(&|r| r.beside.streams as f64, 0)),
    ];
    let mut text = String::from("| what | median of rounds (range) |\n|---|---:|\n");
    for (what, figure) in rows {
        text += &format!("| {what} | {figure} |\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_takes_differences_per_connection_and_ratios_per_round() {
        let options = Options { server: None, idle: 1024, deaf: 2, deaf_tokens: 5, seconds: 1, rounds: 1 };
        let tail = |p99| Tail { stream_p50: 1.0, stream_p99: p99, gap_p99: 2.0 * p99, streams: 7 };
        let resident = [100 << 20, 110 << 20, 111 << 20, 100 << 20];
        let table = table(&options, &[Round { alone: tail(2.0), beside: tail(2.1), resident }]);
        assert!(table.contains("an idle connection, KiB | 10.00 ("), "{table}");
        assert!(table.contains("never reads, KiB | 512.00 ("), "{table}");
        assert!(table.contains("p99 time of a stream, with ÷ without | 1.050 ("), "{table}");
    }
}
