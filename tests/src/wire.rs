//! HTTP by hand, for what a well-behaved client cannot send.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Sends raw bytes and returns everything until the server closes.
///
/// # Panics
/// When the connection cannot be made or read.
pub async fn raw(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.expect("the server listens");
    // A server that refuses early closes before everything is written.
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

/// Sends a request and returns its status and body.
///
/// # Panics
/// When there is no answer.
pub async fn request(address: SocketAddr, method: &str, path: &str, body: &[u8]) -> (u16, String) {
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let answer = raw(address, &[head.as_bytes(), body].concat()).await;
    let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    (status.unwrap_or_else(|| panic!("no status in {answer:?}")), body.to_owned())
}

/// The value of a metric without labels.
///
/// # Panics
/// When the server has no such metric.
pub async fn metric(address: SocketAddr, name: &str) -> f64 {
    let (_, page) = request(address, "GET", "/metrics", b"").await;
    let line = page.lines().find(|line| line.split([' ', '{']).next() == Some(name));
    let value = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
    value.unwrap_or_else(|| panic!("no metric {name} in\n{page}"))
}

/// Asks again until `condition` holds; the test runner's own time limit is the only one.
pub async fn until<F: Future<Output = bool>>(mut condition: impl FnMut() -> F) {
    while !condition().await {
        // The cores are the server's meanwhile.
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
}
