//! Sending load, and counting time from when a request was due.
//!
//! An open loop sends every request when it is due, whether or not earlier ones were answered, as a crowd of
//! clients does. Where something holds a request back (a full client, a slow machine), the wait is part of its
//! latency: a stalled server is charged with all the requests that met the stall, not only with those that
//! happened to be under way (coordinated omission).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use crate::client::{Answer, Failure, Target, Usage};
use crate::workload::{Call, Planned, Workload};

/// One request's fate. Times are from the start of the run.
#[derive(Debug, Clone)]
pub struct Record {
    /// Index of its share.
    pub share: usize,
    /// When it should have been sent.
    pub due: Duration,
    /// When it was.
    pub sent: Duration,
    /// When its answer was complete, or failed.
    pub end: Duration,
    /// What came back.
    pub outcome: Result<Timing, Failure>,
}

/// A complete answer's times, counted from when the request was due.
#[derive(Debug, Clone, PartialEq)]
pub struct Timing {
    /// To the first text; `None` where the answer was not streamed.
    pub first_token: Option<Duration>,
    /// Mean of the further tokens'; `None` where there were none, or the answer was not streamed.
    pub per_token: Option<Duration>,
    /// To the end.
    pub total: Duration,
    /// What the server counted.
    pub usage: Usage,
}

/// How far a run is. Shared with whoever shows it.
#[derive(Debug, Default)]
pub struct Progress {
    /// Requests sent.
    pub sent: AtomicU64,
    /// Requests that were answered.
    pub answered: AtomicU64,
    /// Requests that failed.
    pub failed: AtomicU64,
}

/// A target, with what holds for every request.
#[derive(Debug)]
pub struct Driver<T> {
    target: Arc<T>,
    /// How long a request may take from when it was sent.
    limit: Duration,
    progress: Arc<Progress>,
}

impl<T> Clone for Driver<T> {
    fn clone(&self) -> Self {
        let Self { target, limit, progress } = self;
        Self { target: Arc::clone(target), limit: *limit, progress: Arc::clone(progress) }
    }
}

impl<T: Target> Driver<T> {
    /// A driver of `target`; a request that takes longer than `limit` has failed.
    pub fn new(target: T, limit: Duration) -> Self {
        Self { target: Arc::new(target), limit, progress: Arc::default() }
    }

    /// How far the run is.
    pub fn progress(&self) -> &Arc<Progress> {
        &self.progress
    }

    /// Sends every request when it is due, `max_in_flight` at once at most.
    pub async fn open_loop(&self, planned: Vec<Planned>, max_in_flight: usize) -> Vec<Record> {
        let start = Instant::now();
        let permits = Arc::new(Semaphore::new(max_in_flight));
        let mut tasks = JoinSet::new();
        for Planned { due, call } in planned {
            sleep_until(start + due).await;
            let (driver, permits) = (self.clone(), Arc::clone(&permits));
            tasks.spawn(async move {
                // The semaphore is never closed; its wait is part of the latency.
                let _permit = permits.acquire().await;
                driver.one(call, (start, due)).await
            });
        }
        let mut records = Vec::new();
        while let Some(record) = tasks.join_next().await {
            records.extend(record.ok());
        }
        records.sort_by_key(|record| record.due);
        records
    }

    /// `concurrency` clients, each of which sends its next request when the last one was answered, until
    /// `duration` is over or `most` requests were sent. A request is due when it is sent.
    pub async fn closed_loop(
        &self,
        workload: &Arc<Workload>,
        concurrency: usize,
        (duration, most): (Duration, usize),
    ) -> Vec<Record> {
        let start = Instant::now();
        let next = Arc::new(AtomicUsize::new(0));
        let mut clients = JoinSet::new();
        for _ in 0..concurrency {
            let (driver, workload, next) = (self.clone(), Arc::clone(workload), Arc::clone(&next));
            clients.spawn(async move {
                let mut records = Vec::new();
                while start.elapsed() < duration {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= most {
                        break;
                    }
                    let call = workload.call(index as u64);
                    records.push(driver.one(call, (start, start.elapsed())).await);
                }
                records
            });
        }
        let mut records = Vec::new();
        while let Some(of_client) = clients.join_next().await {
            records.extend(of_client.unwrap_or_default());
        }
        records.sort_by_key(|record| record.due);
        records
    }

    async fn one(&self, call: Call, (start, due): (Instant, Duration)) -> Record {
        let (share, sent) = (call.share, start.elapsed());
        self.progress.sent.fetch_add(1, Ordering::Relaxed);
        let answer = timeout(self.limit, self.target.call(call)).await.unwrap_or(Err(Failure::Timeout));
        let counter = if answer.is_ok() { &self.progress.answered } else { &self.progress.failed };
        counter.fetch_add(1, Ordering::Relaxed);
        let end = answer.as_ref().map_or_else(|_| Instant::now(), |answer| answer.end);
        let outcome = answer.map(|answer| timing(answer, start + due));
        Record { share, due, sent, end: end.saturating_duration_since(start), outcome }
    }
}

