//! A client that costs as little as one can: bytes made beforehand, one blocking socket, nothing parsed but
//! where an answer ends.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

const CHUNKED_END: &[u8] = b"\r\n0\r\n\r\n";

/// One kept-alive connection.
#[derive(Debug)]
pub(crate) struct RawClient {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl RawClient {
    pub(crate) fn connect(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        Ok(Self { stream, buffer: Vec::new() })
    }

    /// Sends `request` and reads the answer to its end; how long that took.
    ///
    /// # Errors
    /// The connection's, and answers that are not 200.
    pub(crate) fn exchange(&mut self, request: &[u8]) -> io::Result<Duration> {
        let begin = Instant::now();
        self.stream.write_all(request)?;
        read_message(&mut self.stream, &mut self.buffer)?;
        let time = begin.elapsed();
        self.checked().map(|()| time)
    }

    /// As [`RawClient::exchange`] of a stream, but looks only once in a `pause`, so that it hardly takes
    /// anything of the machine while the answer is made.
    pub(super) fn exchange_lazily(&mut self, request: &[u8], pause: Duration) -> io::Result<Duration> {
        let begin = Instant::now();
        self.stream.write_all(request)?;
        self.buffer.clear();
        while !is_end_of_stream(&self.buffer) {
            std::thread::sleep(pause);
            read_some(&mut self.stream, &mut self.buffer)?;
        }
        let time = begin.elapsed();
        self.checked().map(|()| time)
    }

    /// The last answer's body, as text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.buffer).into_owned()
    }

    /// Gives back what the last answer took.
    pub(crate) fn forget(&mut self) {
        self.buffer = Vec::new();
    }

    fn checked(&self) -> io::Result<()> {
        if self.buffer.starts_with(b"HTTP/1.1 200") {
            return Ok(());
        }
        let start = String::from_utf8_lossy(&self.buffer[..self.buffer.len().min(400)]).into_owned();
        Err(io::Error::other(format!("the server refused: {start}")))
    }
}

/// Whether a stream that came so far is at its end.
pub(crate) fn is_end_of_stream(bytes: &[u8]) -> bool {
    bytes.ends_with(CHUNKED_END)
}

/// Reads one message, request or answer, into `buffer`, from its first byte to its last.
pub(super) fn read_message(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> io::Result<()> {
    buffer.clear();
    let mut end = None;
    while !is_complete(buffer, &mut end) {
        read_some(stream, buffer)?;
    }
    Ok(())
}

fn read_some(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> io::Result<()> {
    let len = buffer.len();
    buffer.resize(len + (1 << 16), 0);
    let read = stream.read(&mut buffer[len..]);
    buffer.truncate(len + read.as_ref().map_or(0, |read| *read));
    match read? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

/// `end` is where a message of known length ends, found once; 0 for one that ends with its last chunk.
fn is_complete(buffer: &[u8], end: &mut Option<usize>) -> bool {
    if end.is_none() {
        let Some(head) = buffer.windows(4).position(|four| four == b"\r\n\r\n") else { return false };
        let text = String::from_utf8_lossy(&buffer[..head]).to_ascii_lowercase();
        let length = text.lines().find_map(|line| line.strip_prefix("content-length:"));
        *end = Some(match length.and_then(|length| length.trim().parse::<usize>().ok()) {
            Some(length) => head + 4 + length,
            None if text.contains("transfer-encoding: chunked") => 0,
            None => head + 4,
        });
    }
    match *end {
        Some(0) => is_end_of_stream(buffer),
        Some(end) => buffer.len() >= end,
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_end_where_their_head_says() {
        let complete = |text: &str| is_complete(text.as_bytes(), &mut None);
        assert!(!complete("GET / HTTP/1.1\r\nhost: x\r\n"));
        assert!(complete("GET / HTTP/1.1\r\nhost: x\r\n\r\n"));
        assert!(!complete("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab"));
        assert!(complete("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"));
        let chunked = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n";
        assert!(!complete(chunked));
        assert!(complete(&format!("{chunked}0\r\n\r\n")));
    }
}
