use super::attention::{Case, read_from};
use super::*;
use crate::kernels::cuda::attention::{Attention, Items, decode_scratch};
use crate::kernels::cuda::ops::Heads;
use crate::kernels::cuda::pruned::{Packing, key_squares, move_words, observe};
use crate::kv_cache::{KvLayout, PackedLayout};

/// A case whose rows have packed prefixes: the pool's first pages are the case's, then come the packed ones.
struct Pruned {
    case: Case,
    layout: PackedLayout,
    /// Slots of each row that are packed.
    slots: Vec<usize>,
    /// `[row][num_kv_heads, kept]`
    channels: Vec<Vec<u8>>,
    /// Packed pages of each row.
    packed: Vec<Vec<u32>>,
}

/// `kept` of `dim` channels of each head, another choice for every seed.
fn channels(seed: usize, (heads, dim): (usize, usize), kept: usize) -> Vec<u8> {
    let of_head = |head: usize| {
        let score = noise((seed * 31 + head) as u64, dim);
        let mut order: Vec<usize> = (0..dim).collect();
        order.sort_by(|&a, &b| score[a].total_cmp(&score[b]));
        order.truncate(kept);
        order.sort_unstable();
        order.into_iter().map(|channel| channel as u8)
    };
    (0..heads).flat_map(of_head).collect()
}

impl Pruned {
    fn new(heads: Heads, kept: usize, rows: &[(usize, usize)]) -> Self {
        let Heads { kv, dim, block_size, .. } = heads;
        let case = Case::new(heads, rows);
        let layout = KvLayout { num_kv_heads: kv, head_dim: dim, block_size };
        let layout = PackedLayout { layout, kept };
        // All whole blocks but one; a row without any has none.
        let slots: Vec<usize> =
            rows.iter().map(|row| (row.0 / block_size).saturating_sub(1) * block_size).collect();
        let mut next = case.num_pages as u32;
        let packed = slots.iter().map(|&slots| {
            let first = next;
            next += layout.num_pages(slots) as u32;
            (first..next).rev().collect()
        });
        let packed = packed.collect();
        let channels = (0..rows.len()).map(|row| channels(row, (kv, dim), kept)).collect();
        Self { case, layout, slots, channels, packed }
    }

    fn num_pages(&self) -> usize {
        self.case.num_pages + self.packed.iter().map(Vec::len).sum::<usize>()
    }

    /// The pool, in which the prefixes were packed and what they were packed from is poisoned.
    fn pool(&self, device: &dyn Device) -> Buffer {
        let page = self.layout.layout.page_bytes();
        let dense = self.case.pool(device, |row| self.case.rows[row].0 + self.case.rows[row].1);
        let pool = blank(device, page * self.num_pages());
        device.copy(Part::all(&dense), Part::of(&pool, 0, dense.len()).unwrap()).unwrap();
        let heads = self.case.heads;
        for (row, &slots) in self.slots.iter().enumerate() {
            let sources = &self.case.tables[self.case.starts[row] as usize..][..slots / heads.block_size];
            let words: Vec<u32> = (0..)
                .step_by(heads.block_size)
                .zip(sources)
                .flat_map(|(first, &source)| {
                    let touched = self.layout.pages_of(first, heads.block_size);
                    move_words((source, first, 0), &self.packed[row][touched]).unwrap()
                })
                .collect();
            let lines = blank(device, Packing::line_bytes(heads, self.layout.kept) * sources.len());
            let (words, channels) =
                (upload(device, bytemuck::cast_slice(&words)), upload(device, &self.channels[row]));
            let packing = Packing {
                pages: Part::all(&pool),
                heads,
                kept: self.layout.kept,
                channels: Part::all(&channels),
                moves: Part::all(&words),
                count: sources.len(),
                lines: Part::all(&lines),
            };
            packing.run(device).unwrap();
            device.synchronize().unwrap();
            for &source in sources {
                device.fill(Part::of(&pool, source as usize * page, page).unwrap(), 0xFF).unwrap();
            }
        }
        pool
    }

    /// The same case with zeros in the channels that packed keys have not: what attention finds.
    fn zeroed(&self) -> Case {
        let Heads { kv, dim, .. } = self.case.heads;
        let mut twin = Case::new(self.case.heads, &self.case.rows);
        for (row, &slots) in self.slots.iter().enumerate() {
            for (i, key) in twin.keys[row].iter_mut().enumerate().take(slots * kv * dim) {
                let own = &self.channels[row][i / dim % kv * self.layout.kept..][..self.layout.kept];
                if !own.contains(&((i % dim) as u8)) {
                    *key = 0.0;
                }
            }
        }
        twin
    }

