//! Packed pages: K and V of a prefix whose keys keep only some channels (ThinK, arXiv 2407.21018).
//!
//! Packed pages have the byte size of all others. They are one stream of *lines* of sixteen f16 values, in
//! which sixteen slots take `num_kv_heads · (kept + head_dim)` lines: K as `[num_kv_heads, kept, 16 slots]`,
//! then V as `[num_kv_heads, 16 slots, head_dim]`. A line never lies across pages; a head's run of lines may.

use super::{KvCache, KvLayout, PageId, Pages};
use crate::Result;

/// Slots, and values in a line.
pub const LINE: usize = 16;

/// The geometry of packed pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedLayout {
    /// That of all other pages.
    pub layout: KvLayout,
    /// Channels kept of every KV head.
    pub kept: usize,
}

/// Which channels a sequence keeps in its packed prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrunedKeys {
    /// Channels kept of every KV head.
    pub kept: usize,
    /// `[layer][num_kv_heads, kept]`, ascending for each head.
    pub channels: Vec<Box<[u8]>>,
}

/// One page's move when a sequence is sealed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PageMove {
    /// The slots of `page`, from slot `first` of the sequence on, are packed.
    Pack {
        /// Its layer.
        layer: usize,
        /// The dense page.
        page: PageId,
        /// Its first slot.
        first: usize,
        /// The packed pages that it goes to, those of [`PackedLayout::pages_of`].
        packed: Vec<PageId>,
    },
    /// A page that others go on using is copied.
    Copy {
        /// The page.
        from: PageId,
        /// Its copy.
        to: PageId,
    },
}

impl PrunedKeys {
    /// The channels that score best by `Σ q² · Σ k²` (the square of the Frobenius norm of their part of QKᵀ, §3.2 of
    /// the paper; query heads of a group by their mean), `kept` of each of `num_kv_heads`, ascending; of equal ones the
    /// lower is pruned. Both sums are `[num_kv_heads, head_dim]`.
    pub fn best((query_sums, key_sums): (&[f32], &[f64]), num_kv_heads: usize, kept: usize) -> Box<[u8]> {
        let head_dim = key_sums.len() / num_kv_heads;
        let heads = query_sums.chunks_exact(head_dim).zip(key_sums.chunks_exact(head_dim));
        let best_of = |(queries, keys): (&[f32], &[f64])| {
            let scores: Vec<f64> = queries.iter().zip(keys).map(|(&q, k)| f64::from(q) * k).collect();
            let mut order: Vec<usize> = (0..head_dim).collect();
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(b.cmp(&a)));
            order.truncate(kept);
            order.sort_unstable();
            order.into_iter().map(|channel| channel as u8)
        };
        heads.flat_map(best_of).collect()
    }
}

impl PackedLayout {
    /// Lines of sixteen slots.
    pub fn group_lines(&self) -> usize {
        self.layout.num_kv_heads * (self.kept + self.layout.head_dim)
    }

    /// Lines of a page.
    pub fn page_lines(&self) -> usize {
        self.layout.page_len() / LINE
    }

    /// Pages of a prefix of `num_slots` slots, a multiple of sixteen.
    pub fn num_pages(&self, num_slots: usize) -> usize {
        (num_slots / LINE * self.group_lines()).div_ceil(self.page_lines())
    }

    /// The packed pages, counted from 0, that hold slots `first..first + len`, multiples of sixteen.
    pub fn pages_of(&self, first: usize, len: usize) -> std::ops::Range<usize> {
        let lines = self.group_lines();
        first / LINE * lines / self.page_lines()..((first + len) / LINE * lines).div_ceil(self.page_lines())
    }

    /// First line of the keys of `head` in the `group`th sixteen slots.
    pub(crate) fn key_line(&self, group: usize, head: usize) -> usize {
        group * self.group_lines() + head * self.kept
    }

    /// First line of the values of `head` in the `group`th sixteen slots.
    pub(crate) fn value_line(&self, group: usize, head: usize) -> usize {
        let keys = self.layout.num_kv_heads * self.kept;
        group * self.group_lines() + keys + head * self.layout.head_dim
    }

    /// The page of line `index` of the stream in `table`, and where in it the line begins.
    fn place(&self, table: &[PageId], index: usize) -> (PageId, usize) {
        let (page, line) = (index / self.page_lines(), index % self.page_lines());
        (table[page], line * LINE)
    }

