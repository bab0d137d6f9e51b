use half::f16;
use rand::{Rng, SeedableRng};

use super::*;
use crate::kernels::cpu::pool::Pool;
use crate::kv_cache::{KvCache, PageMove, PrunedKeys};

/// A random sequence of `len` tokens in shuffled pages, every unwritten slot NaN.
struct Case {
    shape: AttentionShape,
    table: Vec<PageId>,
    kv: KvCache,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    len: usize,
}

fn case(len: usize, block_size: usize, window: Option<usize>) -> Case {
    let layout = KvLayout { num_kv_heads: 2, head_dim: 40, block_size };
    let shape = AttentionShape { num_heads: 6, layout, scale: 0.3, window };
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(len as u64);
    let pages = len.div_ceil(block_size);
    let mut kv = KvCache::new(layout, pages + 3).expect("memory");
    (0..pages + 3).for_each(|page| kv.poison(page as PageId));
    let table: Vec<PageId> = (0..pages as PageId).map(|p| (p * 7 + 2) % (pages as PageId + 3)).collect();
    let table = if (pages + 3).is_multiple_of(7) { (0..pages as PageId).rev().collect() } else { table };
    // Values that f16 holds exactly, so that the formula sees what the pages hold.
    let mut random = |n: usize| -> Vec<f32> {
        (0..n).map(|_| f16::from_f32(rng.random_range(-2.0..2.0)).to_f32()).collect()
    };
    let (q, k, v) = (random(len * 240), random(len * 80), random(len * 80));
    let isa = Isa::detect();
    for t in 0..len {
        let token = t * 80..(t + 1) * 80;
        write_kv(isa, (layout, kv.pages_mut()), (&table, t), (&k[token.clone()], &v[token]));
    }
    Case { shape, table, kv, q, k, v, len }
}

impl Case {
    /// Softmax attention of token `t`, head `h`, by the formula in f64.
    fn truth(&self, t: usize, h: usize) -> Vec<f64> {
        let kv_head = h / 3;
        let first = self.shape.window.map_or(0, |w| (t + 1).saturating_sub(w));
        let at = |x: &[f32], s: usize, c: usize| f64::from(x[s * 80 + kv_head * 40 + c]);
        let score = |s: usize| -> f64 {
            (0..40).map(|c| f64::from(self.q[t * 240 + h * 40 + c]) * at(&self.k, s, c)).sum::<f64>() * 0.3
        };
        let weights: Vec<f64> = (first..=t).map(|s| score(s).exp()).collect();
        let total: f64 = weights.iter().sum();
        (0..40).map(|c| (first..=t).map(|s| weights[s - first] / total * at(&self.v, s, c)).sum()).collect()
    }

    /// Weight of `slot` in the softmax of token `t`, head `h`, by the formula in f64.
    fn weight(&self, (t, h): (usize, usize), slot: usize) -> f64 {
        let at = |x: &[f32], s: usize, c: usize| f64::from(x[s * 80 + h / 3 * 40 + c]);
        let score = |s: usize| -> f64 {
            (0..40).map(|c| f64::from(self.q[t * 240 + h * 40 + c]) * at(&self.k, s, c)).sum::<f64>() * 0.3
        };
        let first = self.shape.window.map_or(0, |w| (t + 1).saturating_sub(w));
        if slot < first { 0.0 } else { score(slot).exp() / (first..=t).map(|s| score(s).exp()).sum::<f64>() }
    }

    fn run(&self, isa: Isa, first: usize, count: usize) -> Vec<f32> {
        let cpu = Cpu { pool: Pool::new(2), isa };
        let segment = Segment {
            first_token: 0,
            num_tokens: count,
            kv_start: first,
            block_table: &self.table,
            packed: None,
        };
        let mut out = vec![f32::NAN; count * 240];
        let q = &self.q[first * 240..(first + count) * 240];
        attention(&cpu, &self.shape, &[segment], (q, self.kv.pages(), &mut out));
        out
    }
}

