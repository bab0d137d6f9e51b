//! The clients whose times count.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::overhead::{RawClient, completion, is_end_of_stream};

/// Tokens of a stream.
const TOKENS: usize = 64;
/// Streams at once.
const CLIENTS: usize = 2;

/// The tail of what clients saw, in seconds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tail {
    pub(super) stream_p50: f64,
    pub(super) stream_p99: f64,
    pub(super) gap_p99: f64,
    pub(super) streams: usize,
}

/// Streams one after the other over a few connections for `time`.
///
/// # Errors
/// The first that fails.
pub(super) fn measure(to: SocketAddr, time: Duration) -> Result<Tail, String> {
    let end = Instant::now() + time;
    let seen: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(move || stream_until(to, end))).collect();
        threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
    });
    let (mut streams, mut gaps) = (Vec::new(), Vec::new());
    for one in seen {
        let one = one.map_err(|_| "a client panicked".to_owned())?.map_err(|e| e.to_string())?;
        streams.extend(one.0);
        gaps.extend(one.1);
    }
    let (stream_p50, stream_p99) = (quantile(&mut streams, 0.5), quantile(&mut streams, 0.99));
    Ok(Tail { stream_p50, stream_p99, gap_p99: quantile(&mut gaps, 0.99), streams: streams.len() })
}

fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let index = (values.len() as f64 * share) as usize;
    values.get(index.min(values.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
}

/// Times of streams, and between their pieces.
fn stream_until(to: SocketAddr, end: Instant) -> std::io::Result<(Vec<f64>, Vec<f64>)> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    let request = completion(TOKENS, true);
    let (mut streams, mut gaps) = (Vec::new(), Vec::new());
    let mut buffer = vec![0; 1 << 16];
    let mut tail = Vec::new();
    while Instant::now() < end {
        let begin = Instant::now();
        stream.write_all(&request)?;
        tail.clear();
        let mut last: Option<Instant> = None;
        while !is_end_of_stream(&tail) {
            let read = stream.read(&mut buffer)?;
            if read == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            let now = Instant::now();
            gaps.extend(last.replace(now).map(|last| (now - last).as_secs_f64()));
            tail.extend_from_slice(&buffer[..read]);
            // Only the end is looked at.
            tail.drain(..tail.len().saturating_sub(16));
        }
        streams.push(begin.elapsed().as_secs_f64());
    }
    Ok((streams, gaps))
}

/// Waits until the server has nothing to compute.
pub(super) fn until_idle(to: SocketAddr) -> Result<(), String> {
    let mut client = RawClient::connect(to).map_err(|e| e.to_string())?;
    for _ in 0..3000 {
        client.exchange(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").map_err(|e| e.to_string())?;
        let text = client.text();
        let is_zero = |name: &str| text.lines().any(|line| line.strip_prefix(name) == Some(" 0"));
        if is_zero("rheostat_sequences_running") && is_zero("rheostat_sequences_waiting") {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Err("the server is still computing after five minutes".into())
}
