use std::collections::BTreeMap;

use super::*;

fn sampler(params: SamplingParams) -> Sampler {
    Sampler::new(Arc::new(params), 0, &[1], Arc::from([0u32]))
}

fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, ..Default::default() }
}

/// How often each token is drawn from `logits` in `draws` draws with different seeds.
fn frequencies(params: &SamplingParams, logits: &[f32], draws: u64) -> Vec<f64> {
    let mut counts = vec![0f64; logits.len()];
    for seed in 0..draws {
        let token = sampler(SamplingParams { seed: Some(seed), ..params.clone() }).sample(logits);
        counts[token.expect("good logits").token as usize] += 1.0;
    }
    counts.into_iter().map(|count| count / draws as f64).collect()
}

#[track_caller]
fn assert_drawn(params: SamplingParams, logits: &[f32], expected: &[f64]) {
    let total: f64 = expected.iter().sum();
    let drawn = frequencies(&params, logits, 20_000);
    for (drawn, expected) in drawn.iter().zip(expected) {
        let expected = expected / total;
        // Five standard deviations of a binomial; nothing at all where nothing may be drawn.
        let slack = 5.0 * (expected * (1.0 - expected) / 20_000.0).sqrt();
        assert!((drawn - expected).abs() <= slack, "{params:?}: {drawn} instead of {expected}");
    }
}

#[test]
fn draws_follow_the_formulas() {
    let logits = [2.0, 1.0, 0.0, -1.0, 1.5];
    let p = |t: f64| logits.map(|v: f32| (f64::from(v) / t).exp());
    let base = SamplingParams::default();
    assert_drawn(base.clone(), &logits, &p(1.0));
    assert_drawn(SamplingParams { temperature: 0.5, ..base.clone() }, &logits, &p(0.5));
    let [a, b, c, _, e] = p(1.0);
    assert_drawn(SamplingParams { top_k: 2, ..base.clone() }, &logits, &[a, 0.0, 0.0, 0.0, e]);
    // Masses: .459, .278, .169, .062, .023 of ids 0, 4, 1, 2, 3: 0.8 needs three.
    assert_drawn(SamplingParams { top_p: 0.8, ..base.clone() }, &logits, &[a, b, 0.0, 0.0, e]);
    assert_drawn(SamplingParams { min_p: 0.13, ..base.clone() }, &logits, &[a, b, c, 0.0, e]);
    // top_p works on what top_k left: of {0, 4} the first has 62%.
    assert_drawn(SamplingParams { top_k: 2, top_p: 0.6, ..base }, &logits, &[1.0, 0.0, 0.0, 0.0, 0.0]);
}

#[test]
fn a_nucleus_wider_than_the_sorted_head_is_exact() {
    let logits = vec![0f32; 1000];
    let params = SamplingParams { top_p: 0.9, ..Default::default() };
    let drawn = frequencies(&params, &logits, 20_000);
    assert!(drawn[900..].iter().all(|&f| f == 0.0), "of equals the lowest ids are kept");
    assert!(drawn[890..900].iter().sum::<f64>() > 0.0);
}

#[test]
fn penalties_and_bias_follow_openais_formula() {
    let params = SamplingParams {
        presence_penalty: 0.5,
        frequency_penalty: 1.0,
        repetition_penalty: 2.0,
        logit_bias: BTreeMap::from([(3, 1.25)]),
        ..greedy()
    };
    let mut sampler = sampler(params);
    let logits = [4.0, 3.0, 1.0, 0.5, -1.0];
    sampler.remember(0);
    sampler.remember(0);
    sampler.remember(4);
    let mut modified = logits;
    sampler.modify(&mut modified);
    // 0: 4/2 − .5 − 2·1; 1: in the prompt, 3/2; 3: .5 + 1.25; 4: −1·2 − .5 − 1.
    assert_eq!(modified, [-0.5, 1.5, 1.0, 1.75, -3.5]);
}

#[test]
fn greedy_takes_the_lowest_of_equals_and_min_tokens_bans_the_end() {
    let logits = [5.0, 3.0, 3.0, 1.0];
    assert_eq!(sampler(greedy()).sample(&logits).map(|t| t.token), Ok(0));
    let mut sampler = sampler(SamplingParams { min_tokens: 1, ..greedy() });
    assert_eq!(sampler.sample(&logits).map(|t| t.token), Ok(1));
    assert_eq!(sampler.sample(&logits).map(|t| t.token), Ok(0));
}

#[test]
fn a_draw_depends_on_seed_choice_and_index_alone() {
    let logits: Vec<f32> = (0..500).map(|i| ((i * 37) % 11) as f32 / 3.0).collect();
    let run = |seed, choice| -> Vec<u32> {
        let params = Arc::new(SamplingParams { seed: Some(seed), ..Default::default() });
        let mut sampler = Sampler::new(params, choice, &[], Arc::from([]));
        (0..50).map(|_| sampler.sample(&logits).expect("good logits").token).collect()
    };
    assert_eq!(run(7, 0), run(7, 0));
    assert_ne!(run(7, 0), run(7, 1));
    assert_ne!(run(7, 0), run(8, 0));
}

#[test]
fn logprobs_are_the_log_softmax_of_unmodified_logits() {
    let logits = [1.0f32, 2.0, 2.0, -3.0];
    let params = SamplingParams { logprobs: Some(3), logit_bias: BTreeMap::from([(3, 100.0)]), ..greedy() };
    let token = sampler(params).sample(&logits).expect("good logits");
    let norm = logits.iter().map(|&v| f64::from(v).exp()).sum::<f64>().ln();
    assert_eq!(token.token, 3);
    assert!((f64::from(token.logprob) - (-3.0 - norm)).abs() < 1e-6);
    assert_eq!(token.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2, 0]);
    assert!((f64::from(token.top[0].1) - (2.0 - norm)).abs() < 1e-6);
}

#[test]
fn bad_logits_are_an_error() {
    for logits in [[0.0, f32::NAN, 1.0], [f32::NEG_INFINITY; 3], [f32::INFINITY, 0.0, 0.0]] {
        let hot = SamplingParams { seed: Some(1), ..Default::default() };
        let infinite = logits[0] == f32::INFINITY;
        assert!(sampler(hot).sample(&logits).is_err());
        assert!(infinite || sampler(greedy()).sample(&logits).is_err());
    }
}
