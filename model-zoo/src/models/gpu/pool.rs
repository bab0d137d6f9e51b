//! The KV pool on a device.

use std::any::Any;
use std::sync::Arc;

use super::pruned::upload_channels;
use crate::kernels::cuda::compact::{compact, list_words};
use crate::kernels::cuda::device::{Buffer, Device, Growable, Part};
use crate::kernels::cuda::ops::Heads;
use crate::kernels::cuda::pruned::{Packing, key_squares, move_words};
use crate::kv_cache::{DevicePages, KeptSlots, KvCache, KvLayout, PageId, PageMove, PrunedKeys};
use crate::{Result, ZooError};

/// Pages that are packed together: some megabytes of scratch.
const PACKED_AT_ONCE: usize = 256;

/// Pages in one range of addresses.
#[derive(Debug)]
pub(super) struct Pool {
    device: Arc<dyn Device>,
    memory: Box<dyn Growable>,
    layout: KvLayout,
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
        Ok(Self { device: Arc::clone(device), memory, layout, page_bytes })
    }

    fn page(&self, page: PageId) -> Result<Part> {
        Part::of_growable(&*self.memory).slice(page as usize * self.page_bytes, self.page_bytes)
    }

    /// Fails for a page that there is not: kernels follow its number.
    fn check<'a>(&self, pages: impl IntoIterator<Item = &'a PageId>) -> Result<()> {
        pages.into_iter().try_for_each(|&page| self.page(page).map(drop))
    }

    fn heads(&self) -> Heads {
        let KvLayout { num_kv_heads, head_dim, block_size } = self.layout;
        Heads { queries: num_kv_heads, kv: num_kv_heads, dim: head_dim, block_size }
    }

    fn upload(&self, words: &[u32]) -> Result<Buffer> {
        let buffer = self.device.alloc(4 * words.len())?;
        self.device.upload(Part::all(&buffer), bytemuck::cast_slice(words))?;
        Ok(buffer)
    }

    /// Packs pages together: none of them is written before all are read, so that a page may be written where one
    /// before it in the order has been read.
    fn pack(&self, moves: &[[u32; 5]], (keys, channels): (&PrunedKeys, &Buffer)) -> Result<()> {
        if moves.is_empty() {
            return Ok(());
        }
        let heads = self.heads();
        let words = self.upload(moves.as_flattened())?;
        let lines = self.device.alloc(Packing::line_bytes(heads, keys.kept) * moves.len())?;
        let packing = Packing {
            pages: Part::of_growable(&*self.memory),
            heads,
            kept: keys.kept,
            channels: Part::all(channels),
            moves: Part::all(&words),
            count: moves.len(),
            lines: Part::all(&lines),
        };
        packing.run(&*self.device)?;
        // The scratch is freed behind it.
        self.device.synchronize()
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

    fn key_squares(&self, tables: &[Vec<PageId>], num_slots: usize) -> Result<Vec<Vec<f64>>> {
        let list = num_slots.div_ceil(self.layout.block_size);
        let width = self.layout.num_kv_heads * self.layout.head_dim;
        let mut words = Vec::new();
        for table in tables.iter().filter(|table| !table.is_empty()) {
            let short = || ZooError::Step(format!("{} pages for {num_slots} slots", table.len()));
            let own = table.get(..list).ok_or_else(short)?;
            self.check(own)?;
            words.extend_from_slice(own);
        }
        let mut sums = vec![0f32; words.len() / list.max(1) * width];
        if !sums.is_empty() {
            let (words, out) = (self.upload(&words)?, self.device.alloc(4 * sums.len())?);
            let pages = (Part::of_growable(&*self.memory), self.heads());
            key_squares(&*self.device, pages, (Part::all(&words), list, num_slots), Part::all(&out))?;
            self.device.download(Part::all(&out), bytemuck::cast_slice_mut(&mut sums))?;
        }
        let mut sums = sums.chunks_exact(width);
        let of_table = |table: &Vec<PageId>| {
            let own = if table.is_empty() { None } else { sums.next() };
            own.map(|own| own.iter().map(|&sum| f64::from(sum)).collect()).unwrap_or_default()
        };
        Ok(tables.iter().map(of_table).collect())
    }

    fn seal(&mut self, moves: &[PageMove], keys: &PrunedKeys) -> Result<()> {
        let channels = upload_channels(&*self.device, keys, self.layout)?;
        let mut together = Vec::new();
        for page_move in moves {
            match page_move {
                PageMove::Pack { layer, page, first, packed } => {
                    self.check(packed.iter().chain([page]))?;
                    together.push(move_words((*page, *first, *layer), packed)?);
                }
                PageMove::Copy { from, to } => {
                    self.pack(&std::mem::take(&mut together), (keys, &channels))?;
                    self.copy_page(*from, *to)?;
                }
            }
            if together.len() == PACKED_AT_ONCE {
                self.pack(&std::mem::take(&mut together), (keys, &channels))?;
            }
        }
        self.pack(&together, (keys, &channels))
    }

    fn compact(&mut self, lists: &[KeptSlots<'_>]) -> Result<()> {
        lists.iter().try_for_each(|list| self.check(list.table))?;
        let words = self.upload(&list_words(lists, self.layout.block_size)?)?;
        let pages = (Part::of_growable(&*self.memory), self.heads());
        compact(&*self.device, pages, (Part::all(&words), lists.len()))?;
        // The words are freed behind it.
        self.device.synchronize()
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