    fn check(&self, device: &dyn Device, (window, splits): (Option<usize>, usize)) {
        let heads = self.case.heads;
        let (pool, twin) = (self.pool(device), self.zeroed());
        let (mut tables, mut starts, mut prefixes) = (Vec::new(), Vec::new(), Vec::new());
        let mut items = Vec::new();
        let lists: Vec<Buffer> = self.channels.iter().map(|own| upload(device, own)).collect();
        for (row, &slots) in self.slots.iter().enumerate() {
            let (before, count) = self.case.rows[row];
            let saved = (slots / heads.block_size - self.packed[row].len()) as u32;
            starts.push((tables.len() as u32).wrapping_sub(saved));
            let own = self.case.starts[row] as usize..;
            let dense = &self.case.tables[own][..(before + count).div_ceil(heads.block_size)];
            tables.extend(self.packed[row].iter().chain(&dense[slots / heads.block_size..]));
            let address = Part::all(&lists[row]).address();
            let words =
                [address as u32, (address >> 32) as u32, slots as u32, self.layout.kept as u32, saved];
            prefixes.extend(if slots == 0 { [0; 5] } else { words });
            let first = items.len() / 4;
            (0..count).for_each(|i| items.extend([(first + i) as u32, row as u32, i as u32, 1]));
        }
        let (tokens, width) = (items.len() / 4, heads.queries * heads.dim);
        let q = rounded(&noise(7, tokens * width));
        let (q_buffer, out) = (halves(device, &q), blank(device, 2 * q.len()));
        let kv_len: Vec<u32> = self.case.rows.iter().map(|row| row.0 as u32).collect();
        let buffers = [&kv_len, &starts, &tables, &prefixes, &items].map(|list| words(device, list));
        let [kv_len, starts, tables, packed, list] = buffers.each_ref().map(Part::all);
        let bytes = decode_scratch(heads, tokens, splits);
        let scratch = [blank(device, bytes[0]), upload(device, &vec![0; bytes[1]])];
        let places = read_from((&q_buffer, &pool), [kv_len, starts, tables], heads);
        let scale = 1.3 / (heads.dim as f32).sqrt();
        let scratch = scratch.each_ref().map(Part::all);
        let out_part = Part::all(&out);
        let attention = Attention { places, out: out_part, scale, window, packed, layer: 0, scratch };
        attention.decode(device, Items { items: list, count: tokens, longest: 1 }, splits).unwrap();
        let of_token = |item: &[u32]| {
            let (row, slot) = (item[1] as usize, self.case.rows[item[1] as usize].0 + item[2] as usize);
            let at = item[0] as usize * width;
            (0..heads.queries)
                .flat_map(|head| {
                    let query = &q[at + head * heads.dim..][..heads.dim];
                    twin.expected((row, slot), head, query, (scale, window))
                })
                .collect::<Vec<f64>>()
        };
        let expected: Vec<f64> = items.chunks_exact(4).flat_map(of_token).collect();
        let what = format!("{heads:?} {} {window:?} {splits} {device:?}", self.layout.kept);
        assert_close(&read_halves(device, &out), &expected, 1e-2, &what);
    }
}

#[test]
fn attention_over_packed_keys_equals_zeroed_channels_in_f64() {
    for device in devices() {
        let device = &*device;
        // Lines that lie across pages and not; pages of several units; kept channels of all remainders.
        let shapes = [
            ((6, 2, 16, 16), 8),
            ((3, 3, 32, 16), 24),
            ((9, 3, 64, 32), 40),
            ((9, 3, 64, 16), 56),
            ((5, 1, 96, 16), 64),
            ((8, 2, 128, 48), 80),
            ((2, 1, 256, 16), 160),
        ];
        for (i, ((queries, kv, dim, block_size), kept)) in shapes.into_iter().enumerate() {
            let heads = Heads { queries, kv, dim, block_size };
            let case = Pruned::new(heads, kept, &[(150, 1), (7, 1), (97, 3), (2 * block_size, 1)]);
            case.check(device, (None, 1 + i % 3));
            case.check(device, (Some(60), 2));
        }
    }
}

#[test]
fn sums_that_choose_channels_equal_f64() {
    for device in devices() {
        let device = &*device;
        for dim in [16, 96, 256] {
            let heads = Heads { queries: 6, kv: 2, dim, block_size: 16 };
            let case = Case::new(heads, &[(45, 0), (45, 0)]);
            let pool = case.pool(device, |_| 45);
            let (tables, out) = (words(device, &case.tables), blank(device, 4 * 2 * 2 * dim));
            let lists = (Part::all(&tables), 3, 41);
            key_squares(device, (Part::all(&pool), heads), lists, Part::all(&out)).unwrap();
            let mut expected = vec![0f64; 2 * 2 * dim];
            for (row, keys) in case.keys.iter().enumerate() {
                for (i, &key) in keys.iter().enumerate().take(41 * 2 * dim) {
                    expected[row * 2 * dim + i % (2 * dim)] += f64::from(key).powi(2);
                }
            }
            assert_close(&read_floats(device, &out), &expected, 1e-5, "keys");

            let q = rounded(&noise(3, 9 * 6 * dim));
            let (q_buffer, sums) = (halves(device, &q), blank(device, 4 * 2 * 3 * 2 * dim));
            device.fill(Part::all(&sums), 0).unwrap();
            let items = words(device, &[1, 5, 0, 0, 6, 2, 1, 0]);
            observe(device, (Part::all(&q_buffer), heads), (Part::all(&items), 2), (Part::all(&sums), 1, 3))
                .unwrap();
            let mut expected = vec![0f64; 2 * 3 * 2 * dim];
            for (place, tokens) in [(0, 1..6), (1, 6..8)] {
                for (i, &q) in q.iter().enumerate().filter(|(i, _)| tokens.contains(&(i / (6 * dim)))) {
                    let (head, channel) = (i / dim % 6, i % dim);
                    expected[((place * 3 + 1) * 2 + head / 3) * dim + channel] += f64::from(q).powi(2) / 3.0;
                }
            }
            assert_close(&read_floats(device, &sums), &expected, 1e-5, "queries");
        }
    }
}
