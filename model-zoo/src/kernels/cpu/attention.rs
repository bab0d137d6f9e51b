//! Causal attention straight over the pages of the KV cache, for decode rows and prefill chunks alike.
//!
//! A task is one KV head and a tile of queries of one sequence; the query heads that share the KV head
//! share each conversion to f32. Pages are visited in order with an online softmax
//! (arXiv 1805.02867), sixteen slots at a time, so that a query's result has the same bits in any tile.
//! Slots that the sequence has not written may hold anything, NaN included: their scores are masked and
//! their values never read.

pub mod gaze;
mod tile;
#[cfg(target_arch = "x86_64")]
mod x86;

use tile::Slots;

use super::convert::narrow_f16;
use super::isa::Isa;
use super::pool::Disjoint;
use super::vector::{exp, multiversion};
use crate::kv_cache::{KvLayout, PackedLayout, PageId, Pages};
use crate::layers::linear::Cpu;

/// Slots in the lanes of a vector. A page's block size is a multiple.
pub const SLOTS: usize = 16;
/// Query vectors in a task, about.
const QUERIES: usize = 16;

/// What the heads of a layer are like.
#[derive(Debug, Clone, Copy)]
pub struct AttentionShape {
    /// Query heads, a multiple of the layout's KV heads.
    pub num_heads: usize,
    /// Page geometry.
    pub layout: KvLayout,
    /// Multiplies scores.
    pub scale: f32,
    /// A query sees this many slots, its own included; `None` sees all before it.
    pub window: Option<usize>,
}

/// One sequence's queries: `num_tokens` rows of the step from `first_token`, at KV slots from `kv_start`.
#[derive(Debug, Clone, Copy)]
pub struct Segment<'a> {
    /// Row of the first query in `q` and `out`.
    pub first_token: usize,
    /// Queries.
    pub num_tokens: usize,
    /// KV slot of the first query; slots before it were written by earlier steps.
    pub kv_start: usize,
    /// Pages of the sequence in this layer, packed ones first.
    pub block_table: &'a [PageId],
    /// The packed prefix, if there is one.
    pub packed: Option<Packed<'a>>,
}

/// A prefix in packed pages, the first ones of the block table.
#[derive(Debug, Clone, Copy)]
pub struct Packed<'a> {
    /// Its slots, a multiple of the block size.
    pub num_slots: usize,
    /// Channels kept of every KV head.
    pub kept: usize,
    /// `[num_kv_heads, kept]`
    pub channels: &'a [u8],
}

impl Packed<'_> {
    /// Slots that packing has won: those packed, less the slots that their pages would hold otherwise.
    pub fn room(&self, layout: KvLayout) -> usize {
        let pages = PackedLayout { layout, kept: self.kept }.num_pages(self.num_slots);
        self.num_slots.saturating_sub(pages * layout.block_size)
    }
}

impl Segment<'_> {
    /// Index in the block table of the page of a slot that is not packed, and the slot's offset there.
    pub fn place(&self, layout: KvLayout, slot: usize) -> (usize, usize) {
        let (pages, slots) = self.packed.map_or((0, 0), |packed| {
            (PackedLayout { layout, kept: packed.kept }.num_pages(packed.num_slots), packed.num_slots)
        });
        (pages + (slot - slots) / layout.block_size, (slot - slots) % layout.block_size)
    }
}

impl AttentionShape {
    fn group(&self) -> usize {
        self.num_heads / self.layout.num_kv_heads
    }
}

