use super::*;
use crate::kernels::cuda::attention::{Attention, HEAD_DIMS, Items, PACKED_BYTES, decode_scratch};
use crate::kernels::cuda::ops::{After, Heads, Matrix, Norm, Places, Tokens, place_rows, skinny};

/// Rows with KV, and a few tokens each, in scattered pages.
pub(super) struct Case {
    pub(super) heads: Heads,
    /// KV slots before the step, and tokens in it, of each row.
    pub(super) rows: Vec<(usize, usize)>,
    /// `[row][slot][kv head][channel]`
    pub(super) keys: Vec<Vec<f32>>,
    pub(super) values: Vec<Vec<f32>>,
    pub(super) starts: Vec<u32>,
    pub(super) tables: Vec<u32>,
    pub(super) num_pages: usize,
}

/// Where attention reads: queries, the pool, and KV lengths, beginnings and pages of rows.
pub(super) fn read_from(
    (q, pool): (&Buffer, &Buffer),
    [kv_len, starts, tables]: [Part; 3],
    heads: Heads,
) -> Places {
    let (q, pages) = (Part::all(q), Part::all(pool));
    let [rotary, rows, within] = [Part::NONE; 3];
    Places { q, pages, rotary, rows, within, kv_len, starts, tables, heads }
}

impl Case {
    pub(super) fn new(heads: Heads, rows: &[(usize, usize)]) -> Self {
        let width = heads.kv * heads.dim;
        let lens = || rows.iter().map(|(before, tokens)| before + tokens);
        let noise_of = |seed: u64| {
            lens().enumerate().map(move |(row, len)| rounded(&noise(seed + row as u64, len * width)))
        };
        let (keys, values) = (noise_of(100).collect(), noise_of(200).collect());
        let counts: Vec<usize> = lens().map(|len| len.div_ceil(heads.block_size)).collect();
        let num_pages = counts.iter().sum::<usize>() + 3;
        let mut free = (0..num_pages).map(|i| ((i * 7919 + 2) % num_pages) as u32);
        let (mut starts, mut tables) = (Vec::new(), Vec::new());
        for count in counts {
            starts.push(tables.len() as u32);
            tables.extend(free.by_ref().take(count));
        }
        Self { heads, rows: rows.to_vec(), keys, values, starts, tables, num_pages }
    }

    fn half_page(&self) -> usize {
        self.heads.kv * self.heads.dim * self.heads.block_size
    }

    /// Where channel `channel` of K and of V of a slot lie in the pool, in values.
    pub(super) fn place(&self, row: usize, slot: usize, (head, channel): (usize, usize)) -> [usize; 2] {
        let Heads { dim, block_size, .. } = self.heads;
        let page = self.tables[self.starts[row] as usize + slot / block_size] as usize;
        let (base, at) = (page * 2 * self.half_page(), slot % block_size);
        let k = base + (head * block_size + at) * dim + channel;
        [k, base + self.half_page() + (head * dim + channel) * block_size + at]
    }

    /// The pool with the rows' first slots written, and NaN everywhere else.
    pub(super) fn pool(&self, device: &dyn Device, written: impl Fn(usize) -> usize) -> Buffer {
        let mut pool = vec![f32::NAN; self.num_pages * 2 * self.half_page()];
        for (row, (keys, values)) in self.keys.iter().zip(&self.values).enumerate() {
            for slot in 0..written(row) {
                for head in 0..self.heads.kv {
                    for channel in 0..self.heads.dim {
                        let at = (slot * self.heads.kv + head) * self.heads.dim + channel;
                        let [k, v] = self.place(row, slot, (head, channel));
                        (pool[k], pool[v]) = (keys[at], values[at]);
                    }
                }
            }
        }
        halves(device, &pool)
    }

