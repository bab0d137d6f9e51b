//! The receiving end of a request's events. Dropping it cancels the request.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::Stream;

use super::events::EventReceiver;
use crate::request::TokenEvent;

/// What a request holds for as long as its events are held: its permit and its entry among the live ids.
pub type Guard = Box<dyn Send + Sync>;

/// Events of one request, in order. Ends after every choice finished or the request failed.
pub struct TokenStream {
    events: EventReceiver,
    _guard: Guard,
}

impl std::fmt::Debug for TokenStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenStream").finish_non_exhaustive()
    }
}

impl TokenStream {
    /// Wraps the receiving end of a request's events.
    pub fn new(events: EventReceiver, guard: Guard) -> Self {
        Self { events, _guard: guard }
    }

    /// The next event, or `None` at the end.
    pub async fn next(&mut self) -> Option<TokenEvent> {
        std::future::poll_fn(|cx| self.events.poll_next(cx)).await
    }
}

impl Stream for TokenStream {
    type Item = TokenEvent;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<TokenEvent>> {
        self.events.poll_next(cx)
    }
}
