//! Closing the gaps that dropped tokens leave in a sequence's slots.

use super::{KvCache, KvLayout, PageId};

impl KvCache {
    /// Moves the slots `first + kept[i]` of `table`, of dense pages, to `first + i`; `kept` ascends. What was in the
    /// slots behind them means nothing then.
    pub fn compact(&mut self, table: &[PageId], first: usize, kept: &[usize]) {
        let KvLayout { num_kv_heads, head_dim, block_size } = self.layout;
        let channels = num_kv_heads * head_dim;
        for (to, &from) in kept.iter().enumerate().filter(|(to, from)| to < from) {
            let [(source, from), (target, to)] =
                [first + from, first + to].map(|slot| (table[slot / block_size], slot % block_size));
            for channel in 0..channels {
                let keys = channel * block_size;
                self.pages_mut().copy((source, keys + from), (target, keys + to), 1);
            }
            for head in 0..num_kv_heads {
                let values = channels * block_size + head * block_size * head_dim;
                let [from, to] = [from, to].map(|slot| values + slot * head_dim);
                self.pages_mut().copy((source, from), (target, to), head_dim);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::attention::write_kv;
    use crate::kernels::cpu::isa::Isa;

    #[test]
    fn compacted_slots_are_as_if_only_what_was_kept_had_been_written() {
        let layout = KvLayout { num_kv_heads: 2, head_dim: 5, block_size: 16 };
        let token = |n: usize| (0..10).map(|c| (n * 10 + c) as f32).collect::<Vec<_>>();
        let write = |kv: &mut KvCache, table: &[PageId], tokens: &[usize]| {
            for (slot, &n) in tokens.iter().enumerate() {
                let (k, v) = (token(n), token(100 + n));
                write_kv(Isa::Portable, (layout, kv.pages_mut()), (table, slot), (&k, &v));
            }
        };
        let kept = [0, 1, 4, 17, 18, 33];
        let mut kv = KvCache::new(layout, 9).expect("memory");
        let all: Vec<usize> = (0..40).collect();
        write(&mut kv, &[5, 2, 7], &all);
        kv.compact(&[5, 2, 7], 3, &kept);
        let expected: Vec<usize> = [0, 1, 2].into_iter().chain(kept.map(|slot| slot + 3)).collect();
        write(&mut kv, &[8], &expected);
        for slot in 0..expected.len() {
            for word in 0..10 {
                let key = word * 16 + slot;
                assert_eq!(kv.pages().page(5)[key], kv.pages().page(8)[key]);
                let value = 160 + (word / 5 * 16 + slot) * 5 + word % 5;
                assert_eq!(kv.pages().page(5)[value], kv.pages().page(8)[value]);
            }
        }
    }
}