    /// Softmax attention of the query of `row` at `slot`, in f64.
    pub(super) fn expected(
        &self,
        (row, slot): (usize, usize),
        head: usize,
        query: &[f32],
        (scale, window): (f32, Option<usize>),
    ) -> Vec<f64> {
        let Heads { queries, kv, dim, .. } = self.heads;
        let kv_head = head / (queries / kv);
        let first = window.map_or(0, |window| (slot + 1).saturating_sub(window));
        let of =
            |all: &[f32], slot: usize, channel: usize| f64::from(all[(slot * kv + kv_head) * dim + channel]);
        let score = |slot| {
            (0..dim).map(|c| f64::from(query[c]) * of(&self.keys[row], slot, c)).sum::<f64>()
                * f64::from(scale)
        };
        let scores: Vec<f64> = (first..=slot).map(score).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let total: f64 = weights.iter().sum();
        let value =
            |c| (first..=slot).zip(&weights).map(|(s, w)| w * of(&self.values[row], s, c)).sum::<f64>();
        (0..dim).map(|c| value(c) / total).collect()
    }

    /// Runs both kernels over all rows and compares.
    fn check(&self, device: &dyn Device, (window, splits): (Option<usize>, usize)) {
        let Heads { queries, dim, .. } = self.heads;
        let total: usize = self.rows.iter().map(|(_, tokens)| tokens).sum();
        let q = rounded(&noise(7, total * queries * dim));
        let scale = 1.3 / (dim as f32).sqrt();
        let (q_buffer, out) = (halves(device, &q), blank(device, 2 * q.len()));
        let pool = self.pool(device, |row| self.rows[row].0 + self.rows[row].1);
        let packed = words(device, &vec![0; PACKED_BYTES / 4 * self.rows.len()]);
        let kv_len = words(device, &self.rows.iter().map(|(before, _)| *before as u32).collect::<Vec<_>>());
        let (starts, tables) = (words(device, &self.starts), words(device, &self.tables));
        let mut lists = [Vec::new(), Vec::new()];
        let mut token = 0u32;
        let mut expected = Vec::new();
        for (row, &(before, tokens)) in self.rows.iter().enumerate() {
            lists[usize::from(tokens > 1)].extend([token, row as u32, 0, tokens as u32]);
            for i in 0..tokens {
                for head in 0..queries {
                    let at = ((token as usize + i) * queries + head) * dim;
                    expected.extend(self.expected(
                        (row, before + i),
                        head,
                        &q[at..at + dim],
                        (scale, window),
                    ));
                }
            }
            token += tokens as u32;
        }
        // Padding: nothing is read or written for it.
        lists[0].extend([0, u32::MAX, 0, 1]);
        let counts = lists.each_ref().map(|list| list.len() / 4);
        let buffers = lists.map(|list| words(device, &list));
        let bytes = decode_scratch(self.heads, counts[0], splits);
        let scratch = [blank(device, bytes[0]), upload(device, &vec![0; bytes[1]])];
        let lists = [&kv_len, &starts, &tables].map(Part::all);
        let places = read_from((&q_buffer, &pool), lists, self.heads);
        let attention = Attention {
            places,
            out: Part::all(&out),
            scale,
            window,
            packed: Part::all(&packed),
            layer: 0,
            scratch: scratch.each_ref().map(Part::all),
        };
        let longest = self.rows.iter().map(|(_, tokens)| *tokens).max().unwrap_or(0);
        let items = |which: usize, longest| Items {
            items: Part::all(&buffers[which]),
            count: counts[which],
            longest,
        };
        attention.decode(device, items(0, 1), splits).unwrap();
        attention.prefill(device, items(1, longest)).unwrap();
        let what = format!("{:?} {:?} {window:?} {splits} {device:?}", self.heads, self.rows);
        assert_close(&read_halves(device, &out), &expected, 1e-2, &what);
        let mut done = vec![1u8; bytes[1]];
        device.download(Part::all(&scratch[1]), &mut done).unwrap();
        assert!(done.iter().all(|&byte| byte == 0), "the counters are zero again");
    }
}

