//! Closing the gaps that dropped tokens leave in a sequence's slots (see `compact.cuh`).

use super::device::{Device, Part};
use super::ops::{Heads, need, run};
use super::params::CompactParams;
use crate::kv_cache::KeptSlots;
use crate::{Result, ZooError};

/// Words of a list before what it tells the places of.
const LIST_WORDS: usize = 4;

/// `lists` as [`compact`] reads them, of pages of `block_size` slots: the lists, then their pages and slots.
///
/// # Errors
/// [`ZooError::Step`] where slots do not ascend, or lie behind the list's pages.
pub fn list_words(lists: &[KeptSlots<'_>], block_size: usize) -> Result<Vec<u32>> {
    let mut words = vec![0; LIST_WORDS * lists.len()];
    for (index, KeptSlots { table, first, kept }) in lists.iter().enumerate() {
        let end = kept.last().map_or(0, |last| first + last + 1);
        if !kept.is_sorted_by(|a, b| a < b) || end > table.len() * block_size {
            return Err(ZooError::Step(format!("{} slots up to {end} of {} pages", kept.len(), table.len())));
        }
        // Those before the first gap stay.
        let skipped = kept.iter().enumerate().take_while(|(to, from)| to == *from).count();
        let at = words.len();
        words.extend_from_slice(table);
        words.extend(kept[skipped..].iter().map(|slot| (slot - skipped) as u32));
        let list = [at, at + table.len(), kept.len() - skipped, first + skipped];
        words[LIST_WORDS * index..][..LIST_WORDS].copy_from_slice(&list.map(|word| word as u32));
    }
    Ok(words)
}

/// Moves the slots of the first `count` lists of `words`, whose pages are of the pool `pages`.
///
/// # Errors
/// [`ZooError::Device`].
pub fn compact(
    device: &dyn Device,
    (pages, heads): (Part, Heads),
    (words, count): (Part, usize),
) -> Result<()> {
    let Heads { kv, dim, block_size, .. } = heads;
    need("lists of slots", words, 4 * LIST_WORDS * count)?;
    if !dim.is_multiple_of(16) {
        return Err(ZooError::Device(format!("heads of {dim} channels, which are no sixteens")));
    }
    let params = CompactParams {
        pages: pages.pointer(),
        words: words.pointer(),
        kv_heads: kv as u32,
        head_dim: dim as u32,
        block_size: block_size as u32,
        pad: 0,
    };
    run(device, ("compact", 256, 0), [(dim / 16) as u32, 2 * kv as u32, count as u32], &params)
}