    /// `count` lines from `first` on: a slice of the pool, or gathered into `buffer` where they lie across
    /// pages.
    pub(crate) fn lines<'a>(
        &self,
        (pages, table): (&'a Pages, &[PageId]),
        (first, count): (usize, usize),
        buffer: &'a mut Vec<u16>,
    ) -> &'a [u16] {
        if first / self.page_lines() == (first + count - 1) / self.page_lines() {
            let (page, start) = self.place(table, first);
            return &pages.page(page)[start..start + count * LINE];
        }
        buffer.clear();
        for line in first..first + count {
            let (page, start) = self.place(table, line);
            buffer.extend_from_slice(&pages.page(page)[start..start + LINE]);
        }
        buffer
    }
}

impl KvCache {
    /// Σ k² by channel over the first `num_slots` slots of each layer's pages, `[layer][num_kv_heads, head_dim]`; nothing
    /// for layers without pages.
    ///
    /// # Errors
    /// [`crate::ZooError::Device`] when the device that they lie on fails.
    pub fn key_squares(&self, tables: &[Vec<PageId>], num_slots: usize) -> Result<Vec<Vec<f64>>> {
        match self.device_pages() {
            Some(pages) => pages.key_squares(tables, num_slots),
            None => Ok(tables.iter().map(|table| self.key_squares_of(table, num_slots)).collect()),
        }
    }

    fn key_squares_of(&self, table: &[PageId], num_slots: usize) -> Vec<f64> {
        let KvLayout { num_kv_heads, head_dim, block_size } = self.layout;
        if table.is_empty() {
            return Vec::new();
        }
        let of_channel = |channel: usize| {
            let mut sum = 0f64;
            for first in (0..num_slots).step_by(block_size) {
                let page = self.pages().page(table[first / block_size]);
                let start = channel * block_size;
                let keys = &page[start..start + block_size.min(num_slots - first)];
                sum += keys.iter().map(|&bits| f64::from(half::f16::from_bits(bits)).powi(2)).sum::<f64>();
            }
            sum
        };
        (0..num_kv_heads * head_dim).map(of_channel).collect()
    }

    /// Does `moves`, one after the other, keeping the channels of `keys`.
    ///
    /// # Errors
    /// As [`KvCache::key_squares`]; the pages are lost then.
    pub fn seal(&mut self, moves: &[PageMove], keys: &PrunedKeys) -> Result<()> {
        if let Some(pages) = self.device_pages_mut() {
            return pages.seal(moves, keys);
        }
        for page_move in moves {
            match page_move {
                PageMove::Pack { layer, page, first, packed } => {
                    self.pack(*page, (packed, *first), &keys.channels[*layer]);
                }
                PageMove::Copy { from, to } => self.copy_page(*from, *to),
            }
        }
        Ok(())
    }

    /// Packs the slots of dense page `source`, which begin at slot `first` of the sequence, into the packed pages
    /// `touched`, those of [`PackedLayout::pages_of`], keeping `channels`.
    fn pack(&mut self, source: PageId, (touched, first): (&[PageId], usize), channels: &[u8]) {
        let KvLayout { num_kv_heads, head_dim, block_size } = self.layout;
        let packed = PackedLayout { layout: self.layout, kept: channels.len() / num_kv_heads };
        // Lines are counted from the first touched page on.
        let skipped = packed.pages_of(first, block_size).start * packed.page_lines();
        let values = num_kv_heads * head_dim * block_size;
        for offset in (0..block_size).step_by(LINE) {
            let group = (first + offset) / LINE;
            for head in 0..num_kv_heads {
                let own = &channels[head * packed.kept..(head + 1) * packed.kept];
                for (line, &channel) in (packed.key_line(group, head)..).zip(own) {
                    let from = (head * head_dim + channel as usize) * block_size + offset;
                    self.pages_mut().copy((source, from), packed.place(touched, line - skipped), LINE);
                }
                let from = values + (head * block_size + offset) * head_dim;
                for (index, line) in (packed.value_line(group, head)..).take(head_dim).enumerate() {
                    self.pages_mut().copy(
                        (source, from + index * LINE),
                        packed.place(touched, line - skipped),
                        LINE,
                    );
                }
            }
        }
    }
}
