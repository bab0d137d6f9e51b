//! The rows of a step as the kernels see them: checked, and what of them is packed, observed, or shows an image.

use super::device::Part;
use super::pruned::OBSERVED_WORDS;
use crate::compression::must_drop::step as must_drop;
use crate::compression::route::{Active, Span};
use crate::kv_cache::{KvLayout, PackedLayout};
use crate::step::{StepBatch, StepRow};

/// Which tokens run a sublayer, and the spans of them.
pub(super) type Selected = (Active, Vec<Span>);

/// What indexes are checked against.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Decoder layers.
    pub layers: usize,
    /// Rows of the embedding, and their width.
    pub vocab: usize,
    /// See there.
    pub hidden: usize,
    /// Pages of the pool.
    pub num_pages: usize,
    /// KV slots of a page.
    pub block_size: usize,
}

/// The slots of a row that are packed, its first ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    /// How many: whole pages' worth.
    pub slots: usize,
    /// Channels kept of their keys.
    pub kept: usize,
    /// Pages that packing saves in each layer.
    pub saved: usize,
    /// Where the channels lie on the device, `[layers, num_kv_heads, kept]` u8.
    pub channels: Part,
}

/// What a step needs to know of the pool and of its rows beside the batch.
#[derive(Debug, Clone, Copy)]
pub struct Pages<'a> {
    /// Pages of the pool.
    pub count: usize,
    /// Their geometry.
    pub layout: KvLayout,
    /// What is packed of each row.
    pub prefixes: &'a [Option<Prefix>],
}

impl Pages<'_> {
    /// Pages that packing saves a row in a layer.
    pub(super) fn saved(&self, row: usize, kv_len: usize) -> usize {
        self.prefixes[row].filter(|prefix| kv_len >= prefix.slots).map_or(0, |prefix| prefix.saved)
    }
}

impl Prefix {
    /// `slots` slots, whole pages' worth, whose keys keep `kept` channels, which lie at `channels`.
    pub fn new(slots: usize, (kept, channels): (usize, Part), layout: KvLayout) -> Self {
        let packed = PackedLayout { layout, kept }.num_pages(slots);
        Self { slots, kept, saved: (slots / layout.block_size).saturating_sub(packed), channels }
    }
}

/// Tokens of the row, its last ones, whose queries choose the channels that its keys keep.
pub(super) fn num_observed(row: &StepRow<'_>) -> usize {
    let Some(pruning) = row.plan.pruning().filter(|_| row.state.pruning.keys.is_none()) else { return 0 };
    let positions = row.first_pos..row.first_pos + row.tokens.len();
    positions.filter(|&position| pruning.observes(position)).count()
}

/// What of a row cannot be run, as a sentence's end.
pub(super) fn check(row: &StepRow<'_>, bounds: &Bounds, packed: Option<&Prefix>) -> Result<(), String> {
    if row.tokens.is_empty() {
        return Err("no tokens".into());
    }
    must_drop::check(row)?;
    if row.images.iter().any(|image| image.embeddings.hidden_size() != bounds.hidden) {
        return Err("the embeddings of an image are not as wide as this model".into());
    }
    let unknown = |&(index, &token): &(usize, &u32)| token as usize >= bounds.vocab && !row.is_visual(index);
    if let Some((_, token)) = row.tokens.iter().enumerate().find(unknown) {
        return Err(format!("token {token} is outside the vocabulary"));
    }
    let layers = bounds.layers;
    if row.kv_len.len() != layers || row.block_tables.len() != layers || row.plan.num_layers() != layers {
        return Err(format!("block tables of {} layers, not {layers}", row.block_tables.len()));
    }
    let partly = |&len: &usize| packed.is_some_and(|prefix| 0 < len && len < prefix.slots);
    if let Some(len) = row.kv_len.iter().find(|len| partly(len)) {
        return Err(format!("{len} slots of KV, fewer than are packed"));
    }
    Ok(())
}

/// Whether some token of the row stands for a part of an image.
pub(super) fn shows(row: &StepRow<'_>) -> bool {
    !row.images.is_empty() && (0..row.tokens.len()).any(|index| row.is_visual(index))
}

/// The rows whose queries are observed in each layer: the last of their tokens that run there.
pub(super) fn observed(
    observers: &[usize],
    batch: &StepBatch<'_>,
    actives: &[[Selected; 2]],
) -> Vec<Vec<[u32; OBSERVED_WORDS]>> {
    let of_row = |spans: &[Span], (place, &row): (usize, &usize)| {
        let own = || spans.iter().filter(|span| span.row == row);
        let end = own().map(|span| span.start + span.len).max()?;
        let wanted = num_observed(&batch.rows[row]);
        let left_out = batch.rows[row].tokens.len() - own().map(|span| span.first + span.len).max()?;
        let count = wanted.saturating_sub(left_out).min(own().map(|span| span.len).sum());
        (count > 0).then(|| [end - count, count, place, 0].map(|word| word as u32))
    };
    let of_layer = |[(_, spans), _]: &[Selected; 2]| {
        observers.iter().enumerate().filter_map(|observer| of_row(spans, observer)).collect()
    };
    actives.iter().map(of_layer).collect()
}
