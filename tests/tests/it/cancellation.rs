//! A client that goes away frees what it held, whatever its request was doing.

use rheostat_tests::server::TestServer;
use rheostat_tests::wire::{metric, request, until};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

async fn send(server: &TestServer, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(server.http).await.expect("the server listens");
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(&[head.as_bytes(), body.as_bytes()].concat()).await.expect("written");
    stream
}

async fn used_pages(server: &TestServer) -> f64 {
    let (_, page) = request(server.http, "GET", "/metrics", b"").await;
    let line = page.lines().find(|line| line.starts_with("rheostat_kv_pages{") && line.contains("used"));
    line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).expect("the gauge is there")
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_the_connection_frees_every_page() {
    let server = TestServer::start(&["--max-num-seqs", "2", "--max-num-batched-tokens", "64"]).await;
    let endless = r#""max_tokens": 1500, "ignore_eos": true"#;
    let running = async || metric(server.http, "rheostat_sequences_running").await;
    let waiting = async || metric(server.http, "rheostat_sequences_waiting").await;
    for (what, body) in [
        ("decode, streaming", format!(r#"{{"prompt": "a", "stream": true, {endless}}}"#)),
        ("decode, not streaming", format!(r#"{{"prompt": "a", {endless}}}"#)),
        ("several choices, some of them queued", format!(r#"{{"prompt": "a", "n": 4, {endless}}}"#)),
        ("prefill", format!(r#"{{"prompt": "{}", {endless}}}"#, "word ".repeat(400))),
    ] {
        let client = send(&server, &body).await;
        until(async || running().await > 0.0).await;
        drop(client);
        until(async || running().await + waiting().await == 0.0).await;
        assert_eq!(used_pages(&server).await, 0.0, "{what}");
    }

    // In the queue: two endless requests hold both places.
    let holders = [send(&server, &format!(r#"{{"prompt": "b", "n": 2, {endless}}}"#)).await];
    until(async || running().await == 2.0).await;
    let queued = send(&server, &format!(r#"{{"prompt": "c", {endless}}}"#)).await;
    until(async || waiting().await == 1.0).await;
    drop(queued);
    until(async || waiting().await == 0.0).await;
    assert_eq!(running().await, 2.0);
    drop(holders);
    until(async || running().await == 0.0).await;
    assert_eq!(used_pages(&server).await, 0.0);
    server.stop().await;
}
