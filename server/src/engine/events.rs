//! A request's events on their way from the engine thread to whoever answers the client.
//!
//! The engine never waits for a reader. What the reader has not taken yet is joined: of each choice at most one
//! [`TokenEvent::Delta`] waits, and at most its end after it, so that a reader who is slow, or who never reads,
//! costs the bytes of its text and its tokens and not an allocation a token, and one who comes back gets all of
//! it at once. A reader who keeps up gets every token by itself.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;

use crate::request::TokenEvent;

/// The two ends of a request's events.
pub(super) fn channel() -> (EventSender, EventReceiver) {
    let queue = Arc::new(Queue::default());
    (EventSender(Arc::clone(&queue)), EventReceiver(queue))
}

#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    reader: AtomicWaker,
}

#[derive(Debug, Default)]
struct Waiting {
    events: VecDeque<TokenEvent>,
    /// The sender is gone: nothing more will come.
    complete: bool,
    /// The receiver is gone: nobody will read what comes.
    cancelled: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The engine's end. Dropping it ends the events.
#[derive(Debug)]
pub struct EventSender(Arc<Queue>);

impl EventSender {
    /// Hands an event to the reader. Never waits; what nobody will read is dropped.
    pub fn send(&self, event: TokenEvent) {
        {
            let mut waiting = self.0.lock();
            if waiting.cancelled {
                return;
            }
            if let Some(event) = joined(&mut waiting.events, event) {
                waiting.events.push_back(event);
            }
        }
        self.0.reader.wake();
    }

    /// The reader went away.
    pub fn is_cancelled(&self) -> bool {
        self.0.lock().cancelled
    }
}

impl Drop for EventSender {
    fn drop(&mut self) {
        self.0.lock().complete = true;
        self.0.reader.wake();
    }
}

/// Joins a delta to the one of its choice that still waits; gives back what cannot be joined.
fn joined(waiting: &mut VecDeque<TokenEvent>, event: TokenEvent) -> Option<TokenEvent> {
    let TokenEvent::Delta { choice, text, tokens } = event else { return Some(event) };
    // Deltas of different choices may pass each other. Nothing of this choice can follow its waiting delta but
    // its end, after which no delta comes.
    let before = waiting.iter_mut().rev().find_map(|before| match before {
        TokenEvent::Delta { choice: other, text, tokens } if *other == choice => Some((text, tokens)),
        _ => None,
    });
    match before {
        Some((before, before_tokens)) => {
            before.push_str(&text);
            before_tokens.extend(tokens);
            None
        }
        None => Some(TokenEvent::Delta { choice, text, tokens }),
    }
}

/// The reader's end. Dropping it cancels the request.
#[derive(Debug)]
pub struct EventReceiver(Arc<Queue>);

impl EventReceiver {
    /// The next event, or `None` at the end.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<TokenEvent>> {
        if let Poll::Ready(event) = self.take() {
            return Poll::Ready(event);
        }
        // Registered before it looks again: what comes after that look wakes it.
        self.0.reader.register(cx.waker());
        self.take()
    }

    /// What waits now; pending when there is nothing yet.
    fn take(&mut self) -> Poll<Option<TokenEvent>> {
        let mut waiting = self.0.lock();
        match waiting.events.pop_front() {
            Some(event) => Poll::Ready(Some(event)),
            None if waiting.complete => Poll::Ready(None),
            None => Poll::Pending,
        }
    }

    /// The next event that has come already.
    pub fn try_next(&mut self) -> Option<TokenEvent> {
        match self.take() {
            Poll::Ready(event) => event,
            Poll::Pending => None,
        }
    }
}

impl Drop for EventReceiver {
    fn drop(&mut self) {
        let events = {
            let mut waiting = self.0.lock();
            waiting.cancelled = true;
            std::mem::take(&mut waiting.events)
        };
        drop(events);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::request::{ChoiceUsage, FinishReason, TokenLogprob};

    fn delta(choice: usize, text: &str, token: u32) -> TokenEvent {
        let token = TokenLogprob { token, logprob: 0.0, top: Vec::new() };
        TokenEvent::Delta { choice, text: text.into(), tokens: vec![token] }
    }

    fn end(choice: usize) -> TokenEvent {
        let usage = ChoiceUsage::default();
        TokenEvent::Finished { choice, reason: FinishReason::Length, stop: None, usage }
    }

    fn next(events: &mut EventReceiver) -> Option<Option<TokenEvent>> {
        std::future::poll_fn(|cx| events.poll_next(cx)).now_or_never()
    }

    #[test]
    fn a_reader_that_keeps_up_gets_every_token() {
        let (sender, mut events) = channel();
        for (token, text) in [(1, "a"), (2, "b")] {
            sender.send(delta(0, text, token));
            assert_eq!(next(&mut events), Some(Some(delta(0, text, token))));
            assert_eq!(next(&mut events), None);
        }
        drop(sender);
        assert_eq!(next(&mut events), Some(None));
    }

    #[test]
    fn what_waits_is_joined_by_choice_and_ends_in_order() {
        let (sender, mut events) = channel();
        for token in 0..10_000 {
            sender.send(delta((token % 2) as usize, if token % 2 == 0 { "x" } else { "yz" }, token));
        }
        sender.send(end(1));
        sender.send(delta(0, "!", 7));
        sender.send(end(0));
        drop(sender);
        assert_eq!(events.0.lock().events.len(), 4, "one delta and one end a choice");
        let TokenEvent::Delta { choice: 0, text, tokens } = events.try_next().expect("a delta") else {
            panic!("the first choice's text comes first")
        };
        assert_eq!((text.len(), tokens.len(), tokens[1].token, tokens[5000].token), (5001, 5001, 2, 7));
        assert!(
            matches!(events.try_next(), Some(TokenEvent::Delta { choice: 1, text, .. }) if text.len() == 10_000)
        );
        assert_eq!([events.try_next(), events.try_next()], [Some(end(1)), Some(end(0))]);
        assert_eq!(next(&mut events), Some(None));
    }

    #[test]
    fn a_reader_that_goes_away_cancels_and_holds_nothing() {
        let (sender, events) = channel();
        sender.send(delta(0, "a", 1));
        assert!(!sender.is_cancelled());
        drop(events);
        assert!(sender.is_cancelled());
        sender.send(delta(0, "b", 2));
        assert!(sender.0.lock().events.is_empty());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_wake_up_is_lost_between_threads() {
        const TOKENS: u32 = 20_000;
        let (sender, mut events) = channel();
        let engine =
            std::thread::spawn(move || (0..TOKENS).for_each(|token| sender.send(delta(0, "a", token))));
        let mut seen = 0;
        while let Some(event) = std::future::poll_fn(|cx| events.poll_next(cx)).await {
            let TokenEvent::Delta { tokens, .. } = event else { panic!("only deltas were sent") };
            for token in tokens {
                assert_eq!(token.token, seen);
                seen += 1;
            }
        }
        assert_eq!(seen, TOKENS);
        engine.join().expect("no panic");
    }
}