#[test]
fn equals_the_formula_and_never_reads_unwritten_slots() {
    for (len, block_size, window) in
        [(1, 16, None), (17, 16, None), (70, 32, None), (61, 16, Some(9)), (90, 32, Some(40))]
    {
        let case = case(len, block_size, window);
        for isa in Isa::available() {
            let out = case.run(isa, 0, len);
            for t in 0..len {
                for h in 0..6 {
                    for (a, b) in out[t * 240 + h * 40..][..40].iter().zip(case.truth(t, h)) {
                        assert!((f64::from(*a) - b).abs() < 2e-5, "{isa:?} {len} {t} {h}: {a} {b}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_query_has_the_same_bits_in_any_chunk() {
    for window in [None, Some(21)] {
        let case = case(75, 16, window);
        for isa in Isa::available() {
            let whole = case.run(isa, 0, case.len);
            for chunk in [1, 7, 32] {
                // Slots after the chunk are written in the whole run and hold later tokens here: both unseen.
                for first in (0..case.len).step_by(chunk) {
                    let count = chunk.min(case.len - first);
                    assert_eq!(case.run(isa, first, count), whole[first * 240..(first + count) * 240]);
                }
            }
        }
    }
}

/// methods.md §6 (e) 5: weights from the log of the sum equal the softmax, and unwritten slots are not read.
#[test]
fn what_is_looked_at_equals_the_softmax() {
    for (len, block_size, window) in [(70, 16, None), (61, 32, None), (90, 16, Some(40))] {
        let case = case(len, block_size, window);
        let (slots, tokens) = (19..43, [47, 48, 50, len - 1]);
        for isa in Isa::available() {
            let cpu = Cpu { pool: Pool::new(2), isa };
            let segment = Segment {
                first_token: 0,
                num_tokens: len,
                kv_start: 0,
                block_table: &case.table,
                packed: None,
            };
            let (mut out, mut lse) = (vec![f32::NAN; len * 240], vec![f32::NAN; len * 6]);
            let parts = (&case.q[..], case.kv.pages(), &mut out[..], &mut lse[..]);
            attention_with_lse(&cpu, &case.shape, &[segment], parts);
            assert_eq!(out, case.run(isa, 0, len), "the result does not depend on what else is asked for");
            let onlookers = gaze::Onlookers { segment, tokens: &tokens, slots: slots.clone() };
            let [sums, maxima] = gaze::gaze(&cpu, &case.shape, &onlookers, (&case.q, &lse, case.kv.pages()));
            for (slot, (sum, max)) in slots.clone().zip(sums.iter().zip(&maxima)) {
                let weights: Vec<f64> = tokens
                    .iter()
                    .map(|&t| (0..6).map(|h| case.weight((t, h), slot)).sum::<f64>() / 6.0)
                    .collect();
                let truth = (weights.iter().sum::<f64>(), weights.iter().copied().fold(0.0, f64::max));
                assert!((f64::from(*sum) - truth.0).abs() < 1e-5, "{isa:?} {slot}: {sum} {truth:?}");
                assert!((f64::from(*max) - truth.1).abs() < 1e-5, "{isa:?} {slot}: {max} {truth:?}");
            }
        }
    }
}

/// The channels that are kept of the first `len` slots.
fn best_of(case: &Case, len: usize, query_sums: &[f32], kept: usize) -> Box<[u8]> {
    let key_sums = case.kv.key_squares(std::slice::from_ref(&case.table), len).expect("pages on the host");
    PrunedKeys::best((query_sums, &key_sums[0]), 2, kept)
}

/// methods.md §2 (e) 3: packed keys are those with the pruned channels zeroed, in the packed slots alone.
#[test]
fn a_packed_prefix_equals_keys_with_zeroed_channels() {
    for (block_size, window) in [(16, None), (32, None), (16, Some(50))] {
        let (len, num_slots, kept) = (105, 64, 24);
        let mut case = case(len, block_size, window);
        let layout = case.shape.layout;
        let packed_layout = PackedLayout { layout, kept };
        let sums: Vec<f32> = (0..80).map(|i| (i * 37 % 80) as f32).collect();
        let channels = best_of(&case, len, &sums, kept);
        // Fresh pages for the packed slots, then the dense tail as it is.
        let own = case.table.clone();
        let num_packed = packed_layout.num_pages(num_slots);
        let all = case.kv.num_pages();
        let mut kv = KvCache::new(layout, all + num_packed).expect("memory");
        (0..(all + num_packed) as PageId).for_each(|page| kv.poison(page));
        for page in 0..all as PageId {
            kv.pages_mut().page_mut(page).copy_from_slice(case.kv.pages().page(page));
        }
        let mut table: Vec<PageId> = (all as PageId..(all + num_packed) as PageId).rev().collect();
        for (index, &page) in own.iter().take(num_slots / block_size).enumerate() {
            let first = index * block_size;
            let packed = table[packed_layout.pages_of(first, block_size)].to_vec();
            let keys = PrunedKeys { kept, channels: vec![channels.clone()] };
            kv.seal(&[PageMove::Pack { layer: 0, page, first, packed }], &keys).expect("pages on the host");
            kv.poison(page);
        }
        table.extend(&own[num_slots / block_size..]);
        // The twin: the same keys, zeroed.
        for (t, token) in case.k.chunks_exact_mut(80).enumerate().take(num_slots) {
            for (head, keys) in token.chunks_exact_mut(40).enumerate() {
                let own = &channels[head * kept..(head + 1) * kept];
                (0..40).filter(|&c| !own.contains(&(c as u8))).for_each(|c| keys[c] = 0.0);
            }
            let v = &case.v[t * 80..(t + 1) * 80];
            write_kv(Isa::Portable, (layout, case.kv.pages_mut()), (&own, t), (token, v));
        }
        for isa in Isa::available() {
            let cpu = Cpu { pool: Pool::new(2), isa };
            let packed = Some(Packed { num_slots, kept, channels: &channels });
            let count = len - num_slots;
            let segment = Segment {
                first_token: 0,
                num_tokens: count,
                kv_start: num_slots,
                block_table: &table,
                packed,
            };
            let mut out = vec![f32::NAN; count * 240];
            attention(&cpu, &case.shape, &[segment], (&case.q[num_slots * 240..], kv.pages(), &mut out));
            for (a, b) in out.iter().zip(case.run(isa, num_slots, count)) {
                assert!((a - b).abs() < 1e-5, "{isa:?} {block_size}: {a} {b}");
            }
        }
    }
}

/// methods.md §2 (e) 2: the factorised score ranks as the Frobenius norm of each channel's part of QKᵀ.
#[test]
fn channels_rank_by_the_frobenius_norm_of_their_part() {
    let case = case(40, 16, None);
    let (head, group) = (1, 3);
    let query = |t: usize, g: usize, c: usize| f64::from(case.q[t * 240 + (head * group + g) * 40 + c]);
    let key = |s: usize, c: usize| f64::from(case.k[s * 80 + head * 40 + c]);
    let norm = |c: usize| {
        let pairs = (0..40).flat_map(|t| (0..group).flat_map(move |g| (0..40).map(move |s| (t, g, s))));
        pairs.map(|(t, g, s)| (query(t, g, c) * key(s, c)).powi(2)).sum::<f64>().sqrt()
    };
    let mut order: Vec<usize> = (0..40).collect();
    order.sort_by(|&a, &b| norm(b).total_cmp(&norm(a)));
    let mut best: Vec<u8> = order[..16].iter().map(|&c| c as u8).collect();
    best.sort_unstable();
    let mut sums = vec![1f32; 80];
    for (c, sum) in sums[40..].iter_mut().enumerate() {
        let squares =
            (0..40).flat_map(|t| (0..group).map(move |g| (t, g))).map(|(t, g)| query(t, g, c).powi(2));
        *sum = (squares.sum::<f64>() / group as f64) as f32;
    }
    let channels = best_of(&case, 40, &sums, 16);
    assert_eq!(channels[16..], best);
    // A channel that no query looks at goes first.
    sums[40 + best[0] as usize] = 0.0;
    assert!(!best_of(&case, 40, &sums, 39)[39..].contains(&best[0]));
}
