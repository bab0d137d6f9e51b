//! The requests that are live: their ids and their permits. The one concurrent map.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::limits::Limits;
use crate::error::{Error, ErrorKind};
use crate::request::Caller;

/// Permits that there are: more than there can be requests, so that the capacity alone says how many may be live.
const PERMITS: u32 = 1 << 28;

/// Ids of live requests, and permits for as many as may be live at once.
#[derive(Debug, Clone)]
pub struct LiveRequests {
    /// To the name of the API key that each came with.
    ids: Arc<DashMap<String, Option<String>>>,
    permits: Arc<Semaphore>,
    seats: Arc<Seats>,
}

/// How many may be live, and how many are.
#[derive(Debug)]
struct Seats {
    capacity: AtomicUsize,
    taken: AtomicUsize,
    /// How many may wait, and how many do.
    queue: AtomicUsize,
    queued: AtomicUsize,
}

/// One of them; free again when it is dropped.
#[derive(Debug)]
struct Seat(Arc<Seats>);

/// A request's place among those that wait for their first step. It leaves the queue once, when it has that step or
/// when its last holder drops it.
#[derive(Debug)]
pub struct QueuePlace {
    seats: Arc<Seats>,
    is_left: AtomicBool,
}

impl QueuePlace {
    /// The request has its first step: somebody else may wait.
    pub fn leave(&self) {
        if !self.is_left.swap(true, Ordering::Relaxed) {
            self.seats.queued.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for QueuePlace {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Seats {
    fn take(self: &Arc<Self>) -> Result<Seat, Error> {
        let capacity = self.capacity.load(Ordering::Relaxed);
        let more = |taken| (taken < capacity).then_some(taken + 1);
        let taken = self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        taken.map(|_| Seat(Arc::clone(self))).map_err(|_| full(capacity))
    }

    fn wait(self: &Arc<Self>) -> Result<QueuePlace, Error> {
        let room = self.queue.load(Ordering::Relaxed);
        let more = |queued| (queued < room).then_some(queued + 1);
        let queued = self.queued.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        let place = || QueuePlace { seats: Arc::clone(self), is_left: AtomicBool::new(false) };
        queued.map(|_| place()).map_err(|_| {
            let message = format!("{room} requests wait for their turn, which is the limit; retry later");
            Error::new(ErrorKind::Overloaded, message)
        })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

fn full(capacity: usize) -> Error {
    let message = format!("{capacity} requests are queued or running, which is the limit; retry later");
    Error::new(ErrorKind::Overloaded, message)
}

/// A live request's id and permit; both are free again when it is dropped.
#[derive(Debug)]
pub(super) struct LiveGuard {
    id: String,
    ids: Arc<DashMap<String, Option<String>>>,
    _seat: Seat,
    _permit: OwnedSemaphorePermit,
}

impl LiveRequests {
    /// Room for as many requests as `limits` say.
    pub(super) fn new(limits: &Limits) -> Self {
        let seats = Seats {
            capacity: AtomicUsize::new(limits.max_concurrent_requests.max(1)),
            taken: AtomicUsize::new(0),
            queue: AtomicUsize::new(limits.max_queued_requests.max(1)),
            queued: AtomicUsize::new(0),
        };
        Self {
            ids: Arc::default(),
            permits: Arc::new(Semaphore::new(PERMITS as usize)),
            seats: Arc::new(seats),
        }
    }

    /// Lets as many requests be live, and wait, as `limits` say. Those that are live already stay, even if they are
    /// more.
    pub(super) fn set_capacity(&self, limits: &Limits) {
        self.seats.capacity.store(limits.max_concurrent_requests.max(1), Ordering::Relaxed);
        self.seats.queue.store(limits.max_queued_requests.max(1), Ordering::Relaxed);
    }

    /// Takes a place in the queue.
    ///
    /// # Errors
    /// [`ErrorKind::Overloaded`] when the queue is full.
    pub(super) fn queue(&self) -> Result<QueuePlace, Error> {
        self.seats.wait()
    }

    /// Takes a permit and the id, or makes an id when it is empty.
    pub(super) fn enter(&self, id: &str, caller: &Caller) -> Result<LiveGuard, Error> {
        let seat = self.seats.take()?;
        let permit = Arc::clone(&self.permits).try_acquire_owned();
        let permit = permit.map_err(|_| full(PERMITS as usize))?;
        let id = if id.is_empty() { uuid::Uuid::new_v4().simple().to_string() } else { id.to_owned() };
        match self.ids.entry(id.clone()) {
            Entry::Occupied(_) => {
                Err(Error::invalid("x-request-id", format!("a live request has the id `{id}` already")))
            }
            Entry::Vacant(entry) => {
                entry.insert(caller.name().map(str::to_owned));
                Ok(LiveGuard { id, ids: Arc::clone(&self.ids), _seat: seat, _permit: permit })
            }
        }
    }

    /// Whether a live request has this id and is the caller's to touch.
    pub fn contains(&self, id: &str, caller: &Caller) -> bool {
        self.ids.get(id).is_some_and(|owner| caller.may_touch(owner.as_deref()))
    }

    /// Returns when no request is live. From then on none is admitted any more; stop admitting before.
    pub async fn drained(&self) {
        // All permits at once are to be had only when nobody holds one. They are kept: a request that passed
        // the check for draining just before it began must not reach an engine that has stopped.
        if let Ok(all) = self.permits.acquire_many(PERMITS).await {
            all.forget();
        }
    }
}

impl LiveGuard {
    pub(super) fn id(&self) -> &str {
        &self.id
    }
}

impl Drop for LiveGuard {
    fn drop(&mut self) {
        self.ids.remove(&self.id);
    }
}
