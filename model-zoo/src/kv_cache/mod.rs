//! The paged KV cache: physical storage of pages of one byte size, from one pool.
//!
//! Who owns which page is the scheduler's business; this room only knows where a page's bytes lie. A
//! page holds K and V of `block_size` slots of one layer of one sequence, in f16, for all KV heads:
//! K as `[num_kv_heads, head_dim, block_size]` (so that scores of a page's slots are computed with
//! slots in the vector lanes, and pruning a key channel drops a contiguous run), then V as
//! `[num_kv_heads, block_size, head_dim]`.

pub mod pruned;

use half::f16;

pub use pruned::{PackedLayout, PrunedKeys};

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
/// unused pool costs no resident memory.
#[derive(Debug)]
pub struct KvCache {
    layout: KvLayout,
    pages: Vec<u16>,
}

impl KvCache {
    /// A pool of `num_pages` pages.
    pub fn new(layout: KvLayout, num_pages: usize) -> Self {
        // Zeroed u16 comes from calloc, which maps untouched pages lazily; f16 would be written through.
        Self { layout, pages: vec![0; num_pages * layout.page_len()] }
    }

    /// The geometry of its pages.
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Pages in the pool.
    pub fn num_pages(&self) -> usize {
        self.pages.len() / self.layout.page_len()
    }

    /// All pages as raw f16 bits, page after page.
    pub fn as_bits(&self) -> &[u16] {
        &self.pages
    }

    /// All pages as raw f16 bits, for writing.
    pub fn as_bits_mut(&mut self) -> &mut [u16] {
        &mut self.pages
    }

    /// Fills a page with NaN: tests poison pages that nobody owns.
    pub fn poison(&mut self, page: PageId) {
        let len = self.layout.page_len();
        let start = page as usize * len;
        self.pages[start..start + len].fill(f16::NAN.to_bits());
    }
}
