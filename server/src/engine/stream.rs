//! The receiving end of a request's events. Dropping it cancels the request.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use futures_util::Stream;

use super::events::EventReceiver;
use crate::energy::EnergySum;
use crate::request::{GenerateRequest, TokenEvent};

/// What a request holds for as long as its events are held: its permit and its entry among the live ids.
pub type Guard = Box<dyn Send + Sync>;

/// Events of one request, in order. Ends after every choice finished or the request failed.
pub struct TokenStream {
    events: EventReceiver,
    record: Option<Record>,
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
        Self { events, record: None, _guard: guard }
    }

    /// Writes a line of the access log when it is dropped: what came, and what it cost.
    #[must_use]
    pub fn recorded(self, record: Record) -> Self {
        Self { record: Some(record), ..self }
    }

    /// The next event, or `None` at the end.
    pub async fn next(&mut self) -> Option<TokenEvent> {
        let event = std::future::poll_fn(|cx| self.events.poll_next(cx)).await;
        self.note(event.as_ref());
        event
    }

    fn note(&mut self, event: Option<&TokenEvent>) {
        if let (Some(record), Some(event)) = (&mut self.record, event) {
            record.note(event);
        }
    }
}

impl Stream for TokenStream {
    type Item = TokenEvent;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<TokenEvent>> {
        let polled = self.events.poll_next(cx);
        if let Poll::Ready(event) = &polled {
            self.note(event.as_ref());
        }
        polled
    }
}

/// A line of the access log in the making.
#[derive(Debug)]
pub struct Record {
    id: String,
    key: Option<String>,
    profile: String,
    begin: Instant,
    prompt_tokens: usize,
    completion_tokens: usize,
    energy: EnergySum,
    /// How the last choice ended.
    reason: &'static str,
}

impl Record {
    /// Of `request`, which the client of `key` began.
    pub fn of(request: &GenerateRequest, key: Option<&str>) -> Self {
        Self {
            id: request.id.clone(),
            key: key.map(str::to_owned),
            profile: (*request.profile).to_owned(),
            begin: Instant::now(),
            prompt_tokens: request.prompt.len(),
            completion_tokens: 0,
            energy: EnergySum::default(),
            reason: "cancelled",
        }
    }

    fn note(&mut self, event: &TokenEvent) {
        match event {
            TokenEvent::Finished { reason, usage, .. } => {
                self.completion_tokens += usage.completion_tokens;
                self.energy.add(usage.energy);
                self.reason = reason.as_str();
            }
            TokenEvent::Failed(_) => self.reason = "error",
            TokenEvent::Prompt { .. } | TokenEvent::Delta { .. } => {}
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let (request_id, key, profile) = (&self.id, self.key.as_deref(), &self.profile);
        let (prompt_tokens, completion_tokens) = (self.prompt_tokens, self.completion_tokens);
        let energy = self.energy.total();
        let (joules, source) = (energy.map(|e| e.joules), energy.map(|e| e.source.as_str()));
        let (seconds, reason) = (self.begin.elapsed().as_secs_f32(), self.reason);
        tracing::info!(target: "rheostat::access", request_id, key, profile, prompt_tokens, completion_tokens, joules, source, reason, seconds, "generation");
    }
}
