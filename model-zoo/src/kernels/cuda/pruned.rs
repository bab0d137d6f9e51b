//! Pruned keys on the device: the sums that choose channels, and the moves of pages (see `pruned.cuh`).

use super::device::{Device, Part};
use super::ops::{Heads, need, run};
use super::params::{KeySquaresParams, ObserveParams, PackParams};
use crate::kv_cache::PageId;
use crate::{Result, ZooError};

/// Words of a row whose queries are looked at: `Observed` in `pruned.cuh`.
pub const OBSERVED_WORDS: usize = 4;

/// Threads of `key_squares`, which is the most channels of a head.
const CHANNELS: usize = 256;
/// Values that a thread of the moves takes, about.
const EACH: usize = 8;

/// Pages that are packed together.
#[derive(Debug, Clone, Copy)]
pub struct Packing {
    /// The pool.
    pub pages: Part,
    /// Its heads.
    pub heads: Heads,
    /// Channels kept of every KV head.
    pub kept: usize,
    /// Which ones, `[layers, num_kv_heads, kept]` u8.
    pub channels: Part,
    /// The moves, [`move_words`] each.
    pub moves: Part,
    /// How many.
    pub count: usize,
    /// [`Packing::line_bytes`] for each of them.
    pub lines: Part,
}

/// The move of `page`, which begins at slot `first` of its `layer`, into the packed pages `to`: one or two.
///
/// # Errors
/// [`ZooError::Device`] for another number of pages, which a page's slots never take.
pub fn move_words((page, first, layer): (PageId, usize, usize), to: &[PageId]) -> Result<[u32; 5]> {
    match *to {
        [one] => Ok([page, first as u32, layer as u32, one, one]),
        [one, other] => Ok([page, first as u32, layer as u32, one, other]),
        _ => Err(ZooError::Device(format!("a page packed into {} pages", to.len()))),
    }
}

impl Packing {
    fn num_lines(heads: Heads, kept: usize) -> usize {
        heads.block_size / 16 * heads.kv * (kept + heads.dim)
    }

    /// Bytes of scratch that a move takes.
    pub fn line_bytes(heads: Heads, kept: usize) -> usize {
        32 * Self::num_lines(heads, kept)
    }

    /// Moves them: all are read before any is written.
    ///
    /// # Errors
    /// [`ZooError::Device`].
    pub fn run(&self, device: &dyn Device) -> Result<()> {
        let Heads { kv, dim, block_size, .. } = self.heads;
        need("moves", self.moves, 20 * self.count)?;
        need("lines", self.lines, Self::line_bytes(self.heads, self.kept) * self.count)?;
        let params = PackParams {
            pages: self.pages.pointer(),
            lines: self.lines.pointer(),
            moves: self.moves.pointer(),
            channels: self.channels.pointer(),
            kept: self.kept as u32,
            kv_heads: kv as u32,
            head_dim: dim as u32,
            block_size: block_size as u32,
        };
        let values = 16 * Self::num_lines(self.heads, self.kept);
        let grid = [values.div_ceil(256 * EACH) as u32, self.count as u32, 1];
        run(device, ("pack_read", 256, 0), grid, &params)?;
        run(device, ("pack_write", 256, 0), grid, &params)
    }
}

/// `out[list, kv head, channel] = Σ k²`, f32, over the first `slots` slots of each list of pages: `[lists, list]` u32.
///
/// # Errors
/// [`ZooError::Device`].
pub fn key_squares(
    device: &dyn Device,
    (pages, heads): (Part, Heads),
    (tables, list, slots): (Part, usize, usize),
    out: Part,
) -> Result<()> {
    let Heads { kv, dim, block_size, .. } = heads;
    if dim > CHANNELS || slots.div_ceil(block_size) > list {
        return Err(ZooError::Device(format!("{slots} slots of {dim} channels in {list} pages")));
    }
    let lists = tables.len() / 4 / list.max(1);
    need("sums of squares", out, 4 * lists * kv * dim)?;
    let params = KeySquaresParams {
        pages: pages.pointer(),
        tables: tables.pointer(),
        out: out.pointer(),
        list: list as u32,
        slots: slots as u32,
        kv_heads: kv as u32,
        head_dim: dim as u32,
        block_size: block_size as u32,
        pad: 0,
    };
    run(device, ("key_squares", CHANNELS as u32, 4 * CHANNELS), [kv as u32, lists as u32, 1], &params)
}

/// `sums[place, layer, kv head, channel] = Σ q²` of the queries of `items`, `[count]` of [`OBSERVED_WORDS`]: the mean of the
/// heads that share a KV head. `layer` is one of `layers`.
///
/// # Errors
/// [`ZooError::Device`].
pub fn observe(
    device: &dyn Device,
    (q, heads): (Part, Heads),
    (items, count): (Part, usize),
    (sums, layer, layers): (Part, usize, usize),
) -> Result<()> {
    need("observed", items, 4 * OBSERVED_WORDS * count)?;
    let params = ObserveParams {
        q: q.pointer(),
        items: items.pointer(),
        sums: sums.pointer(),
        heads: heads.queries as u32,
        kv_heads: heads.kv as u32,
        head_dim: heads.dim as u32,
        layer: layer as u32,
        layers: layers as u32,
        pad: 0,
    };
    run(device, ("observe", 128, 0), [heads.kv as u32, count as u32, 1], &params)
}
