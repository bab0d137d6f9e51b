//! The requests that are live: their ids and their permits. The one concurrent map.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

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
}

/// One of them; free again when it is dropped.
#[derive(Debug)]
struct Seat(Arc<Seats>);

impl Seats {
    fn take(self: &Arc<Self>) -> Result<Seat, Error> {
        let capacity = self.capacity.load(Ordering::Relaxed);
        let more = |taken| (taken < capacity).then_some(taken + 1);
        let taken = self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        taken.map(|_| Seat(Arc::clone(self))).map_err(|_| full(capacity))
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
    /// Room for `capacity` requests.
    pub(super) fn new(capacity: usize) -> Self {
        let seats = Seats { capacity: AtomicUsize::new(capacity.max(1)), taken: AtomicUsize::new(0) };
        Self {
            ids: Arc::default(),
            permits: Arc::new(Semaphore::new(PERMITS as usize)),
            seats: Arc::new(seats),
        }
    }

    /// Lets `capacity` requests be live at once. Those that are live already stay, even if they are more.
    pub(super) fn set_capacity(&self, capacity: usize) {
        self.seats.capacity.store(capacity.max(1), Ordering::Relaxed);
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