/// `out = softmax(q·Kᵀ·scale)·V` for every segment; `q` and `out` are `[n, num_heads · head_dim]`.
///
/// The caller has checked that block tables cover the segments and page ids lie in `pages`.
pub fn attention(
    cpu: &Cpu,
    shape: &AttentionShape,
    segments: &[Segment<'_>],
    (q, pages, out): (&[f32], &Pages, &mut [f32]),
) {
    attention_with_lse(cpu, shape, segments, (q, pages, out, &mut []));
}

/// [`attention`], and the log of the sum of each query's exponentials, `ln Σ exp(q·k·scale)`, to `lse`
/// `[n, num_heads]`, unless that is empty: with it any weight of the softmax is had again from its score.
pub fn attention_with_lse(
    cpu: &Cpu,
    shape: &AttentionShape,
    segments: &[Segment<'_>],
    (q, pages, out, lse): (&[f32], &Pages, &mut [f32], &mut [f32]),
) {
    assert!(shape.layout.block_size.is_multiple_of(SLOTS), "invariant: checked by the decoder");
    let tokens_per_task = (QUERIES / shape.group()).max(1);
    let mut tasks = Vec::new();
    for (index, segment) in segments.iter().enumerate() {
        // Late tiles see more keys: taking them first levels the threads.
        for tile in (0..segment.num_tokens.div_ceil(tokens_per_task)).rev() {
            tasks.extend((0..shape.layout.num_kv_heads).map(|head| (index, tile * tokens_per_task, head)));
        }
    }
    let width = shape.num_heads * shape.layout.head_dim;
    let (shared, isa) = (Disjoint::new(out), cpu.isa);
    let (wants_lse, lse) = (!lse.is_empty(), Disjoint::new(lse));
    cpu.pool.run(tasks.len(), |task| {
        let (index, first, kv_head) = tasks[task];
        let segment = segments[index];
        let count = tokens_per_task.min(segment.num_tokens - first);
        let mut tile = QueryTile::new(shape, kv_head, segment.kv_start + first, count);
        tile.load(q, (segment.first_token + first) * width, width);
        tile.run(isa, segment, pages);
        for i in 0..count {
            for head in 0..shape.group() {
                let at = (segment.first_token + first + i) * width
                    + (kv_head * shape.group() + head) * shape.layout.head_dim;
                // SAFETY: a (token, query head) pair belongs to one task.
                let out = unsafe { shared.part(at, shape.layout.head_dim) };
                tile.finish(i * shape.group() + head, out);
                if wants_lse {
                    let at =
                        (segment.first_token + first + i) * shape.num_heads + kv_head * shape.group() + head;
                    // SAFETY: the same.
                    let lse = unsafe { lse.part(at, 1) };
                    lse[0] = tile.lse(i * shape.group() + head);
                }
            }
        }
    });
}

/// A task's queries and their running softmax.
struct QueryTile<'a> {
    shape: &'a AttentionShape,
    kv_head: usize,
    /// KV slot of the first token.
    slot: usize,
    tokens: usize,
    /// `[queries, head_dim]`, scaled
    q: Vec<f32>,
    /// `[queries, head_dim]`
    acc: Vec<f32>,
    /// Running maximum of the scores, `[queries]`
    max: Vec<f32>,
    /// Running sum of the weights in sixteen lanes, `[queries, 16]`
    sum: Vec<f32>,
    /// `[queries, 16]`
    scores: Vec<f32>,
}

impl<'a> QueryTile<'a> {
    fn new(shape: &'a AttentionShape, kv_head: usize, slot: usize, tokens: usize) -> Self {
        let (queries, dim) = (tokens * shape.group(), shape.layout.head_dim);
        Self {
            shape,
            kv_head,
            slot,
            tokens,
            q: Vec::with_capacity(queries * dim),
            acc: vec![0.0; queries * dim],
            max: vec![f32::NEG_INFINITY; queries],
            sum: vec![0.0; queries * SLOTS],
            scores: vec![0.0; queries * SLOTS],
        }
    }

    fn load(&mut self, q: &[f32], first: usize, width: usize) {
        let dim = self.shape.layout.head_dim;
        let (group, scale) = (self.shape.group(), self.shape.scale);
        for token in 0..self.tokens {
            let at = first + token * width + self.kv_head * group * dim;
            self.q.extend(q[at..at + group * dim].iter().map(|v| v * scale));
        }
    }

    fn run(&mut self, isa: Isa, segment: Segment<'_>, pages: &Pages) {
        let layout = self.shape.layout;
        let written = segment.kv_start + segment.num_tokens;
        let end = self.slot + self.tokens;
        let first = self.shape.window.map_or(0, |w| (self.slot + 1).saturating_sub(w)) / SLOTS * SLOTS;
        let packed_end = segment.packed.map_or(0, |packed| packed.num_slots);
        if let Some(packed) = segment.packed {
            self.run_packed(isa, (packed, segment.block_table, pages), first..packed_end.min(end));
        }
        for start in (first.max(packed_end)..end).step_by(SLOTS) {
            let (page, offset) = segment.place(layout, start);
            let page = pages.page(segment.block_table[page]);
            let slots = self.slots(page, offset, written - start);
            tile::score(isa, &self.q, slots, &mut self.scores);
            self.weigh(isa, start);
            tile::accumulate(isa, &self.scores, slots, &mut self.acc);
        }
    }

    /// The part of the packed prefix in `range`: the queries' kept channels against the kept keys.
    fn run_packed(
        &mut self,
        isa: Isa,
        (packed, table, pages): (Packed<'_>, &[PageId], &Pages),
        range: std::ops::Range<usize>,
    ) {
        let layout = PackedLayout { layout: self.shape.layout, kept: packed.kept };
        let (dim, kept) = (self.shape.layout.head_dim, packed.kept);
        let channels = &packed.channels[self.kv_head * kept..(self.kv_head + 1) * kept];
        let gather =
            |query: &[f32]| channels.iter().map(|&channel| query[channel as usize]).collect::<Vec<_>>();
        let q: Vec<f32> = self.q.chunks_exact(dim).flat_map(gather).collect();
        let mut buffer = Vec::new();
        for start in range.step_by(SLOTS) {
            let group = start / SLOTS;
            let first = layout.key_line(group, self.kv_head);
            let keys = layout.lines((pages, table), (first, kept), &mut buffer);
            tile::score(isa, &q, Slots { keys, stride: SLOTS, values: &[], dim: kept }, &mut self.scores);
            self.weigh(isa, start);
            let first = layout.value_line(group, self.kv_head);
            let values = layout.lines((pages, table), (first, dim), &mut buffer);
            tile::accumulate(
                isa,
                &self.scores,
                Slots { keys: &[], stride: SLOTS, values, dim },
                &mut self.acc,
            );
        }
    }

    fn slots<'p>(&self, page: &'p [u16], offset: usize, written: usize) -> Slots<'p> {
        slots(self.shape.layout, self.kv_head, page, (offset, written))
    }

    /// Turns the scores of the slots from `start` into softmax weights relative to the running maximum.
    fn weigh(&mut self, isa: Isa, start: usize) {
        let (group, dim) = (self.shape.group(), self.shape.layout.head_dim);
        for query in 0..self.max.len() {
            let own = self.slot + query / group;
            let low = self.shape.window.map_or(0, |w| (own + 1).saturating_sub(w));
            let state = Running {
                visible: low.saturating_sub(start).min(SLOTS)..(own + 1).saturating_sub(start).min(SLOTS),
                max: &mut self.max[query],
                sum: &mut self.sum[query * SLOTS..][..SLOTS],
                acc: &mut self.acc[query * dim..][..dim],
            };
            soften(isa, &mut self.scores[query * SLOTS..][..SLOTS], state);
        }
    }

    fn lse(&self, query: usize) -> f32 {
        self.max[query] + self.sum[query * SLOTS..][..SLOTS].iter().sum::<f32>().ln()
    }

    fn finish(&self, query: usize, out: &mut [f32]) {
        let dim = self.shape.layout.head_dim;
        let total: f32 = self.sum[query * SLOTS..][..SLOTS].iter().sum();
        let inverse = 1.0 / total;
        for (out, acc) in out.iter_mut().zip(&self.acc[query * dim..][..dim]) {
            *out = acc * inverse;
        }
    }
}