#[test]
fn attention_equals_softmax_in_f64() {
    for device in devices() {
        let device = &*device;
        for (i, dim) in HEAD_DIMS.into_iter().enumerate() {
            let (queries, kv) = [(6, 2), (3, 3), (9, 3), (5, 1), (8, 2), (2, 1)][i];
            let heads = Heads { queries, kv, dim, block_size: [16, 32][i % 2] };
            let rows = [(0, 1), (37, 1), (16, 1), (0, 19), (21, 5)];
            let case = Case::new(heads, &rows);
            case.check(device, (None, 1 + i % 3));
            case.check(device, (Some(11), 2));
        }
        // Groups of more than sixteen heads, more splits than there is work for, and several tiles of slots.
        let heads = Heads { queries: 19, kv: 1, dim: 16, block_size: 16 };
        Case::new(heads, &[(90, 1), (2, 1), (100, 30)]).check(device, (None, 5));
        let heads = Heads { queries: 4, kv: 2, dim: 32, block_size: 48 };
        Case::new(heads, &[(200, 1), (130, 70), (0, 65)]).check(device, (Some(90), 3));
    }
}

/// The kernels' order of a head's channels: where the pair that turns by frequency `i` lies.
fn tile(i: usize) -> [usize; 2] {
    [i / 8 * 16 + i % 8, i / 8 * 16 + i % 8 + 8]
}

/// A head normed by `norm`, and its pairs turned by `turns`, cos and sin of each.
fn expected_head(own: &mut [f64], norm: Option<&[f32]>, turns: &[f32]) {
    if let Some(norm) = norm {
        let mean = own.iter().map(|v| v * v).sum::<f64>() / own.len() as f64;
        let scale = 1.0 / (mean + 1e-5).sqrt();
        own.iter_mut().zip(norm).for_each(|(v, &n)| *v *= scale * f64::from(n));
    }
    for (i, turn) in turns.chunks_exact(2).enumerate() {
        let ([a, b], c, s) = (tile(i), f64::from(turn[0]), f64::from(turn[1]));
        (own[a], own[b]) = (own[a] * c - own[b] * s, own[b] * c + own[a] * s);
    }
}

const HEADS: Heads = Heads { queries: 3, kv: 2, dim: 32, block_size: 16 };
/// Slots before the step, and tokens, of the rows.
const ROWS: [(usize, usize); 2] = [(5, 2), (31, 3)];
/// Tokens 0 and 1 of the step are the first row's, then the second's, then one of padding.
const OWNERS: [u32; 6] = [0, 0, 1, 1, 1, u32::MAX];
const WITHIN: [u32; 6] = [0, 1, 0, 1, 2, 0];
/// The block's order of them.
const INDEX: [u32; 6] = [5, 3, 0, 1, 4, 2];

/// What is found in `q` and the pool, and what `product` and `bias` make of it.
fn placed(
    (case, q, pool): (&Case, &[f32], &[f32]),
    (product, bias): (&[f32], &[f32]),
    (norms, table): (Option<&[Vec<f32>; 2]>, &[f32]),
) -> (Vec<f32>, Vec<f64>) {
    let Heads { queries, kv, dim, .. } = HEADS;
    let width = (queries + 2 * kv) * dim;
    let (mut found, mut expected) = (q.to_vec(), Vec::new());
    let (mut found_kv, mut expected_kv) = (Vec::new(), Vec::new());
    for (token, &at) in INDEX.iter().enumerate() {
        let at = at as usize;
        for head in 0..queries + 2 * kv {
            let value = |row: usize| f64::from(product[token * width + row]) + f64::from(bias[row]);
            let mut own: Vec<f64> = (head * dim..(head + 1) * dim).map(value).collect();
            let is_value = head >= queries + kv;
            let norm = norms.filter(|_| !is_value).map(|norms| &norms[usize::from(head >= queries)][..]);
            let turns = if is_value { &[][..] } else { &table[at * dim..(at + 1) * dim] };
            expected_head(&mut own, norm, turns);
            if head < queries {
                expected.extend(own);
            } else if OWNERS[at] != u32::MAX {
                let row = OWNERS[at] as usize;
                let slot = ROWS[row].0 + WITHIN[at] as usize;
                for (channel, value) in own.into_iter().enumerate() {
                    let places = case.place(row, slot, ((head - queries) % kv, channel));
                    found_kv.push(pool[places[usize::from(is_value)]]);
                    expected_kv.push(value);
                }
            }
        }
    }
    let written = pool.iter().filter(|value| !value.is_nan()).count();
    assert_eq!(written, found_kv.len(), "nothing else of the pool is written");
    found.extend(found_kv);
    expected.extend(expected_kv);
    (found, expected)
}

