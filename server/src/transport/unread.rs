//! HTTP/2 streams whose client opens no window. The socket takes everything, so that [`super::stall`] sees nothing;
//! what shows is that the next part of the body is not asked for.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use http_body::{Body, Frame, SizeHint};
use tokio::time::Instant;

/// The streams of one server that send something, and how long each may wait for its client.
pub(crate) struct Unread {
    patience: Duration,
    streams: Mutex<HashMap<u64, Arc<dyn Stream>>>,
    next: AtomicU64,
}

impl std::fmt::Debug for Unread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unread").field("patience", &self.patience).finish_non_exhaustive()
    }
}

/// A body as the sweep sees it.
trait Stream: Send + Sync {
    /// Drops the body if its client has taken nothing since `since`.
    fn end_if_unread(&self, since: Instant);
}

/// The body, and when its last part was handed over; `None` while the body is what is waited for.
struct Slot<B> {
    body: Option<B>,
    handed_over: Option<Instant>,
}

impl<B: Send> Stream for Mutex<Slot<B>> {
    fn end_if_unread(&self, since: Instant) {
        let ended = {
            let mut slot = lock(self);
            if slot.handed_over.is_some_and(|at| at <= since) { slot.body.take() } else { None }
        };
        if ended.is_some() {
            tracing::debug!("a stream that its client did not read was ended");
        }
        // Dropped without the lock: it cancels the request.
        drop(ended);
    }
}

impl Unread {
    /// Ends streams whose client takes nothing of what is sent for `patience`, looking four times in that time. In
    /// a runtime; the sweep ends with the last clone.
    pub(crate) fn start(patience: Duration) -> Arc<Self> {
        let unread = Arc::new(Self { patience, streams: Mutex::default(), next: AtomicU64::new(0) });
        tokio::spawn(sweep(Arc::downgrade(&unread)));
        unread
    }

    /// `body`, which ends early when its client does not read it. Then `error` says so to a client that reads again.
    pub(crate) fn watch<B: Body + Send + Unpin + 'static>(
        self: &Arc<Self>,
        body: B,
        error: fn() -> B::Error,
    ) -> WatchedBody<B> {
        let slot = Arc::new(Mutex::new(Slot { body: Some(body), handed_over: None }));
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.streams).insert(id, Arc::clone(&slot) as Arc<dyn Stream>);
        WatchedBody { slot, error, id, unread: Arc::clone(self) }
    }

    fn end_unread(&self) {
        let Some(since) = Instant::now().checked_sub(self.patience) else { return };
        let streams: Vec<_> = lock(&self.streams).values().cloned().collect();
        streams.iter().for_each(|stream| stream.end_if_unread(since));
    }
}

async fn sweep(unread: Weak<Unread>) {
    while let Some(patience) = unread.upgrade().map(|unread| unread.patience) {
        tokio::time::sleep(patience / 4).await;
        if let Some(unread) = unread.upgrade() {
            unread.end_unread();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A body under watch.
pub(crate) struct WatchedBody<B: Body> {
    slot: Arc<Mutex<Slot<B>>>,
    error: fn() -> B::Error,
    id: u64,
    unread: Arc<Unread>,
}

impl<B: Body> Drop for WatchedBody<B> {
    fn drop(&mut self) {
        lock(&self.unread.streams).remove(&self.id);
    }
}

impl<B: Body + Unpin> Body for WatchedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let mut slot = lock(&self.slot);
        let Some(body) = &mut slot.body else { return Poll::Ready(Some(Err((self.error)()))) };
        let polled = Pin::new(body).poll_frame(cx);
        slot.handed_over = polled.is_ready().then(Instant::now);
        polled
    }

    fn is_end_stream(&self) -> bool {
        lock(&self.slot).body.as_ref().is_some_and(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        lock(&self.slot).body.as_ref().map(Body::size_hint).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use http_body_util::{BodyExt, StreamBody};
    use tokio::sync::mpsc;
    use tokio_stream::wrappers::ReceiverStream;

    use super::*;

    /// Time stands still but for what the test lets pass.
    #[tokio::test(start_paused = true)]
    async fn a_stream_that_nobody_reads_ends_and_one_that_has_nothing_to_say_does_not() {
        let unread = Unread::start(Duration::from_secs(60));
        let stream = || {
            let (parts, rest) = mpsc::channel::<Result<Frame<&'static [u8]>, io::Error>>(8);
            let body = StreamBody::new(ReceiverStream::new(rest));
            (parts, unread.watch(body, || io::ErrorKind::TimedOut.into()))
        };
        let part = || Ok(Frame::data(b"part".as_slice()));
        let ((said, mut deaf), (quiet, mut patient)) = (stream(), stream());
        said.send(part()).await.expect("room");
        assert!(deaf.frame().await.expect("a part").is_ok());
        assert!(futures_util::poll!(Box::pin(patient.frame())).is_pending());
        tokio::time::sleep(Duration::from_secs(59)).await;
        assert!(!said.is_closed() && !quiet.is_closed());
        tokio::time::sleep(Duration::from_secs(20)).await;
        assert!(said.is_closed(), "what it was sent from has gone");
        let error = deaf.frame().await.expect("an error").expect_err("it was ended");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        // Who waits for a part is not who leaves one unread, however long it takes.
        quiet.send(part()).await.expect("still there");
        assert!(patient.frame().await.expect("a part").is_ok());
        drop((deaf, patient));
        assert!(lock(&unread.streams).is_empty());
    }
}
