//! The KV pool on a device.

use std::any::Any;
use std::sync::Arc;

use crate::kernels::cuda::device::{Device, Growable, Part};
use crate::kv_cache::{DevicePages, KvCache, KvLayout, PageId};
use crate::{Result, ZooError};

/// Pages in one range of addresses.
#[derive(Debug)]
pub(super) struct Pool {
    device: Arc<dyn Device>,
    memory: Box<dyn Growable>,
    page_bytes: usize,
}

impl Pool {
    /// A pool of `num_pages` pages, in a range that has room for all of the device's memory.
    pub(super) fn new(device: &Arc<dyn Device>, layout: KvLayout, num_pages: usize) -> Result<Self> {
        let (_, total) = device.memory()?;
        let page_bytes = layout.page_bytes();
        let most = usize::try_from(total).unwrap_or(usize::MAX).max(num_pages * page_bytes);
        let mut memory = device.reserve(most)?;
        memory.resize(num_pages * page_bytes)?;
        Ok(Self { device: Arc::clone(device), memory, page_bytes })
    }

    fn page(&self, page: PageId) -> Result<Part> {
        Part::of_growable(&*self.memory).slice(page as usize * self.page_bytes, self.page_bytes)
    }
}

impl DevicePages for Pool {
    fn num_pages(&self) -> usize {
        self.memory.len() / self.page_bytes
    }

    fn resize(&mut self, num_pages: usize) -> Result<()> {
        self.memory.resize(num_pages * self.page_bytes)
    }

    fn copy_page(&mut self, from: PageId, to: PageId) -> Result<()> {
        self.device.copy(self.page(from)?, self.page(to)?)
    }

    fn poison(&mut self, page: PageId) -> Result<()> {
        self.device.fill(self.page(page)?, 0xFF)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// The memory of the pool behind `kv`.
///
/// # Errors
/// [`ZooError::Step`] when it is not on a device.
pub(super) fn part(kv: &KvCache) -> Result<Part> {
    let pool = kv.device_pages().and_then(|pages| pages.as_any().downcast_ref::<Pool>());
    let pool = pool.ok_or_else(|| ZooError::Step("the pages are not on the model's device".into()))?;
    Ok(Part::of_growable(&*pool.memory))
}
