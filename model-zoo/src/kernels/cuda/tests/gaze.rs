use super::attention::{Case, read_from};
use super::*;
use crate::kernels::cuda::attention::{Attention, HEAD_DIMS};
use crate::kernels::cuda::gaze::{Gazes, Onlookers};
use crate::kernels::cuda::ops::Heads;

impl Case {
    /// Attention weights of the query of `row` at `slot`, over the slots that it sees, in f64.
    fn weights(
        &self,
        (row, slot): (usize, usize),
        (head, query): (usize, &[f32]),
        (scale, window): (f32, Option<usize>),
    ) -> Vec<f64> {
        let Heads { queries, kv, dim, .. } = self.heads;
        let first = window.map_or(0, |window| (slot + 1).saturating_sub(window));
        let key = |slot: usize| &self.keys[row][(slot * kv + head / (queries / kv)) * dim..][..dim];
        let score = |slot| {
            let products = query.iter().zip(key(slot)).map(|(&q, &k)| f64::from(q) * f64::from(k));
            products.sum::<f64>() * f64::from(scale)
        };
        let exps: Vec<f64> = (first..=slot).map(|slot| score(slot).exp()).collect();
        let total: f64 = exps.iter().sum();
        std::iter::repeat_n(0.0, first).chain(exps.into_iter().map(|exp| exp / total)).collect()
    }
}

/// Sums and maxima of what the tokens of `rows` look at, in f64.
fn expected(
    (case, rows): (&Case, &[Onlookers]),
    q: &[f32],
    (scale, window): (f32, Option<usize>),
) -> Vec<[Vec<f64>; 2]> {
    let Heads { queries, dim, .. } = case.heads;
    let of_image = |own: &Onlookers, [text, seen]: &[std::ops::Range<usize>; 2]| {
        let held = case.rows[own.row].0;
        let mut found = [vec![0f64; seen.len()], vec![0f64; seen.len()]];
        for &place in &own.text[text.clone()] {
            let query = |head| &q[((own.first + place) * queries + head) * dim..][..dim];
            let at = (own.row, held + place);
            let all: Vec<_> =
                (0..queries).map(|head| case.weights(at, (head, query(head)), (scale, window))).collect();
            for (i, seen) in seen.clone().enumerate() {
                let mean = all.iter().map(|weights| weights[held + seen]).sum::<f64>() / queries as f64;
                found[0][i] += mean;
                found[1][i] = found[1][i].max(mean);
            }
        }
        found
    };
    rows.iter().flat_map(|own| own.sights.iter().map(move |sight| of_image(own, sight))).collect()
}

fn check(device: &dyn Device, (case, rows): (&Case, &[Onlookers]), window: Option<usize>) {
    let Heads { queries, dim, .. } = case.heads;
    let tokens: usize = case.rows.iter().map(|row| row.1).sum();
    let q = rounded(&noise(7, tokens * queries * dim));
    let pool = case.pool(device, |row| case.rows[row].0 + case.rows[row].1);
    let kv_len: Vec<u32> = case.rows.iter().map(|row| row.0 as u32).collect();
    let lists = [&kv_len, &case.starts, &case.tables].map(|list| words(device, list));
    let q_buffer = halves(device, &q);
    let places = read_from((&q_buffer, &pool), lists.each_ref().map(Part::all), case.heads);
    let scale = 1.3 / (dim as f32).sqrt();
    let [out, packed] = [Part::NONE; 2];
    let attention = Attention { places, out, scale, window, packed, layer: 0, scratch: [Part::NONE; 2] };
    let gazes = Gazes::of(rows);
    let scratch = blank(device, gazes.bytes(queries));
    let found = gazes.run(device, &attention, Part::all(&scratch)).unwrap();
    let expected = expected((case, rows), &q, (scale, window));
    assert_eq!(found.len(), expected.len());
    for (image, (found, expected)) in found.iter().zip(&expected).enumerate() {
        for (found, expected) in found.iter().zip(expected) {
            if expected.iter().all(|&value| value == 0.0) {
                assert!(found.iter().all(|&value| value == 0.0), "image {image}: nobody looks");
                continue;
            }
            let what = format!("{:?} {window:?} image {image} {device:?}", case.heads);
            assert_close(found, expected, 1e-4, &what);
        }
    }
}

#[test]
fn what_text_looks_at_equals_softmax_in_f64() {
    for device in devices() {
        let device = &*device;
        for (i, dim) in HEAD_DIMS.into_iter().enumerate() {
            let (queries, kv) = [(6, 2), (3, 3), (9, 3), (5, 1), (8, 2), (2, 1)][i];
            let heads = Heads { queries, kv, dim, block_size: [16, 32][i % 2] };
            // Two images with text between and after them; a row that nobody looks in; one with text before it.
            let case = Case::new(heads, &[(5, 60), (0, 9), (21, 150)]);
            let text: Vec<usize> = (24..27).chain(40..60).collect();
            let first = Onlookers { row: 0, first: 0, text, sights: vec![[0..23, 3..24], [3..23, 27..40]] };
            let late: Vec<usize> = (70..150).collect();
            let second = Onlookers { row: 2, first: 69, text: late, sights: vec![[0..80, 6..70]] };
            check(device, (&case, &[first.clone(), second]), None);
            check(device, (&case, &[first]), Some(25));
        }
        let heads = Heads { queries: 4, kv: 2, dim: 32, block_size: 16 };
        // More slots of an image than threads of a block.
        let case = Case::new(heads, &[(7, 330)]);
        let text: Vec<usize> = (301..330).collect();
        let wide = Onlookers { row: 0, first: 0, text, sights: vec![[0..29, 9..300]] };
        check(device, (&case, &[wide]), Some(200));
        let case = Case::new(heads, &[(0, 40)]);
        let alone = Onlookers { row: 0, first: 0, text: Vec::new(), sights: vec![[0..0, 4..40]] };
        check(device, (&case, &[alone]), None);
    }
}