#[test]
fn heads_are_normed_turned_and_placed() {
    let (cols, width) = (40, (HEADS.queries + 2 * HEADS.kv) * HEADS.dim);
    let case = Case::new(HEADS, &ROWS);
    let tokens = INDEX.len();
    let (w, bias) = (rounded(&noise(1, width * cols)), noise(2, width));
    let (x, weight) = (noise(3, tokens * cols), noise(4, cols));
    let head_norms = [noise(5, HEADS.dim), noise(6, HEADS.dim)];
    let table: Vec<f32> = noise(8, tokens * HEADS.dim / 2).iter().flat_map(|a| [a.cos(), a.sin()]).collect();
    let lens = ROWS.map(|(before, _)| before as u32);
    for device in devices() {
        let device = &*device;
        let (pool, q) = (case.pool(device, |_| 0), blank(device, 2 * tokens * HEADS.queries * HEADS.dim));
        let lists = [&OWNERS[..], &WITHIN[..], &lens[..], &case.starts[..], &case.tables[..], &INDEX[..]];
        let lists = lists.map(|list| words(device, list));
        let [owners, within, kv_len, starts, tables, index] = lists.each_ref().map(Part::all);
        let values = [&table, &weight, &bias, &head_norms[0], &head_norms[1], &x];
        let values = values.map(|list| floats(device, list));
        let [rotary, weight, bias_part, q_norm, k_norm, x] = values.each_ref().map(Part::all);
        let (q_part, pages) = (Part::all(&q), Part::all(&pool));
        let places =
            Places { q: q_part, pages, rotary, rows: owners, within, kv_len, starts, tables, heads: HEADS };
        let w_buffer = halves(device, &w);
        let matrix = Matrix { weight: Part::all(&w_buffer), bias: bias_part, rows: width, cols };
        let tokens_of = Tokens { count: tokens, index, skips: None };
        let norm = |weight| Norm { weight, eps: 1e-5 };
        let qkv = blank(device, 2 * tokens * width);
        let (plain, input) = (Matrix { bias: Part::NONE, ..matrix }, (x, tokens_of, Some(norm(weight))));
        skinny(device, &plain, input, After::Half(Part::all(&qkv))).unwrap();
        let product = read_halves(device, &qkv);
        for with_norms in [false, true] {
            device.fill(pages, 0xFF).unwrap();
            device.fill(q_part, 0xFF).unwrap();
            if with_norms {
                let norms = Some([norm(q_norm), norm(k_norm)]);
                place_rows(device, (Part::all(&qkv), bias_part, tokens_of), norms, &places).unwrap();
            } else {
                skinny(device, &matrix, input, After::Place(places)).unwrap();
            }
            let (q, pool) = (read_halves(device, &q), read_halves(device, &pool));
            let norms = with_norms.then_some(&head_norms);
            let (found, expected) = placed((&case, &q, &pool), (&product, &bias), (norms, &table));
            assert_close(&found, &expected, 6e-3, &format!("norms {with_norms} {device:?}"));
        }
    }
}
