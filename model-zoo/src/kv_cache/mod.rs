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

use half::f16;

pub use pages::Pages;
pub use pruned::{PackedLayout, PrunedKeys};

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

/// The pool of pages. Memory is committed by the operating system when a page is first written, so an
/// unused pool costs no resident memory; a pool that shrinks gives its memory back at once.
#[derive(Debug)]
pub struct KvCache {
    layout: KvLayout,
    pages: Pages,
}

impl KvCache {
    /// A pool of `num_pages` pages.
    ///
    /// # Errors
    /// [`crate::ZooError::Memory`] when the operating system has no room for it.
    pub fn new(layout: KvLayout, num_pages: usize) -> Result<Self> {
        let mut pages = Pages::new(layout.page_len());
        pages.resize(num_pages)?;
        Ok(Self { layout, pages })
    }

    /// The geometry of its pages.
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Pages in the pool.
    pub fn num_pages(&self) -> usize {
        self.pages.num_pages()
    }

    /// All pages, as raw f16 bits.
    pub fn pages(&self) -> &Pages {
        &self.pages
    }

    /// All pages, for writing.
    pub fn pages_mut(&mut self) -> &mut Pages {
        &mut self.pages
    }

    /// Changes the pool to pages `0..num_pages`; the content of those that stay is kept.
    ///
    /// # Errors
    /// [`crate::ZooError::Memory`] when the operating system has no room for more; the pool is as before then.
    pub fn resize(&mut self, num_pages: usize) -> Result<()> {
        self.pages.resize(num_pages)
    }

    /// Fills a page with NaN: tests poison pages that nobody owns.
    pub fn poison(&mut self, page: PageId) {
        self.pages.page_mut(page).fill(f16::NAN.to_bits());
    }
}
