//! The paged KV cache: physical storage of pages of one byte size, from one pool.
//!
//! Who owns which page is the scheduler's business; this room only knows where a page's bytes lie. A
//! page holds K and V of `block_size` slots of one layer of one sequence, in f16, for all KV heads:
//! K as `[num_kv_heads, head_dim, block_size]` (so that scores of a page's slots are computed with
//! slots in the vector lanes, and pruning a key channel drops a contiguous run), then V as
//! `[num_kv_heads, block_size, head_dim]`.

mod compact;
mod pages;
pub mod pruned;

use std::any::Any;

use half::f16;

pub use compact::KeptSlots;
pub use pages::Pages;
pub use pruned::{PackedLayout, PageMove, PrunedKeys};

use crate::Result;

/// Index of a page in the pool.
pub type PageId = u32;

/// The geometry of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// KV heads of a layer.
    pub num_kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// KV slots in a page.
    pub block_size: usize,
}

impl KvLayout {
    /// f16 values in a page.
    pub fn page_len(&self) -> usize {
        2 * self.num_kv_heads * self.head_dim * self.block_size
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> usize {
        self.page_len() * size_of::<f16>()
    }
}

/// The pool of pages, in the host's memory or on a model's device. In the host's, memory is committed by the operating
/// system when a page is first written, so an unused pool costs no resident memory; a pool that shrinks gives its
/// memory back at once.
#[derive(Debug)]
pub struct KvCache {
    layout: KvLayout,
    storage: Storage,
}

#[derive(Debug)]
enum Storage {
    Host(Pages),
    Device(Box<dyn DevicePages>),
}

/// Pages in the memory of a device. How K and V lie in them is the device's business; a page has the bytes that its
/// layout says.
pub trait DevicePages: std::fmt::Debug + Send {
    /// Pages that there are.
    fn num_pages(&self) -> usize;

    /// As [`KvCache::resize`].
    ///
    /// # Errors
    /// When the device has no room for more; the pool is as before then.
    fn resize(&mut self, num_pages: usize) -> Result<()>;

    /// As [`KvCache::copy_page`].
    ///
    /// # Errors
    /// When the device fails.
    fn copy_page(&mut self, from: PageId, to: PageId) -> Result<()>;

    /// As [`KvCache::poison`].
    ///
    /// # Errors
    /// When the device fails.
    fn poison(&mut self, page: PageId) -> Result<()>;

    /// As [`KvCache::key_squares`].
    ///
    /// # Errors
    /// When the device fails.
    fn key_squares(&self, tables: &[Vec<PageId>], num_slots: usize) -> Result<Vec<Vec<f64>>>;

    /// As [`KvCache::seal`].
    ///
    /// # Errors
    /// When the device fails.
    fn seal(&mut self, moves: &[PageMove], keys: &PrunedKeys) -> Result<()>;

    /// As [`KvCache::compact`].
    ///
    /// # Errors
    /// When a list has not the pages for its slots, or the device fails.
    fn compact(&mut self, lists: &[KeptSlots<'_>]) -> Result<()>;

    /// Itself, for the model whose device it is on.
    fn as_any(&self) -> &dyn Any;
}

impl KvCache {
    /// A pool of `num_pages` pages.
    ///
    /// # Errors
    /// [`crate::ZooError::Memory`] when the operating system has no room for it.
    pub fn new(layout: KvLayout, num_pages: usize) -> Result<Self> {
        let mut pages = Pages::new(layout.page_len());
        pages.resize(num_pages)?;
        Ok(Self { layout, storage: Storage::Host(pages) })
    }

    /// A pool on a device, whose pages are of `layout`.
    pub fn on_device(layout: KvLayout, pages: Box<dyn DevicePages>) -> Self {
        Self { layout, storage: Storage::Device(pages) }
    }

    /// The geometry of its pages.
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Pages in the pool.
    pub fn num_pages(&self) -> usize {
        match &self.storage {
            Storage::Host(pages) => pages.num_pages(),
            Storage::Device(pages) => pages.num_pages(),
        }
    }

    /// The pages on a device, where they are on one.
    pub fn device_pages(&self) -> Option<&dyn DevicePages> {
        match &self.storage {
            Storage::Host(_) => None,
            Storage::Device(pages) => Some(&**pages),
        }
    }

    fn device_pages_mut(&mut self) -> Option<&mut dyn DevicePages> {
        match &mut self.storage {
            Storage::Host(_) => None,
            Storage::Device(pages) => Some(&mut **pages),
        }
    }

    /// All pages, as raw f16 bits.
    ///
    /// # Panics
    /// When they are on a device: models that run there do not ask, and those on the CPU refuse such a pool.
    pub fn pages(&self) -> &Pages {
        match &self.storage {
            Storage::Host(pages) => pages,
            Storage::Device(_) => panic!("pages on a device have no bits on the host"),
        }
    }

    /// All pages, for writing.
    ///
    /// # Panics
    /// As [`KvCache::pages`].
    pub fn pages_mut(&mut self) -> &mut Pages {
        match &mut self.storage {
            Storage::Host(pages) => pages,
            Storage::Device(_) => panic!("pages on a device have no bits on the host"),
        }
    }

    /// Changes the pool to pages `0..num_pages`; the content of those that stay is kept.
    ///
    /// # Errors
    /// [`crate::ZooError::Memory`] or [`crate::ZooError::Device`] when there is no room for more; the pool is as before
    /// then.
    pub fn resize(&mut self, num_pages: usize) -> Result<()> {
        match &mut self.storage {
            Storage::Host(pages) => pages.resize(num_pages),
            Storage::Device(pages) => pages.resize(num_pages),
        }
    }

    /// Copies a page.
    pub fn copy_page(&mut self, from: PageId, to: PageId) {
        match &mut self.storage {
            Storage::Host(pages) => pages.copy((from, 0), (to, 0), self.layout.page_len()),
            // A device that failed fails every step from then on: nobody reads the page.
            Storage::Device(pages) => warn(pages.copy_page(from, to)),
        }
    }

    /// Fills a page with NaN: tests poison pages that nobody owns.
    pub fn poison(&mut self, page: PageId) {
        match &mut self.storage {
            Storage::Host(pages) => pages.page_mut(page).fill(f16::NAN.to_bits()),
            Storage::Device(pages) => warn(pages.poison(page)),
        }
    }
}

fn warn(result: Result<()>) {
    if let Err(error) = result {
        tracing::error!(%error, "KV pages on a device");
    }
}
