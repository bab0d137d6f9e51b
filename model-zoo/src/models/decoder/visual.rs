//! Filters of image tokens in a step: what of its attention they look at.

use super::Step;
use super::pruned::segment;
use crate::compression::must_drop::step::{due, filterings};
use crate::compression::route::Span;
use crate::kernels::cpu::attention::AttentionShape;
use crate::kernels::cpu::attention::gaze::{Onlookers, gaze};
use crate::layers::linear::Cpu;
use crate::step::StepBatch;

/// Whether a row's image tokens are filtered after the attention of `layer`.
pub(super) fn filters(batch: &StepBatch<'_>, spans: &[Span], layer: usize) -> bool {
    let filters = |row: usize| due(&batch.rows[row]).is_some_and(|filter| filter.point(layer).is_some());
    spans.iter().any(|span| filters(span.row))
}

/// The tokens that go on after the attention of `layer`, of the rows that have a filter there.
pub(super) fn select(
    cpu: &Cpu,
    shape: &AttentionShape,
    (step, layer): (&Step<'_, '_>, usize),
    (q, lse): (&[f32], &[f32]),
) -> Vec<(usize, Vec<usize>)> {
    let spans = step.route.spans();
    let mut selected = Vec::new();
    for filtering in filterings(&step.batch.rows, spans, layer) {
        let row = filtering.row;
        let own: Vec<Span> = spans.iter().filter(|span| span.row == row).copied().collect();
        let segment = segment(step.batch, &own, (layer, shape.layout.block_size));
        let gazes: Vec<_> = filtering
            .sights
            .iter()
            .map(|sight| {
                let slots = segment.kv_start + sight.seen.start..segment.kv_start + sight.seen.end;
                let onlookers = Onlookers { segment, tokens: &filtering.text[sight.text.clone()], slots };
                gaze(cpu, shape, &onlookers, (q, lse, step.kv.pages()))
            })
            .collect();
        selected.push((row, filtering.left(&gazes)));
    }
    selected
}
