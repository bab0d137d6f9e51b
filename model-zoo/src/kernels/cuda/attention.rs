//! Attention over pages, as functions; see [`super::ops`] for what is checked where.

use super::device::{Device, Part};
use super::ops::{Heads, Places, need, run};
use super::params::AttentionParams;
use crate::{Result, ZooError};

/// Channels of heads that attention is compiled for.
pub const HEAD_DIMS: [usize; 6] = [16, 32, 64, 96, 128, 256];

/// What attention of a layer reads.
#[derive(Debug, Clone, Copy)]
pub struct Attention {
    /// Queries and pages; `rotary` and `within` are not looked at.
    pub places: Places,
    /// `[tokens, heads, head_dim]` bf16, written.
    pub out: Part,
    /// Multiplies scores.
    pub scale: f32,
    /// Slots that a query sees, its own included.
    pub window: Option<usize>,
    /// Which slots are packed, by row: `[rows]` of [`PACKED_BYTES`]; or [`Part::NONE`] where none are.
    pub packed: Part,
    /// The layer, by which packed keys' channels are found.
    pub layer: usize,
    /// Scratch for parts of a split, f32, and counters of finished blocks, u32, zero.
    pub scratch: [Part; 2],
}

/// Spans of the step's tokens for attention, `[count]` of `Item` (see `decode.cuh`).
#[derive(Debug, Clone, Copy)]
pub struct Items {
    /// The items.
    pub items: Part,
    /// How many.
    pub count: usize,
    /// Tokens of the longest.
    pub longest: usize,
}

/// Warps of a block of prefill attention, of sixteen queries each (see `prefill.cuh`).
fn prefill_warps(dim: usize) -> usize {
    if dim > 64 && dim <= 128 { 6 } else { 4 }
}

/// Bytes of an item.
pub const ITEM_BYTES: usize = 16;

/// Bytes that tell of a row's packed slots (`Packed` in `decode.cuh`); zeros where there are none.
pub const PACKED_BYTES: usize = 20;

/// Bytes of scratch that `decode` needs for `items` items in `splits` splits.
pub fn decode_scratch(heads: Heads, items: usize, splits: usize) -> [usize; 2] {
    let blocks = items * heads.groups();
    [if splits > 1 { 4 * blocks * splits * 16 * (heads.dim + 2) } else { 0 }, 4 * blocks]
}

/// Bytes of a block's memory that joining the parts of `warps` warps takes (`decode_join` in `decode.cuh`).
pub(super) fn join_memory(heads: Heads, warps: usize) -> usize {
    4 * (warps * (heads.queries / heads.kv).min(16) * (heads.dim + 2) + 16 * 32) + 16
}

impl Attention {
    pub(super) fn params(&self, items: Part) -> AttentionParams {
        let Places { q, pages, kv_len, starts, tables, heads, .. } = self.places;
        AttentionParams {
            q: q.pointer(),
            out: self.out.pointer(),
            pages: pages.pointer(),
            items: items.pointer(),
            kv_len: kv_len.pointer(),
            starts: starts.pointer(),
            tables: tables.pointer(),
            packed: self.packed.pointer(),
            parts: self.scratch[0].pointer(),
            done: self.scratch[1].pointer(),
            heads: heads.queries as u32,
            kv_heads: heads.kv as u32,
            block_size: heads.block_size as u32,
            window: self.window.unwrap_or(0) as u32,
            scale: self.scale * std::f32::consts::LOG2_E,
            layer: self.layer as u32,
        }
    }

    /// Of `names`, for each of [`HEAD_DIMS`], the kernel for its heads.
    pub(super) fn kernel(&self, names: [&'static str; 6]) -> Result<&'static str> {
        let dim = self.places.heads.dim;
        let index = HEAD_DIMS.iter().position(|&known| known == dim);
        let index =
            index.ok_or_else(|| ZooError::Device(format!("no attention for heads of {dim} channels")))?;
        Ok(names[index])
    }

    /// Attention of single tokens, each by `splits` blocks a KV head.
    ///
    /// # Errors
    /// [`ZooError::Device`].
    pub fn decode(&self, device: &dyn Device, items: Items, splits: usize) -> Result<()> {
        let names = if self.packed.is_empty() {
            ["decode_16", "decode_32", "decode_64", "decode_96", "decode_128", "decode_256"]
        } else {
            [
                "decode_packed_16",
                "decode_packed_32",
                "decode_packed_64",
                "decode_packed_96",
                "decode_packed_128",
                "decode_packed_256",
            ]
        };
        let heads = self.places.heads;
        self.check_decode(items, splits)?;
        let grid = [heads.groups() as u32, splits as u32, items.count as u32];
        let shared = join_memory(heads, 4);
        run(device, (self.kernel(names)?, 128, shared), grid, &self.params(items.items))
    }

    pub(super) fn check_decode(&self, items: Items, splits: usize) -> Result<()> {
        need("items", items.items, ITEM_BYTES * items.count)?;
        if !self.packed.is_empty() {
            need("packed", self.packed, self.places.kv_len.len() / 4 * PACKED_BYTES)?;
        }
        for (scratch, bytes) in
            self.scratch.iter().zip(decode_scratch(self.places.heads, items.count, splits))
        {
            need("attention's scratch", *scratch, bytes)?;
        }
        Ok(())
    }

    /// Causal attention of several tokens of a row each.
    ///
    /// # Errors
    /// [`ZooError::Device`].
    pub fn prefill(&self, device: &dyn Device, items: Items) -> Result<()> {
        let names = ["prefill_16", "prefill_32", "prefill_64", "prefill_96", "prefill_128", "prefill_256"];
        let heads = self.places.heads;
        need("items", items.items, ITEM_BYTES * items.count)?;
        let words = |width: usize| (width / 2 + 15) / 32 * 32 + 16;
        let shared = 2 * 4 * (64 * words(heads.dim) + heads.dim * words(64));
        let queries = items.longest * (heads.queries / heads.kv);
        let warps = prefill_warps(heads.dim);
        let blocks = queries.div_ceil(16 * warps) as u32;
        let grid = [blocks, heads.kv as u32, items.count as u32];
        run(device, (self.kernel(names)?, 32 * warps as u32, shared), grid, &self.params(items.items))
    }
}
