//! The receiving end of a request's events. Dropping it cancels the request.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::Stream;
use tokio::sync::mpsc;

use crate::request::{GenerateRequest, TokenEvent};

/// What a request holds for as long as its events are held: its permit and its entry among the live ids.
pub type Guard = Box<dyn Send + Sync>;

/// Events of one request, in order. Ends after every choice finished or the request failed.
pub struct TokenStream {
    events: mpsc::Receiver<TokenEvent>,
    _guard: Guard,
}

impl std::fmt::Debug for TokenStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenStream").finish_non_exhaustive()
    }
}

impl TokenStream {
    /// Wraps the receiving end of an event channel.
    pub fn new(events: mpsc::Receiver<TokenEvent>, guard: Guard) -> Self {
        Self { events, _guard: guard }
    }

    /// Events that `request` can cause at most: one a token, one end a choice, the prompt and a failure.
    /// A channel of this size never fills, so that the engine thread never waits for a slow reader, and
    /// what a slow reader can hold is bounded by what it asked for.
    pub fn capacity(request: &GenerateRequest) -> usize {
        request.n * (request.max_tokens + 2) + 2
    }

    /// The next event, or `None` at the end.
    pub async fn next(&mut self) -> Option<TokenEvent> {
        self.events.recv().await
    }
}

impl Stream for TokenStream {
    type Item = TokenEvent;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<TokenEvent>> {
        self.events.poll_recv(cx)
    }
}
