use super::attention::Case;
use super::*;
use crate::kernels::cuda::compact::{compact, list_words};
use crate::kernels::cuda::ops::Heads;
use crate::kv_cache::KeptSlots;

/// What is kept of a row of so many slots, `first` excluded: all up to the seventh, then now and then one.
fn kept(seed: u64, len: usize) -> Vec<usize> {
    let noise = noise(seed, len);
    (0..len).filter(|&slot| slot < 7 || noise[slot] > 0.2).collect()
}

#[test]
fn compacted_slots_are_as_if_only_what_was_kept_had_been_written() {
    for device in devices() {
        let device = &*device;
        for (kv, dim, block_size) in [(1, 16, 16), (3, 64, 32), (2, 96, 48)] {
            let heads = Heads { queries: kv, kv, dim, block_size };
            // Rows within a round of the kernel and beyond it; one that keeps all, one that keeps nothing.
            let rows = [(3, 20), (0, 300), (17, 141), (5, 30), (2, 40)];
            let case = Case::new(heads, &rows);
            let lists: Vec<KeptSlots<'_>> = rows
                .iter()
                .enumerate()
                .map(|(row, &(first, len))| {
                    let pages = (first + len).div_ceil(block_size);
                    let kept = [kept(row as u64, len), (0..len).collect(), Vec::new()];
                    let [some, all, none] = kept;
                    let table = &case.tables[case.starts[row] as usize..][..pages];
                    KeptSlots { table, first, kept: [some, all, none][row.saturating_sub(2)].clone() }
                })
                .collect();
            let pool = case.pool(device, |row| rows[row].0 + rows[row].1);
            let before = read_halves(device, &pool);
            let list = words(device, &list_words(&lists, block_size).unwrap());
            compact(device, (Part::all(&pool), heads), (Part::all(&list), lists.len())).unwrap();
            let after = read_halves(device, &pool);
            for (row, list) in lists.iter().enumerate() {
                let slots = (0..list.first).map(|slot| (slot, slot));
                let moved = list.kept.iter().enumerate();
                let moved = moved.map(|(to, from)| (list.first + to, list.first + from));
                for (to, from) in slots.chain(moved) {
                    for channel in (0..kv * dim).map(|i| (i / dim, i % dim)) {
                        let [to, from] = [to, from].map(|slot| case.place(row, slot, channel));
                        assert_eq!(to.map(|at| after[at]), from.map(|at| before[at]), "row {row} {device:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn slots_that_do_not_ascend_or_have_no_page_are_refused() {
    let of = |kept: &[usize]| list_words(&[KeptSlots { table: &[4, 2], first: 3, kept: kept.to_vec() }], 16);
    assert!(of(&[0, 28]).is_ok() && of(&[]).is_ok());
    assert!(of(&[0, 29]).is_err() && of(&[1, 0]).is_err() && of(&[4, 4]).is_err());
}
