//! Filters of image tokens in a step: who looks at what, which tokens go on, and their KV when the prompt is computed.

use std::sync::Arc;

use super::Step;
use super::pruned::segment;
use super::sublayer::by_row;
use crate::compression::Sublayer;
use crate::compression::must_drop::filter::{Gaze, VisualFilter, VisualOutcome};
use crate::compression::route::{Route, Span};
use crate::kernels::cpu::attention::AttentionShape;
use crate::kernels::cpu::attention::gaze::{Onlookers, gaze};
use crate::kv_cache::KvCache;
use crate::layers::linear::Cpu;
use crate::step::{StepBatch, StepRow};

/// The filter of `row`, if this step computes the part of its prompt that runs whole.
fn due<'a>(row: &StepRow<'a>) -> Option<&'a VisualFilter> {
    row.plan.filter().filter(|filter| row.first_pos + row.tokens.len() == filter.prompt_len)
}

/// Whether the part of a prompt that has to run whole does.
///
/// # Errors
/// What is wrong with it.
pub(super) fn check(row: &StepRow<'_>) -> Result<(), String> {
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
pub(super) fn slots(row: &StepRow<'_>, layer: usize) -> usize {
    let (first, end) = (row.first_pos, row.first_pos + row.tokens.len());
    let active = row.plan.active_len(layer, Sublayer::Attention, (first, end - first));
    let present = active - row.plan.absent(first..first + active).len();
    // What the filters are certain to have dropped before this layer.
    let excess = due(row).map_or(0, |filter| filter.excess_before(layer));
    present.saturating_sub(excess)
}

/// Whether a row's image tokens are filtered after the attention of `layer`.
pub(super) fn filters(batch: &StepBatch<'_>, spans: &[Span], layer: usize) -> bool {
    by_row(spans)
        .any(|spans| due(&batch.rows[spans[0].row]).is_some_and(|filter| filter.point(layer).is_some()))
}

/// The tokens that go on after the attention of `layer`, of the rows that have a filter there.
pub(super) fn select(
    cpu: &Cpu,
    shape: &AttentionShape,
    (step, layer): (&Step<'_, '_>, usize),
    (q, lse): (&[f32], &[f32]),
) -> Vec<(usize, Vec<usize>)> {
    let mut selected = Vec::new();
    for spans in by_row(step.route.spans()) {
        let index = spans[0].row;
        let row = &step.batch.rows[index];
        let Some((filter, point)) = due(row).and_then(|filter| Some((filter, filter.point(layer)?))) else {
            continue;
        };
        let tokens: Vec<usize> = spans.iter().flat_map(|span| span.first..span.first + span.len).collect();
        let positions: Vec<usize> = tokens.iter().map(|token| row.first_pos + token).collect();
        let segment = segment(step.batch, spans, (layer, shape.layout.block_size));
        let is_text = |position: &usize| !filter.images.iter().any(|image| image.range.contains(position));
        let mut kept = vec![true; tokens.len()];
        for image in &filter.images {
            let border = |position: usize| positions.partition_point(|&other| other < position);
            let (first, end) = (border(image.range.start), border(image.range.end));
            let text: Vec<usize> =
                (end..positions.len()).filter(|&token| is_text(&positions[token])).collect();
            let slots = segment.kv_start + first..segment.kv_start + end;
            let onlookers = Onlookers { segment, tokens: &text, slots };
            let [sums, maxima] = gaze(cpu, shape, &onlookers, (q, lse, step.kv.pages()));
            let gaze = Gaze { sums: &sums, maxima: &maxima };
            kept[first..end].copy_from_slice(&filter.select(point, (image, &positions[first..end]), gaze));
        }
        let left = tokens.into_iter().zip(kept).filter_map(|(token, kept)| kept.then_some(token));
        selected.push((index, left.collect()));
    }
    selected
}

/// When a filtered prompt is computed: leaves the KV of the layers that say so nothing but what went on to the end, and
/// notes what became of the image tokens.
pub(super) fn compact(batch: &mut StepBatch<'_>, kv: &mut KvCache, route: &Route) {
    for (index, row) in batch.rows.iter_mut().enumerate() {
        let Some(filter) = due(row) else { continue };
        let num_layers = row.plan.num_layers();
        let left = |layer: usize| route.left(index, layer).unwrap_or_default();
        let (all, last) = (left(0), left(num_layers));
        let is_visual = |token: &usize| {
            let position = row.first_pos + token;
            filter.images.iter().any(|image| image.range.contains(&position))
        };
        let visual = |tokens: &[usize]| tokens.iter().filter(|token| is_visual(token)).count();
        let mut outcome = VisualOutcome::default();
        for layer in 0..num_layers {
            let here = left(layer);
            let runs = row.plan.runs(layer, Sublayer::Attention, row.first_pos);
            if runs && filter.compacts(layer) && here.len() > last.len() {
                let slot = |token: &usize| here.partition_point(|other| other < token);
                let kept: Vec<usize> = last.iter().map(slot).collect();
                kv.compact(&row.block_tables[layer], row.kv_len[layer], &kept);
            }
            let held = if filter.compacts(layer) { last.len() } else { here.len() };
            outcome.dropped.push(if runs { all.len() - held } else { 0 });
            outcome.ran.push(if runs { visual(here) } else { 0 });
        }
        outcome.survivors =
            last.iter().filter(|token| is_visual(token)).map(|token| row.first_pos + token).collect();
        row.state.visual = Some(Arc::new(outcome));
    }
}
