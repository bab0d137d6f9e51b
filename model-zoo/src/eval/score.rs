//! Teacher forcing of one plan beside the dense one: perplexity, agreement, divergence.

use super::runner::Runner;
use crate::compression::Plan;
use crate::{Result, ZooError};

/// Sums over scored positions.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Score {
    /// Positions scored.
    pub tokens: u64,
    /// Σ −ln p(next token), in nats.
    pub nll: f64,
    /// Positions where the likeliest token is the dense plan's.
    pub agreements: u64,
    /// Σ KL(dense ‖ plan), in nats.
    pub kl: f64,
    /// Attention and FFN sublayers run for output tokens.
    pub sublayers_run: [u64; 2],
    /// Layers that the dense plan runs for the same tokens.
    pub layers_dense: u64,
}

impl Score {
    /// e to the mean negative log-likelihood.
    pub fn perplexity(&self) -> f64 {
        (self.nll / self.tokens.max(1) as f64).exp()
    }

    /// Share of positions at which the plan's likeliest token is the dense one's.
    pub fn agreement(&self) -> f64 {
        self.agreements as f64 / self.tokens.max(1) as f64
    }

    /// Mean KL divergence from dense, in nats.
    pub fn mean_kl(&self) -> f64 {
        self.kl / self.tokens.max(1) as f64
    }

    /// Work in the layers ÷ the dense plan's, where an attention and an FFN sublayer cost as `weights`
    /// says: the closed form of the time of compute-bound and of weight-bound steps alike.
    pub fn cost(&self, weights: [usize; 2]) -> f64 {
        let run: f64 = self.sublayers_run.iter().zip(weights).map(|(&n, w)| n as f64 * w as f64).sum();
        let dense = self.layers_dense as f64 * (weights[0] + weights[1]) as f64;
        if dense > 0.0 { run / dense } else { 1.0 }
    }
}

/// A text in windows: each begins with a prompt, whose tokens are not scored.
#[derive(Debug, Clone, Copy)]
pub struct Windows<'a> {
    /// All tokens.
    pub tokens: &'a [u32],
    /// Tokens of a window.
    pub len: usize,
    /// Of those, the prompt's.
    pub prompt: usize,
    /// Windows at most.
    pub max: usize,
    /// Token that begins every window, if the model has one.
    pub bos: Option<u32>,
}

impl Windows<'_> {
    /// The windows in order. Scored parts do not overlap and leave nothing out: each window begins where
    /// its prompt repeats the end of the one before (sliding window of stride `len − prompt`).
    pub fn iter(&self) -> impl Iterator<Item = Vec<u32>> + '_ {
        let stride = (self.len - self.prompt).max(1);
        let starts = (0..).map(move |i| i * stride).take_while(|start| start + self.len <= self.tokens.len());
        starts.take(self.max).map(|start| {
            let mut window = self.tokens[start..start + self.len].to_vec();
            if let (Some(bos), Some(first)) = (self.bos, window.first_mut()) {
                *first = bos;
            }
            window
        })
    }
}

/// Scores each plan on every window, beside the first one, which is the reference.
///
/// # Errors
/// [`ZooError::Step`] when there is no window to score, or as [`Runner::step`].
pub fn score(
    runner: &mut Runner<'_>,
    windows: &Windows<'_>,
    plans: &[Plan],
    mut progress: impl FnMut(usize, usize),
) -> Result<Vec<Score>> {
    let all: Vec<_> = windows.iter().collect();
    if all.is_empty() {
        return Err(ZooError::Step(format!("the text is shorter than a window of {} tokens", windows.len)));
    }
    let mut scores = vec![Score::default(); plans.len()];
    for (index, window) in all.iter().enumerate() {
        let mut reference = Vec::new();
        for (number, (plan, score)) in plans.iter().zip(&mut scores).enumerate() {
            let first = windows.prompt - 1;
            let mut sum = *score;
            let state = runner.teach_from(plan, (window, first), |position, logits| {
                let Some(&next) = window.get(position + 1) else { return };
                if number == 0 {
                    reference.extend_from_slice(logits);
                }
                let at = (position - first) * logits.len();
                add(&mut sum, &reference[at..at + logits.len()], logits, next);
            })?;
            *score = sum;
            let run = state.sublayers_run.into_iter().zip(plan.work(windows.prompt));
            for (sum, (run, prompt)) in score.sublayers_run.iter_mut().zip(run) {
                *sum += run - prompt;
            }
            score.layers_dense += (runner.num_layers() * (window.len() - windows.prompt)) as u64;
            progress(index * plans.len() + number + 1, all.len() * plans.len());
        }
    }
    Ok(scores)
}

/// Adds the position at which `next` follows, given the dense plan's logits and another's.
pub(crate) fn add(score: &mut Score, reference: &[f32], logits: &[f32], next: u32) {
    let (sum, reference_sum) = (log_sum_exp(logits), log_sum_exp(reference));
    let mut kl = 0f64;
    let (mut best, mut reference_best) = (0, 0);
    for (token, (&logit, &dense)) in logits.iter().zip(reference).enumerate() {
        let (log_q, log_p) = (f64::from(logit) - sum, f64::from(dense) - reference_sum);
        kl += f64::from((log_p as f32).exp()) * (log_p - log_q);
        if logit > logits[best] {
            best = token;
        }
        if dense > reference[reference_best] {
            reference_best = token;
        }
    }
    score.tokens += 1;
    score.nll += sum - f64::from(logits[next as usize]);
    score.agreements += u64::from(best == reference_best);
    score.kl += kl.max(0.0);
}

/// ln Σ eˣ
fn log_sum_exp(logits: &[f32]) -> f64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    f64::from(most) + logits.iter().map(|&x| f64::from((x - most).exp())).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_is_the_formula_of_two_distributions() {
        // p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4), whatever is added to the logits.
        let p = [4f32, 2.0, 2.0].map(|x| x.ln() + 3.0);
        let q = [1f32, 2.0, 1.0].map(|x| x.ln() - 7.0);
        let mut score = Score::default();
        add(&mut score, &p, &q, 1);
        let kl = 0.5 * 2f64.ln() - 0.25 * 2f64.ln();
        assert!((score.nll - 2f64.ln()).abs() < 1e-6 && (score.kl - kl).abs() < 1e-6, "{score:?}");
        assert_eq!((score.tokens, score.agreements), (1, 0));
        assert!((score.perplexity() - 2.0).abs() < 1e-6);
        add(&mut score, &p, &p, 0);
        assert_eq!(score.agreements, 1);
    }

    #[test]
    fn windows_slide_without_gaps_or_overlaps() {
        let tokens: Vec<u32> = (0..23).collect();
        let windows = Windows { tokens: &tokens, len: 9, prompt: 4, max: 9, bos: Some(99) };
        let all: Vec<_> = windows.iter().collect();
        let scored: Vec<_> = all.iter().flat_map(|window| window[4..].to_vec()).collect();
        assert_eq!(scored, (4..19).collect::<Vec<_>>());
        assert!(all.iter().all(|window| window[0] == 99 && window.len() == 9));
    }
}
