//! Rows whose older keys are pruned: where their slots lie, and the queries that choose the channels.

use super::{CpuDecoder, Step};
use crate::compression::route::Span;
use crate::kernels::cpu::attention::{Packed, Segment};
use crate::step::{StepBatch, StepRow};

/// The tokens of a row, one or several `spans` of it, as attention sees them: side by side, whatever lies between.
pub(super) fn segment<'a>(
    batch: &'a StepBatch<'_>,
    spans: &[Span],
    (layer, block_size): (usize, usize),
) -> Segment<'a> {
    let row = &batch.rows[spans[0].row];
    Segment {
        first_token: spans[0].start,
        num_tokens: spans.iter().map(|span| span.len).sum(),
        kv_start: row.kv_len[layer],
        block_table: &row.block_tables[layer],
        packed: packed(row, (layer, block_size)),
    }
}

/// The packed prefix of `row`, once it is sealed.
pub(super) fn packed<'a>(row: &'a StepRow<'_>, (layer, block_size): (usize, usize)) -> Option<Packed<'a>> {
    let (pruning, state) = (row.plan.pruning()?, &row.state.pruning);
    let keys = state.keys.as_ref().filter(|_| state.sealed && row.kv_len[layer] > 0)?;
    let num_slots = pruning.num_packed(block_size);
    let channels = keys.channels.get(layer).filter(|channels| !channels.is_empty())?;
    (num_slots > 0).then_some(Packed { num_slots, kept: keys.kept, channels })
}

impl CpuDecoder {
    /// Adds the squares of the queries that score their row's channels, rotated, `[tokens, num_heads,
    /// head_dim]`, by the mean of the heads that share a KV head.
    pub(super) fn observe_queries(&self, step: &mut Step<'_, '_>, layer: usize, queries: &[f32]) {
        let (d, kv_heads) = (self.config.head_dim, self.config.num_kv_heads);
        let group = self.config.num_heads / kv_heads;
        for span in step.route.spans() {
            let row = &mut step.batch.rows[span.row];
            let Some(pruning) = row.plan.pruning().filter(|_| row.state.pruning.keys.is_none()) else {
                continue;
            };
            let sums = &mut row.state.pruning.query_sums;
            for token in (0..span.len).filter(|i| pruning.observes(row.first_pos + span.first + i)) {
                sums.resize(self.config.num_layers * kv_heads * d, 0.0);
                let sums = &mut sums[layer * kv_heads * d..(layer + 1) * kv_heads * d];
                let start = (span.start + token) * kv_heads * group * d;
                let heads = queries[start..start + kv_heads * group * d].chunks_exact(group * d);
                for (sums, queries) in sums.chunks_exact_mut(d).zip(heads) {
                    for query in queries.chunks_exact(d) {
                        sums.iter_mut().zip(query).for_each(|(sum, q)| *sum += q * q / group as f32);
                    }
                }
            }
        }
    }
}