fn timing(answer: Answer, due: Instant) -> Timing {
    let Answer { first_token, last_token, end, usage } = answer;
    let gaps = u32::try_from(usage.completion_tokens.saturating_sub(1)).unwrap_or(u32::MAX);
    let per_token = match (first_token, last_token) {
        (Some(first), Some(last)) if gaps > 0 => Some(last.saturating_duration_since(first) / gaps),
        _ => None,
    };
    Timing {
        first_token: first_token.map(|first| first.saturating_duration_since(due)),
        per_token,
        total: end.saturating_duration_since(due),
        usage,
    }
}

/// Failures by kind.
pub fn failures<'a>(records: impl IntoIterator<Item = &'a Record>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for failure in records.into_iter().filter_map(|record| record.outcome.as_ref().err()) {
        *counts.entry(failure.to_string()).or_default() += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVICE: Duration = Duration::from_millis(10);

    /// Answers in ten milliseconds, one request at a time, but not from second 1 to second 3.
    struct Stalling {
        start: Instant,
        turn: Semaphore,
    }

    impl Target for Stalling {
        async fn call(&self, _call: Call) -> Result<Answer, Failure> {
            let _turn = self.turn.acquire().await;
            let (from, to) = (self.start + Duration::from_secs(1), self.start + Duration::from_secs(3));
            if (from..to).contains(&Instant::now()) {
                sleep_until(to).await;
            }
            sleep_until(Instant::now() + SERVICE).await;
            let now = Instant::now();
            let usage = Usage { completion_tokens: 1, ..Usage::default() };
            Ok(Answer { first_token: Some(now), last_token: Some(now), end: now, usage })
        }
    }

    fn driver() -> Driver<Stalling> {
        let target = Stalling { start: Instant::now(), turn: Semaphore::new(1) };
        Driver::new(target, Duration::from_secs(60))
    }

    /// A request each 100 milliseconds for 4 seconds.
    fn planned() -> Vec<Planned> {
        let call = Call { prompt: "a".into(), max_tokens: 1, share: 0, seed: 0 };
        (0..40).map(|i| Planned { due: Duration::from_millis(100 * i), call: call.clone() }).collect()
    }

    fn slower_than(records: &[Record], limit: Duration, from: impl Fn(&Record) -> Duration) -> usize {
        records.iter().filter(|record| record.end - from(record) > limit).count()
    }

    #[tokio::test(start_paused = true)]
    async fn a_stall_is_charged_to_every_request_that_was_due_in_it() {
        for max_in_flight in [1, 1000] {
            let records = driver().open_loop(planned(), max_in_flight).await;
            let limit = 2 * SERVICE;
            // Due from 1.0 s to 3.1 s: those of the stall, and those that wait for them (20 × 10 ms more).
            let late = slower_than(&records, limit, |record| record.due);
            assert!((20..=23).contains(&late), "{late} of 40 with {max_in_flight} in flight");
            let worst =
                records.iter().map(|record| record.outcome.as_ref().map(|t| t.total)).max_by_key(|t| t.ok());
            assert!(worst.is_some_and(|t| t.is_ok_and(|t| t >= Duration::from_secs(2))));
        }
        // The mistake that this guards against: from when they were sent, only one was slow.
        let records = driver().open_loop(planned(), 1).await;
        assert_eq!(slower_than(&records, 2 * SERVICE, |record| record.sent), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_closed_loop_keeps_its_concurrency_and_its_end() {
        let workload = Arc::new(Workload {
            seed: 1,
            prompt: crate::workload::Lengths::Fixed(1),
            output: crate::workload::Lengths::Fixed(1),
            shares: vec!["none".parse().expect("a share")],
            trace: Vec::new(),
        });
        let hour = Duration::from_secs(3600);
        let records = driver().closed_loop(&workload, 4, (hour, 50)).await;
        assert_eq!(records.len(), 50);
        // One at a time is served: four clients wait for each other.
        assert!(slower_than(&records, 4 * SERVICE, |record| record.sent) <= 4, "only those of the stall");
        let records = driver().closed_loop(&workload, 1, (Duration::from_millis(95), 50)).await;
        assert_eq!(records.len(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn what_takes_too_long_has_failed() {
        let target = Stalling { start: Instant::now() - Duration::from_secs(2), turn: Semaphore::new(1) };
        let driver = Driver::new(target, Duration::from_millis(500));
        let records = driver.open_loop(planned().into_iter().take(1).collect(), 1).await;
        assert_eq!(failures(&records), BTreeMap::from([("timeout".to_owned(), 1)]));
        assert_eq!(driver.progress().failed.load(Ordering::Relaxed), 1);
    }
}
