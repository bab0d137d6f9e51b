//! Sealing: a sequence's prompt moves into packed pages before its first decode step.
//!
//! Pages are exchanged one block of tokens after the other, from the end, so that a sequence needs two
//! pages a layer more than its prompt holds, and not its prompt twice. What is packed is the sequence's own;
//! its references to cached blocks are given back, the last ones first.

use model_zoo::compression::think::SealMoves;
use model_zoo::kv_cache::{PageId, PageMove};

use super::kv_pages::KvPages;
use super::sequence::{Sequence, SharedPrefix};
use super::{Scheduler, SeqId};

/// A page of a packed prefix that is not there yet.
const NOT_YET: PageId = PageId::MAX;

impl Scheduler {
    /// The sequences sealed since the last call, in order, with what has to be moved before the next step
    /// runs. All of it has to be done, in this order, even for a sequence that was preempted since.
    pub fn drain_seals(&mut self) -> Vec<(SeqId, SealMoves)> {
        std::mem::take(&mut self.kv.seals)
    }
}

impl KvPages {
    /// Pages that have to be available so that `seq`, whose prompt is computed, can be sealed.
    pub(super) fn seal_cost(&self, seq: &Sequence) -> usize {
        let Some(seal) = seq.spec.demand.seal() else { return 0 };
        if seal.num_packed(self.block_size) == 0 {
            return 0;
        }
        if seq.shared.blocks.iter().all(|&block| self.cache.num_refs(block) == 1) {
            return 2 * seq.block_tables.len();
        }
        // Blocks that others hold do not become free.
        let tail = (seq.shared.num_tokens / self.block_size)
            .saturating_sub(seal.num_packed(self.block_size) / self.block_size);
        seq.block_tables.len() * (seal.packed_pages(self.block_size) + tail)
    }

    /// Packs the prompt of `seq`. The caller has seen that [`KvPages::seal_cost`] is available.
    pub(super) fn seal(&mut self, seq: &mut Sequence) {
        let Some(seal) = seq.spec.demand.seal().copied() else { return };
        let old_blocks = seal.num_packed(self.block_size) / self.block_size;
        seq.sealed = true;
        // All of a short prompt is recent.
        if old_blocks == 0 {
            return;
        }
        let mut moves = SealMoves { old: seq.block_tables.clone(), moves: Vec::new() };
        let mut packed = vec![Vec::new(); seq.block_tables.len()];
        for (packed, table) in packed.iter_mut().zip(&seq.block_tables).filter(|(_, t)| !t.is_empty()) {
            *packed = vec![NOT_YET; seal.packed_pages(self.block_size)];
            debug_assert!(table.len() >= old_blocks, "every layer that holds KV holds the prompt's");
        }
        for index in (0..old_blocks.max(seq.shared.blocks.len())).rev() {
            if index < old_blocks {
                self.pack_block(seq, index, (&mut packed, &mut moves.moves));
            } else {
                self.copy_block(seq, index, &mut moves.moves);
            }
            match seq.shared.blocks.len() {
                held if held == index + 1 => {
                    seq.shared.blocks.pop().into_iter().for_each(|b| self.cache.release(b))
                }
                _ => self.give_back_block(&moves.old, index),
            }
        }
        for (table, packed) in seq.block_tables.iter_mut().zip(&packed).filter(|(t, _)| !t.is_empty()) {
            table.splice(..old_blocks, packed.iter().copied());
        }
        seq.shared = SharedPrefix { blocks: Vec::new(), num_tokens: 0, num_scanned: seal.at() };
        self.seals.push((seq.spec.id, moves));
    }

    fn pack_block(
        &mut self,
        seq: &Sequence,
        index: usize,
        (packed, moves): (&mut [Vec<PageId>], &mut Vec<PageMove>),
    ) {
        let Some(seal) = seq.spec.demand.seal() else { return };
        let first = index * self.block_size;
        let touched = seal.pages_before(first, self.block_size).0
            ..seal.pages_before(first + self.block_size, self.block_size).1;
        for (layer, table) in seq.block_tables.iter().enumerate().filter(|(_, table)| !table.is_empty()) {
            for page in packed[layer][touched.clone()].iter_mut().filter(|page| **page == NOT_YET) {
                *page = self.take();
            }
            let packed = packed[layer][touched.clone()].to_vec();
            moves.push(PageMove::Pack { layer, page: table[index], first, packed });
        }
    }

    /// The dense pages of a block that is given back to the cache, for `seq` alone.
    fn copy_block(&mut self, seq: &mut Sequence, index: usize, moves: &mut Vec<PageMove>) {
        for table in seq.block_tables.iter_mut().filter(|table| !table.is_empty()) {
            let to = self.take();
            let from = std::mem::replace(&mut table[index], to);
            moves.push(PageMove::Copy { from, to });
        }
    }

    fn give_back_block(&mut self, tables: &[Vec<PageId>], index: usize) {
        for table in tables.iter().filter(|table| !table.is_empty()) {
            self.pool.give_back(table[index]);
        }
    }
}
