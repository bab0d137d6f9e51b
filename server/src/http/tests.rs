//! The front end over real connections, before the real engine with a toy model.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::{AppState, serve};
use crate::config::HttpConfig;
use crate::error::ErrorKind;
use crate::request::Caller;
use crate::service::Service;
use crate::telemetry::Metrics;
use crate::toy;
use crate::traces::Tracer;
use crate::transport::Transport;

/// Within this, what must happen has happened.
const LIMIT: Duration = Duration::from_secs(60);

struct Harness {
    address: SocketAddr,
    service: Service,
    metrics: Arc<Metrics>,
}

impl Harness {
    /// A server that lets clients leave what is sent unread for `write_timeout`.
    async fn start(write_timeout: Duration) -> Self {
        let (service, metrics) = toy::service();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let config = HttpConfig {
            address,
            max_body: 1 << 20,
            max_connections: 100,
            metrics_need_key: false,
            header_timeout: LIMIT,
            write_timeout,
        };
        let state = AppState::new(service.clone(), Arc::clone(&metrics), Tracer::off(), &config);
        let transport = Transport::new(listener, 100, None).with_write_timeout(write_timeout);
        tokio::spawn(serve(transport, state, std::future::pending()));
        Self { address, service, metrics }
    }

    async fn send(&self, id: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.expect("the server listens");
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-request-id: {id}\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await.expect("written");
        stream
    }

    /// Waits until `holds`.
    async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let waited = tokio::time::timeout(LIMIT, async {
            while !holds(self) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        assert!(waited.await.is_ok(), "never: {what}; {}", self.metrics.render());
    }

    fn shows(&self, line: &str) -> bool {
        self.metrics.render().lines().any(|shown| shown == line)
    }

    fn is_live(&self, id: &str) -> bool {
        !matches!(self.service.abort(id, &Caller::default()), Err(error) if error.kind == ErrorKind::NotFound)
    }
}

/// Everything until the stream's end.
async fn read_stream(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    while !text.ends_with(b"\r\n0\r\n\r\n") {
        assert!(
            stream.read_buf(&mut text).await.expect("readable") > 0,
            "{}",
            String::from_utf8_lossy(&text)
        );
    }
    String::from_utf8(text).expect("UTF-8")
}

/// Some ten megabytes of answer: more than sockets and buffers hold.
/// Sampled, so that every choice runs to its length only because the end of the text is ignored.
const LONG: &str =
    r#"{"prompt": "a", "max_tokens": 600, "n": 32, "ignore_eos": true, "logprobs": 20, "stream": true}"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_never_reads_holds_up_neither_the_engine_nor_others() {
    let harness = Harness::start(LIMIT).await;
    let deaf = harness.send("deaf", LONG).await;
    // The engine ends it although nobody reads, long before its time to be read is up.
    harness.until("it ends", |h| h.shows("rheostat_sequences_finished_total{reason=\"length\"} 32")).await;
    harness.until("its pages are free", |h| h.shows("rheostat_kv_pages{state=\"used\"} 0")).await;
    // Others are served meanwhile.
    let mut other =
        harness.send("other", r#"{"prompt": "a", "max_tokens": 3, "temperature": 0, "stream": true}"#).await;
    let answer = read_stream(&mut other).await;
    // What has come while the connection was busy comes as one piece.
    let text: String =
        answer.split("\"text\":\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    assert_eq!(text, "bcd", "{answer}");
    assert!(answer.contains("text/event-stream") && answer.contains("data: [DONE]\n\n"), "{answer}");
    assert!(harness.is_live("deaf"), "what it has not read is kept for it");
    drop(deaf);
    harness.until("its place is free once it has gone", |h| !h.is_live("deaf")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_never_reads_loses_its_place_when_its_time_is_up() {
    let harness = Harness::start(Duration::from_millis(200)).await;
    let mut deaf = harness.send("deaf", LONG).await;
    // By its length or cut off, according to which comes first: only that both the engine and the front end let go of it.
    let finished = |h: &Harness| {
        let text = h.metrics.render();
        let counts = text.lines().filter(|line| line.starts_with("rheostat_sequences_finished_total{"));
        counts.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>()
    };
    harness.until("all its sequences end", |h| finished(h) == 32.0).await;
    harness.until("its place is free", |h| !h.is_live("deaf")).await;
    // Its connection was closed in the middle: what the sockets held can be read, and it is no whole answer.
    let mut held = Vec::new();
    while deaf.read_buf(&mut held).await.is_ok_and(|read| read > 0) {}
    assert!(!held.ends_with(b"\r\n0\r\n\r\n"), "{} bytes", held.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_late_gets_everything_in_few_pieces() {
    let harness = Harness::start(LIMIT).await;
    let body = r#"{"prompt": "a", "max_tokens": 600, "temperature": 0, "stream": true, "logprobs": 0, "stream_options": {"include_usage": true}}"#;
    let mut late = harness.send("late", body).await;
    harness.until("it runs", |h| h.shows("rheostat_sequences_running 1")).await;
    harness.until("it ends", |h| h.shows("rheostat_sequences_running 0")).await;
    let answer = read_stream(&mut late).await;
    let events = answer.lines().filter_map(|line| line.strip_prefix("data: "));
    let events = events.filter_map(|event| serde_json::from_str::<serde_json::Value>(event).ok());
    let (mut text, mut tokens, mut usage) = (String::new(), 0, 0);
    for event in events {
        if let Some(choice) = event["choices"].get(0) {
            text += choice["text"].as_str().expect("a text");
            tokens += choice["logprobs"]["tokens"].as_array().map_or(0, Vec::len);
        }
        usage += event["usage"]["completion_tokens"].as_u64().unwrap_or(0);
    }
    let alphabet: String = (1..=600u32).map(|i| char::from(b'a' + (i % 26) as u8)).collect();
    assert_eq!((text, tokens, usage), (alphabet, 600, 600));
}
