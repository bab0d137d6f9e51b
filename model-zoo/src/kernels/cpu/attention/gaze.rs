//! How much some queries look at some slots: sums and maxima over the queries of the attention weights.
//!
//! The weights of the softmax are not kept anywhere. With the log of the sum of its exponentials, which
//! [`super::attention_with_lse`] gives, a query's weight of any slot is `exp(score - lse)`: as many scores again as there
//! are queries and slots of interest, and no matrix of all tokens by all tokens.

use std::ops::Range;

use super::tile;
use super::{AttentionShape, SLOTS, Segment, slots};
use crate::kernels::cpu::pool::Disjoint;
use crate::kernels::cpu::vector::exp;
use crate::kv_cache::Pages;
use crate::layers::linear::Cpu;

/// Who looks, and at what.
#[derive(Debug, Clone)]
pub struct Onlookers<'a> {
    /// The sequence. Its prefix is not packed.
    pub segment: Segment<'a>,
    /// Tokens of the segment that look.
    pub tokens: &'a [usize],
    /// The slots that they look at, which all come before theirs.
    pub slots: Range<usize>,
}

/// For each of the slots: attention weights as means over the heads, `[sum over the tokens, maximum of a token]`.
///
/// `q` is `[n, num_heads · head_dim]` and `lse` `[n, num_heads]`, of the attention that was computed over `pages`.
pub fn gaze(
    cpu: &Cpu,
    shape: &AttentionShape,
    onlookers: &Onlookers<'_>,
    (q, lse, pages): (&[f32], &[f32], &Pages),
) -> [Vec<f32>; 2] {
    let Onlookers { segment, tokens, slots: range } = onlookers;
    let (dim, group) = (shape.layout.head_dim, shape.group());
    let heads = Heads::gather(shape, onlookers, (q, lse));
    let mut found = vec![0f32; 2 * range.len()];
    let shared = Disjoint::new(&mut found);
    let (first, isa) = (range.start / SLOTS, cpu.isa);
    cpu.pool.run(range.end.div_ceil(SLOTS).saturating_sub(first), |task| {
        let start = (first + task) * SLOTS;
        let (page, offset) = segment.place(shape.layout, start);
        let page = pages.page(segment.block_table[page]);
        // Means over the heads, `[tokens, 16]`.
        let mut weights = vec![0f32; tokens.len() * SLOTS];
        let mut scores = vec![0f32; tokens.len() * group * SLOTS];
        for kv_head in 0..shape.layout.num_kv_heads {
            let written = segment.kv_start + segment.num_tokens - start;
            let keys = slots(shape.layout, kv_head, page, (offset, written));
            let (queries, lse) = heads.of(kv_head, tokens.len() * group, dim);
            tile::score(isa, queries, keys, &mut scores);
            for (query, (scores, lse)) in scores.chunks_exact(SLOTS).zip(lse).enumerate() {
                let weights = &mut weights[query / group * SLOTS..][..SLOTS];
                weights.iter_mut().zip(scores).for_each(|(weight, score)| *weight += exp(score - lse));
            }
        }
        for slot in range.start.max(start)..range.end.min(start + SLOTS) {
            // SAFETY: a slot belongs to one task.
            let found = unsafe { shared.part(2 * (slot - range.start), 2) };
            for (index, &token) in tokens.iter().enumerate() {
                let own = segment.kv_start + token;
                if shape.window.is_some_and(|window| slot + window <= own) {
                    continue;
                }
                let weight = weights[index * SLOTS + slot - start] / shape.num_heads as f32;
                found[0] += weight;
                found[1] = found[1].max(weight);
            }
        }
    });
    [0, 1].map(|which| found.iter().skip(which).step_by(2).copied().collect())
}

/// The onlookers' queries, scaled, and their lse, by KV head.
struct Heads {
    /// `[num_kv_heads, tokens, group, head_dim]`
    queries: Vec<f32>,
    /// `[num_kv_heads, tokens, group]`
    lse: Vec<f32>,
}

impl Heads {
    fn gather(shape: &AttentionShape, onlookers: &Onlookers<'_>, (q, lse): (&[f32], &[f32])) -> Self {
        let (dim, group) = (shape.layout.head_dim, shape.group());
        let mut heads = Self { queries: Vec::new(), lse: Vec::new() };
        for kv_head in 0..shape.layout.num_kv_heads {
            for token in onlookers.tokens {
                let head = (onlookers.segment.first_token + token) * shape.num_heads + kv_head * group;
                heads.queries.extend(q[head * dim..(head + group) * dim].iter().map(|v| v * shape.scale));
                heads.lse.extend_from_slice(&lse[head..head + group]);
            }
        }
        heads
    }

    fn of(&self, kv_head: usize, count: usize, dim: usize) -> (&[f32], &[f32]) {
        let range = kv_head * count..(kv_head + 1) * count;
        (&self.queries[range.start * dim..range.end * dim], &self.lse[range])
    }
}
