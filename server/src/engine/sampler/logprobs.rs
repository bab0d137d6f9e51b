//! Log-probabilities under the unmodified logits.

use std::cmp::Ordering;

use super::BadLogits;
use crate::request::TokenLogprob;

/// The log-probability of `token` and the `top` likeliest tokens.
///
/// # Errors
/// [`BadLogits`].
pub(crate) fn logprob_of(logits: &[f32], token: u32, top: usize) -> Result<TokenLogprob, BadLogits> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let own = logits.get(token as usize).copied().ok_or(BadLogits)?;
    let sum: f64 = logits.iter().map(|&v| f64::from(v - max).exp()).sum();
    if !sum.is_finite() || !max.is_finite() {
        return Err(BadLogits);
    }
    let norm = f64::from(max) + sum.ln();
    let logprob = |logit: f32| (f64::from(logit) - norm) as f32;
    let top = likeliest(logits, top).into_iter().map(|id| (id, logprob(logits[id as usize]))).collect();
    Ok(TokenLogprob { token, logprob: logprob(own), top })
}

/// Ids of the `count` largest logits, descending; of equals the lowest id first.
fn likeliest(logits: &[f32], count: usize) -> Vec<u32> {
    let order =
        |a: &u32, b: &u32| -> Ordering { logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)) };
    let count = count.min(logits.len());
    if count == 0 {
        return Vec::new();
    }
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    ids.select_nth_unstable_by(count - 1, order);
    ids.truncate(count);
    ids.sort_unstable_by(order);
    ids
}
