//! The requests that are live: their ids and their permits. The one concurrent map.

use std::sync::Arc;

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::{Error, ErrorKind};

/// Ids of live requests, and permits for as many as may be live at once.
#[derive(Debug, Clone)]
pub struct LiveRequests {
    ids: Arc<DashMap<String, ()>>,
    permits: Arc<Semaphore>,
    capacity: u32,
}

/// A live request's id and permit; both are free again when it is dropped.
#[derive(Debug)]
pub(super) struct LiveGuard {
    id: String,
    ids: Arc<DashMap<String, ()>>,
    _permit: OwnedSemaphorePermit,
}

impl LiveRequests {
    /// Room for `capacity` requests.
    pub(super) fn new(capacity: usize) -> Self {
        let capacity = u32::try_from(capacity).unwrap_or(u32::MAX).max(1);
        Self { ids: Arc::default(), permits: Arc::new(Semaphore::new(capacity as usize)), capacity }
    }

    /// Takes a permit and the id, or makes an id when it is empty.
    pub(super) fn enter(&self, id: &str) -> Result<LiveGuard, Error> {
        let permit = Arc::clone(&self.permits).try_acquire_owned().map_err(|_| {
            let message =
                format!("{} requests are queued or running, which is the limit; retry later", self.capacity);
            Error::new(ErrorKind::Overloaded, message)
        })?;
        let id = if id.is_empty() { uuid::Uuid::new_v4().simple().to_string() } else { id.to_owned() };
        match self.ids.entry(id.clone()) {
            Entry::Occupied(_) => {
                Err(Error::invalid("x-request-id", format!("a live request has the id `{id}` already")))
            }
            Entry::Vacant(entry) => {
                entry.insert(());
                Ok(LiveGuard { id, ids: Arc::clone(&self.ids), _permit: permit })
            }
        }
    }

    /// Whether a live request has this id.
    pub fn contains(&self, id: &str) -> bool {
        self.ids.contains_key(id)
    }

    /// Returns when no request is live. New ones may come meanwhile: stop admitting first.
    pub async fn drained(&self) {
        // All permits at once are to be had only when nobody holds one.
        let _ = self.permits.acquire_many(self.capacity).await;
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