/// Sixteen slots from `offset` of a page, of which the first `written` hold this sequence's data.
fn slots(layout: KvLayout, kv_head: usize, page: &[u16], (offset, written): (usize, usize)) -> Slots<'_> {
    let KvLayout { num_kv_heads, head_dim: dim, block_size: stride } = layout;
    let (keys, values) = page.split_at(num_kv_heads * dim * stride);
    let keys = &keys[kv_head * dim * stride..][..dim * stride][offset..];
    let values = &values[(kv_head * stride + offset) * dim..][..written.min(SLOTS) * dim];
    Slots { keys, stride, values, dim }
}

/// A query's online softmax.
struct Running<'a> {
    /// Which of the sixteen slots the query may see.
    visible: std::ops::Range<usize>,
    max: &'a mut f32,
    sum: &'a mut [f32],
    acc: &'a mut [f32],
}

multiversion! {
    /// One query's sixteen scores → weights; rescales what was accumulated when the maximum grows.
    fn soften(scores: &mut [f32], state: Running<'_>) {
        let Running { visible, max, sum, acc } = state;
        if visible.is_empty() {
            scores.fill(0.0);
            return;
        }
        for (slot, score) in scores.iter_mut().enumerate() {
            *score = if visible.contains(&slot) { *score } else { f32::NEG_INFINITY };
        }
        let mut top = *max;
        for &score in scores.iter() {
            top = top.max(score);
        }
        if top > *max {
            let shrink = exp(*max - top);
            sum.iter_mut().for_each(|v| *v *= shrink);
            acc.iter_mut().for_each(|v| *v *= shrink);
            *max = top;
        }
        for (score, sum) in scores.iter_mut().zip(sum) {
            *score = exp(*score - top);
            *sum += *score;
        }
    }
}

/// Writes one token's `k` and `v`, `[num_kv_heads, head_dim]`, to `slot` of a sequence.
pub fn write_kv(
    isa: Isa,
    (layout, pages): (KvLayout, &mut Pages),
    (block_table, slot): (&[PageId], usize),
    (k, v): (&[f32], &[f32]),
) {
    let KvLayout { num_kv_heads, head_dim, block_size } = layout;
    let page = pages.page_mut(block_table[slot / block_size]);
    let (keys, values) = page.split_at_mut(num_kv_heads * head_dim * block_size);
    let offset = slot % block_size;
    let mut bits = [0u16; 64];
    for (from, to) in k.chunks(64).zip(keys.chunks_mut(64 * block_size)) {
        narrow_f16(isa, from, &mut bits[..from.len()]);
        for (bits, channel) in bits.iter().zip(to.chunks_exact_mut(block_size)) {
            channel[offset] = *bits;
        }
    }
    for (v, head) in v.chunks_exact(head_dim).zip(values.chunks_exact_mut(block_size * head_dim)) {
        narrow_f16(isa, v, &mut head[offset * head_dim..(offset + 1) * head_dim]);
    }
}

#[cfg(test)]
mod tests;
