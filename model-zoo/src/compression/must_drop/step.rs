//! What filters of image tokens mean for a step: which rows are filtered in it, who looks at what, which tokens go on, and
//! which KV is left when the prompt is computed. Only the attention itself is the model's to look at.

use std::ops::Range;
use std::sync::Arc;

use super::filter::{FilteredImage, Gaze, VisualFilter, VisualOutcome};
use crate::Result;
use crate::compression::Sublayer;
use crate::compression::route::{Route, Span};
use crate::kv_cache::{KeptSlots, KvCache};
use crate::step::{StepBatch, StepRow};

/// The filter of `row`, if this step computes the part of its prompt that runs whole.
pub fn due<'a>(row: &StepRow<'a>) -> Option<&'a VisualFilter> {
    row.plan.filter().filter(|filter| row.first_pos + row.tokens.len() == filter.prompt_len)
}

/// Whether the part of a prompt that has to run whole does.
///
/// # Errors
/// What is wrong with it.
pub fn check(row: &StepRow<'_>) -> Result<(), String> {
    let Some(filter) = row.plan.filter() else { return Ok(()) };
    let (start, end) = (row.first_pos, row.first_pos + row.tokens.len());
    let is_apart = end <= filter.first || start >= filter.prompt_len;
    if is_apart || (start <= filter.first && end == filter.prompt_len) {
        return Ok(());
    }
    Err(format!(
        "tokens {start}..{end} cut a prompt that runs whole from {} to {}",
        filter.first, filter.prompt_len
    ))
}

/// KV slots that the step fills in `layer` at most.
pub fn slots(row: &StepRow<'_>, layer: usize) -> usize {
    let (first, end) = (row.first_pos, row.first_pos + row.tokens.len());
    let active = row.plan.active_len(layer, Sublayer::Attention, (first, end - first));
    let present = active - row.plan.absent(first..first + active).len();
    // What the filters are certain to have dropped before this layer.
    let excess = due(row).map_or(0, |filter| filter.excess_before(layer));
    present.saturating_sub(excess)
}

/// The layers after whose attention some row is filtered, ascending.
pub fn points(rows: &[StepRow<'_>]) -> Vec<usize> {
    let mut layers: Vec<usize> =
        rows.iter().filter_map(due).flat_map(|filter| &filter.layers).copied().collect();
    layers.sort_unstable();
    layers.dedup();
    layers
}

/// A row whose image tokens are filtered after the attention of a layer. *Places* count its tokens that ran that
/// attention, whose KV slots lie side by side.
#[derive(Debug)]
pub struct Filtering<'a> {
    /// Index of the row in the step.
    pub row: usize,
    /// Places of the text after the first image, ascending.
    pub text: Vec<usize>,
    /// Its images, in order.
    pub sights: Vec<Sight<'a>>,
    filter: &'a VisualFilter,
    point: usize,
    /// `[place]`: the token, counted in the row, and its position.
    tokens: Vec<usize>,
    positions: Vec<usize>,
}

/// An image, and who looks at it.
#[derive(Debug)]
pub struct Sight<'a> {
    image: &'a FilteredImage,
    /// Places of its tokens.
    pub seen: Range<usize>,
    /// Which of [`Filtering::text`] come after it.
    pub text: Range<usize>,
}

/// The rows that have a filter at `layer`, of whose attention `spans` are those that ran.
pub fn filterings<'a>(rows: &[StepRow<'a>], spans: &[Span], layer: usize) -> Vec<Filtering<'a>> {
    let of_row = |spans: &[Span]| {
        let row = &rows[spans[0].row];
        let filter = due(row)?;
        Some(Filtering::new((row, filter, filter.point(layer)?), spans))
    };
    spans.chunk_by(|a, b| a.row == b.row).filter_map(of_row).collect()
}

impl<'a> Filtering<'a> {
    fn new((row, filter, point): (&StepRow<'_>, &'a VisualFilter, usize), spans: &[Span]) -> Self {
        let tokens: Vec<usize> = spans.iter().flat_map(|span| span.first..span.first + span.len).collect();
        let positions: Vec<usize> = tokens.iter().map(|token| row.first_pos + token).collect();
        let border = |position: usize| positions.partition_point(|&other| other < position);
        let is_text = |&place: &usize| !is_visual(filter, positions[place]);
        let begin = filter.images.first().map_or(positions.len(), |image| border(image.range.end));
        let text: Vec<usize> = (begin..positions.len()).filter(is_text).collect();
        let sight = |image: &'a FilteredImage| {
            let seen = border(image.range.start)..border(image.range.end);
            let first = text.partition_point(|&place| place < seen.end);
            Sight { image, seen, text: first..text.len() }
        };
        let sights = filter.images.iter().map(sight).collect();
        Self { row: spans[0].row, text, sights, filter, point, tokens, positions }
    }

    /// The tokens of the row that go on, ascending, where each image is looked at by the text as `gazes` say: sums and
    /// maxima over what it is seen of.
    pub fn left(self, gazes: &[[Vec<f32>; 2]]) -> Vec<usize> {
        let mut kept = vec![true; self.tokens.len()];
        for (sight, [sums, maxima]) in self.sights.iter().zip(gazes) {
            let alive = (sight.image, &self.positions[sight.seen.clone()]);
            let chosen = self.filter.select(self.point, alive, Gaze { sums, maxima });
            kept[sight.seen.clone()].copy_from_slice(&chosen);
        }
        self.tokens.into_iter().zip(kept).filter_map(|(token, kept)| kept.then_some(token)).collect()
    }
}

fn is_visual(filter: &VisualFilter, position: usize) -> bool {
    filter.images.iter().any(|image| image.range.contains(&position))
}

/// When filtered prompts are computed: leaves the KV of the layers that say so nothing but what went on to the end, and
/// notes what became of the image tokens.
///
/// # Errors
/// As [`KvCache::compact`].
pub fn compact(batch: &mut StepBatch<'_>, kv: &mut KvCache, route: &Route) -> Result<()> {
    let mut lists = Vec::new();
    for (index, row) in batch.rows.iter_mut().enumerate() {
        let Some(filter) = due(row) else { continue };
        let num_layers = row.plan.num_layers();
        let left = |layer: usize| route.left(index, layer).unwrap_or_default();
        let (all, last) = (left(0), left(num_layers));
        let is_visual = |token: &usize| is_visual(filter, row.first_pos + token);
        let visual = |tokens: &[usize]| tokens.iter().filter(|token| is_visual(token)).count();
        let mut outcome = VisualOutcome::default();
        for layer in 0..num_layers {
            let here = left(layer);
            let runs = row.plan.runs(layer, Sublayer::Attention, row.first_pos);
            if runs && filter.compacts(layer) && here.len() > last.len() {
                let slot = |token: &usize| here.partition_point(|other| other < token);
                let (table, first) = (row.block_tables[layer].as_slice(), row.kv_len[layer]);
                lists.push(KeptSlots { table, first, kept: last.iter().map(slot).collect() });
            }
            let held = if filter.compacts(layer) { last.len() } else { here.len() };
            outcome.dropped.push(if runs { all.len() - held } else { 0 });
            outcome.ran.push(if runs { visual(here) } else { 0 });
        }
        outcome.survivors =
            last.iter().filter(|token| is_visual(token)).map(|token| row.first_pos + token).collect();
        row.state.visual = Some(Arc::new(outcome));
    }
    if lists.is_empty() { Ok(()) } else { kv.compact(&lists) }
}
