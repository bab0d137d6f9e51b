//! What is measured: the real server over an engine whose model does nothing to speak of, and beside it a
//! responder that is no server at all. Both run in a process of their own, so that its time is theirs alone.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;

use clap::Parser;
use model_zoo::compression::Offer;
use model_zoo::loader::{LoadedModel, TokenizerSource};
use model_zoo::models::toy::{ToyModel, ToyOptions};
use model_zoo::tokenizer::Tokenizer;
use rheostat::config::Config;
use rheostat::config::options;
use rheostat::run::{Listeners, NamedModel, run};
use rheostat::telemetry::logs;

use super::client::read_message;

/// Bytes of the responder's answer: those of a short completion.
const ANSWER: usize = 900;

/// The stub server's flags: the real server's.
#[derive(Debug, Clone, clap::Args)]
// A struct's name is its group's, and the flattened one is called Options too.
#[group(id = "stub")]
pub(crate) struct Options {
    #[command(flatten)]
    server: options::Options,
}

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    options: options::Options,
}

impl Options {
    /// On ports that the system chooses, everything else by default.
    #[cfg(test)]
    fn parse(flags: &[&str]) -> Self {
        Self { server: Flags::parse_from(std::iter::once(&"stub").chain(flags)).options }
    }
}

/// Serves until standard input ends, as it does when whoever started this process is gone.
pub(crate) fn main(options: &Options) -> Result<(), String> {
    let text = |e: std::io::Error| e.to_string();
    let config = Config::resolve(options.server.clone()).map_err(|e| e.to_string())?;
    // Logs are written as the server writes them, access lines included: they are part of what a request costs.
    logs::init(&config.log_filter, config.log_format)?;
    let responder = TcpListener::bind("127.0.0.1:0").map_err(text)?;
    let canned = responder.local_addr().map_err(text)?;
    std::thread::Builder::new().name("responder".into()).spawn(move || respond(&responder)).map_err(text)?;
    let runtime = tokio::runtime::Runtime::new().map_err(text)?;
    runtime.block_on(async {
        let listeners = Listeners::bind(&config).await.map_err(|e| e.to_string())?;
        let http = listeners.http.local_addr().map_err(text)?;
        println!("serving toy on http://{http} and fixed answers on http://{canned}");
        let stopped = async {
            let end = || std::io::stdin().read_to_end(&mut Vec::new());
            let _ = tokio::task::spawn_blocking(end).await;
        };
        run(config, model(), listeners, stopped).await.map_err(|e| e.to_string())
    })
}

fn model() -> NamedModel {
    let loaded = LoadedModel {
        model: Box::new(ToyModel::new(ToyOptions::default())),
        // Where a real model's tokenizer would be: the toy's is made in memory.
        tokenizer: TokenizerSource::Folder(PathBuf::new()),
        vision: None,
    };
    NamedModel { name: "toy".into(), loaded, tokenizer: Tokenizer::toy(), offer: Offer::default() }
}

/// Answers every message on every connection with the same bytes, a thread a connection: what remains is the
/// operating system's part and the client's.
fn respond(listener: &TcpListener) {
    for stream in listener.incoming().flatten() {
        std::thread::spawn(move || serve(stream));
    }
}

fn serve(mut stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let mut answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {ANSWER}\r\n\r\n").into_bytes();
    answer.resize(answer.len() + ANSWER, b'x');
    let mut buffer = Vec::new();
    while read_message(&mut stream, &mut buffer).is_ok() && stream.write_all(&answer).is_ok() {}
}

/// Where a server says that it listens for HTTP, in the line that it prints when it starts.
pub(super) fn addresses(line: &str) -> Vec<SocketAddr> {
    line.split_whitespace().filter_map(|word| word.strip_prefix("http://")?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_the_servers() {
        let options = Options::parse(&["--http", "127.0.0.1:0", "--max-concurrent-requests", "9"]);
        assert_eq!(options.server.limits.max_concurrent_requests, Some(9));
        let line =
            "serving m on http://127.0.0.1:80 and grpc://127.0.0.1:82 and more on http://127.0.0.1:81\n";
        assert_eq!(addresses(line).iter().map(SocketAddr::port).collect::<Vec<_>>(), [80, 81]);
        assert!(addresses("").is_empty());
    }
}
