use super::*;
use crate::kernels::cuda::sampling::{draw_bytes, sample};
use crate::models::Draw;

/// Tokens that the parameters keep, by id, with their weights: the order of the CPU's sampler, in f64.
fn kept(logits: &[f32], draw: &Draw) -> Vec<(u32, f64)> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: f32| (f64::from(logit - max) / f64::from(draw.temperature)).exp();
    let mut all: Vec<(u32, f64)> =
        logits.iter().enumerate().map(|(id, &logit)| (id as u32, weight(logit))).collect();
    all.retain(|(_, w)| *w > 0.0 && *w >= f64::from(draw.min_p));
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if draw.top_k > 0 {
        all.truncate(draw.top_k as usize);
    }
    if draw.top_p < 1.0 {
        let target = all.iter().map(|(_, w)| w).sum::<f64>() * f64::from(draw.top_p);
        let mut sum = 0.0;
        let enough = all.iter().position(|(_, w)| {
            sum += w;
            sum >= target - 1e-6
        });
        all.truncate(enough.map_or(all.len(), |last| last + 1));
    }
    all.sort_by_key(|(id, _)| *id);
    all
}

fn run(device: &dyn Device, (logits, vocab): (&[f32], usize), draws: &[Draw]) -> Vec<u32> {
    let (logits, bytes) = (floats(device, logits), upload(device, &draw_bytes(draws)));
    let tokens = words(device, &vec![77_777; draws.len()]);
    sample(device, (Part::all(&logits), vocab), (Part::all(&bytes), draws), Part::all(&tokens)).unwrap();
    let mut found = vec![0u32; draws.len()];
    device.download(Part::all(&tokens), bytemuck::cast_slice_mut(&mut found)).unwrap();
    found
}

const GREEDY: Draw = Draw { row: 0, top_k: 0, temperature: 0.0, top_p: 1.0, min_p: 0.0, uniform: 0.0 };

#[test]
fn the_likeliest_token_is_taken_and_bad_rows_are_told() {
    let vocab = 1501;
    for device in devices() {
        let device = &*device;
        let mut logits = noise(1, 5 * vocab);
        (logits[700], logits[3]) = (9.0, 9.0);
        logits[vocab + 1500] = f32::INFINITY;
        logits[2 * vocab + 17] = f32::NAN;
        logits[3 * vocab..4 * vocab].fill(f32::NEG_INFINITY);
        let mut draws: Vec<Draw> = (0..4).map(|row| Draw { row, ..GREEDY }).collect();
        draws.push(Draw { row: 1, temperature: 1.0, ..GREEDY });
        assert_eq!(run(device, (&logits, vocab), &draws), [3, 1500, u32::MAX, u32::MAX, u32::MAX]);
    }
}

#[test]
fn draws_follow_the_kept_tokens() {
    check_draws(&noise(2, 1103).iter().map(|v| v * 4.0).collect::<Vec<f32>>());
}

#[test]
fn draws_of_many_tokens_follow_the_kept_ones() {
    // So many weights alike that not even the heaviest are few; then a few above them.
    let flat = noise(3, 6007);
    check_draws(&flat);
    let raised = |by: f32| {
        flat.iter().enumerate().map(|(i, v)| v + if i % 211 == 5 { by } else { 0.0 }).collect::<Vec<f32>>()
    };
    check_draws(&raised(6.0));
}

fn check_draws(logits: &[f32]) {
    let vocab = logits.len();
    let sets = [
        Draw { temperature: 1.0, ..GREEDY },
        Draw { temperature: 0.7, top_k: 5, ..GREEDY },
        Draw { temperature: 1.3, top_p: 0.6, ..GREEDY },
        Draw { temperature: 1.0, top_k: 40, top_p: 0.5, ..GREEDY },
        Draw { temperature: 1.0, min_p: 0.3, top_p: 0.9, ..GREEDY },
        Draw { temperature: 0.5, top_k: 1, top_p: 0.01, ..GREEDY },
    ];
    for device in devices() {
        let device = &*device;
        for set in sets {
            let kept = kept(logits, &set);
            let total: f64 = kept.iter().map(|(_, w)| w).sum();
            // Through the middle of each token's share, and both ends.
            let mut before = 0.0;
            let mut expected = Vec::new();
            let mut draws = Vec::new();
            for (i, &(id, weight)) in kept.iter().enumerate() {
                if i % kept.len().div_ceil(5) == 0 {
                    expected.push(id);
                    draws.push(Draw { uniform: ((before + weight / 2.0) / total) as f32, ..set });
                }
                before += weight;
            }
            for (uniform, at) in [(0.0, 0), (1.0 - f32::EPSILON / 2.0, kept.len() - 1)] {
                expected.push(kept[at].0);
                draws.push(Draw { uniform, ..set });
            }
            assert_eq!(run(device, (logits, vocab), &draws), expected, "{set:?} {device:?}");
        }
    }
}

#[test]
fn of_equal_weights_the_lowest_ids_are_kept() {
    let vocab = 1200;
    let mut logits = vec![-5.0; vocab];
    for id in [1100, 40, 41, 900] {
        logits[id] = 1.0;
    }
    let set = Draw { temperature: 1.0, ..GREEDY };
    for device in devices() {
        let device = &*device;
        for (uniform, id) in [(0.1, 40), (0.5, 41), (0.9, 900)] {
            for draw in [Draw { top_k: 3, uniform, ..set }, Draw { top_p: 0.55, top_k: 4, uniform, ..set }] {
                assert_eq!(run(device, (&logits, vocab), &[draw]), [id], "{draw:?}");
            }
        }
    }
}
