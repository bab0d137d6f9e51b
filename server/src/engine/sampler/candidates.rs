//! Temperature, min_p, top_k, top_p and the draw, without sorting the vocabulary.

use std::cmp::Ordering;

use super::BadLogits;
use crate::request::SamplingParams;

/// A token with its weight `exp((logit − max) / temperature)`.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    id: u32,
    weight: f64,
}

/// Heaviest first; of equals the lowest id.
fn order(a: &Candidate, b: &Candidate) -> Ordering {
    b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id))
}

/// The token at `uniform` ∈ [0, 1) of the cumulative distribution that the parameters leave.
pub(super) fn draw(logits: &[f32], params: &SamplingParams, uniform: f64) -> Result<u32, BadLogits> {
    if logits.iter().any(|v| v.is_nan()) {
        return Err(BadLogits);
    }
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !max.is_finite() {
        return Err(BadLogits);
    }
    let scale = 1.0 / f64::from(params.temperature);
    let weight = |logit: f32| (f64::from(logit - max) * scale).exp();
    let min_weight = f64::from(params.min_p);
    let mut kept: Vec<Candidate> = logits
        .iter()
        .enumerate()
        .map(|(id, &logit)| Candidate { id: id as u32, weight: weight(logit) })
        .filter(|c| c.weight > 0.0 && c.weight >= min_weight)
        .collect();
    if params.top_k > 0 && (params.top_k as usize) < kept.len() {
        keep_heaviest(&mut kept, params.top_k as usize);
    }
    if params.top_p < 1.0 {
        keep_nucleus(&mut kept, f64::from(params.top_p));
    }
    Ok(pick(&kept, uniform))
}

/// Keeps the `k` heaviest, in order.
fn keep_heaviest(candidates: &mut Vec<Candidate>, k: usize) {
    candidates.select_nth_unstable_by(k - 1, order);
    candidates.truncate(k);
    candidates.sort_unstable_by(order);
}

/// Keeps the smallest set of heaviest candidates that holds `mass` of the total weight, in order. Sorts a
/// growing head instead of everything: the nucleus of a language model is small.
fn keep_nucleus(candidates: &mut Vec<Candidate>, mass: f64) {
    let target = candidates.iter().map(|c| c.weight).sum::<f64>() * mass;
    let mut head = 64;
    loop {
        if head < candidates.len() {
            candidates.select_nth_unstable_by(head - 1, order);
        }
        let end = head.min(candidates.len());
        candidates[..end].sort_unstable_by(order);
        let mut sum = 0.0;
        for i in 0..end {
            sum += candidates[i].weight;
            if sum >= target {
                candidates.truncate(i + 1);
                return;
            }
        }
        if end == candidates.len() {
            return;
        }
        head *= 8;
    }
}

fn pick(candidates: &[Candidate], uniform: f64) -> u32 {
    let mut left = uniform * candidates.iter().map(|c| c.weight).sum::<f64>();
    for candidate in candidates {
        left -= candidate.weight;
        if left < 0.0 {
            return candidate.id;
        }
    }
    // Rounding may leave a hair: the last candidate owns it. There is at least the maximum itself.
    candidates.last().map_or(0, |c| c.id)
}
