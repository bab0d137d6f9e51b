//! Server-sent events, written straight into the bytes of a body.
//!
//! Whatever has come since the connection last asked goes out as one piece: a client that keeps up gets a piece
//! a token, and one that does not costs no more than it reads. What all chunks of a stream have in common is
//! serialized once ([`Frame`]).

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use futures_util::Stream;
use serde::Serialize;
use tokio::time::Sleep;

/// A comment this often keeps proxies from closing a stream that waits for its turn.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
const COMMENT: &[u8] = b":\n\n";
/// A piece is sent when it has so many bytes, even if more is there.
const PIECE: usize = 32 << 10;

/// What makes the events of a stream.
pub(super) trait Source: Send + Unpin + 'static {
    /// Writes the next event or events to `out`; ready with `false` after the last one, pending when there is
    /// none yet.
    fn poll_write(&mut self, cx: &mut Context<'_>, out: &mut Vec<u8>) -> Poll<bool>;
}

/// A response that streams `source`.
pub(super) fn response(source: impl Source) -> Response {
    let events = Events {
        source: Some(source),
        keep_alive: Box::pin(tokio::time::sleep(KEEP_ALIVE)),
        sent: Instant::now(),
    };
    let headers = [(CONTENT_TYPE, "text/event-stream"), (CACHE_CONTROL, "no-cache")];
    (headers, Body::from_stream(events)).into_response()
}

/// Appends one event that says `data`, which has no line break.
pub(super) fn text(out: &mut Vec<u8>, data: &str) {
    for part in ["data: ", data, "\n\n"] {
        out.extend_from_slice(part.as_bytes());
    }
}

/// Appends one event that says `body`. JSON in one line has no line breaks.
pub(super) fn json(out: &mut Vec<u8>, body: &impl Serialize) {
    let begin = out.len();
    out.extend_from_slice(b"data: ");
    if serde_json::to_writer(&mut *out, body).is_err() {
        out.truncate(begin);
        out.extend_from_slice(b"data: {}");
    }
    out.extend_from_slice(b"\n\n");
}

/// What the chunks of a stream have around what differs.
#[derive(Debug)]
pub(super) struct Frame {
    before: Vec<u8>,
    after: Vec<u8>,
}

impl Frame {
    /// Of `body`, whose member `member` is an empty array for what differs.
    pub(super) fn of(body: &impl Serialize, member: &str) -> Self {
        let mut event = Vec::new();
        json(&mut event, body);
        // Quotes within a text are escaped, so that this is found nowhere but at the member.
        let opening = format!("\"{member}\":[");
        let at = event.windows(opening.len()).position(|window| window == opening.as_bytes());
        let after = event.split_off(at.map_or(event.len(), |at| at + opening.len()));
        Self { before: event, after }
    }

    /// Appends an event with `item` as the only entry of the member.
    pub(super) fn write(&self, out: &mut Vec<u8>, item: &impl Serialize) {
        let begin = out.len();
        out.extend_from_slice(&self.before);
        if serde_json::to_writer(&mut *out, item).is_err() {
            // An array without the entry is still an event that clients can read.
            out.truncate(begin + self.before.len());
        }
        out.extend_from_slice(&self.after);
    }
}

struct Events<S> {
    /// `None` after the last event.
    source: Option<S>,
    keep_alive: Pin<Box<Sleep>>,
    /// When something was last sent.
    sent: Instant,
}

impl<S: Source> Stream for Events<S> {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let mut out = Vec::new();
        while out.len() < PIECE
            && let Some(source) = &mut this.source
        {
            match source.poll_write(cx, &mut out) {
                Poll::Pending => break,
                Poll::Ready(true) => {}
                Poll::Ready(false) => this.source = None,
            }
        }
        if out.is_empty() {
            if this.source.is_none() {
                return Poll::Ready(None);
            }
            std::task::ready!(this.poll_keep_alive(cx));
            out.extend_from_slice(COMMENT);
        }
        this.sent = Instant::now();
        Poll::Ready(Some(Ok(out.into())))
    }
}

impl<S> Events<S> {
    /// Ready when nothing was sent for a while. The timer is set anew when it fires, and not with every event.
    fn poll_keep_alive(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            std::task::ready!(self.keep_alive.as_mut().poll(cx));
            let silent = self.sent.elapsed();
            let next = KEEP_ALIVE.saturating_sub(silent);
            let due = next.is_zero();
            let wait = if due { KEEP_ALIVE } else { next };
            self.keep_alive.as_mut().reset(tokio::time::Instant::now() + wait);
            if due {
                return Poll::Ready(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_framed_event_is_the_whole_event() {
        let body =
            |choices: serde_json::Value| json!({"id": "x\"choices\":[\"", "choices": choices, "usage": null});
        let item = json!({"text": "a\nb \u{2028} \"q\""});
        let frame = Frame::of(&body(json!([])), "choices");
        let (mut framed, mut whole) = (Vec::new(), Vec::new());
        frame.write(&mut framed, &item);
        json(&mut whole, &body(json!([item])));
        assert_eq!(String::from_utf8_lossy(&framed), String::from_utf8_lossy(&whole));
        assert_eq!(
            framed.iter().filter(|byte| **byte == b'\n').count(),
            2,
            "one line, and the end of the event"
        );
    }

    struct Counter {
        ready: usize,
        end: usize,
        at: usize,
    }

    impl Source for Counter {
        fn poll_write(&mut self, _: &mut Context<'_>, out: &mut Vec<u8>) -> Poll<bool> {
            if self.at == self.end {
                return Poll::Ready(false);
            }
            if self.at == self.ready {
                return Poll::Pending;
            }
            self.at += 1;
            text(out, "x");
            Poll::Ready(true)
        }
    }

    fn events(ready: usize, end: usize) -> Events<Counter> {
        Events {
            source: Some(Counter { ready, end, at: 0 }),
            keep_alive: Box::pin(tokio::time::sleep(KEEP_ALIVE)),
            sent: Instant::now(),
        }
    }

    #[tokio::test]
    async fn what_is_ready_goes_out_together_and_the_end_ends() {
        let pieces: Vec<_> = events(4, 3).map(|piece| piece.expect("infallible")).collect().await;
        assert_eq!(pieces, ["data: x\n\n".repeat(3)]);
        let pieces: Vec<_> =
            events(20_000, 10_000).map(|piece| piece.expect("infallible").len()).collect().await;
        assert_eq!(pieces.iter().sum::<usize>(), 90_000);
        assert!(pieces.iter().all(|len| *len < PIECE + 16), "{pieces:?}");
    }

    #[tokio::test]
    async fn silence_is_broken_by_comments() {
        let mut events = events(1, 2);
        assert!(events.next().await.is_some());
        // The timer fires early: something was sent a moment ago.
        events.keep_alive = Box::pin(tokio::time::sleep(Duration::ZERO));
        assert!(futures_util::poll!(events.next()).is_pending());
        // What was sent lies long ago.
        events.keep_alive = Box::pin(tokio::time::sleep(Duration::ZERO));
        events.sent -= 2 * KEEP_ALIVE;
        assert_eq!(events.next().await, Some(Ok(Bytes::from_static(COMMENT))));
    }
}
