//! Metrics of memory budgets and of reloads: what is allowed, what is held, what moved.

use metrics::{Counter, Gauge, Label};

use super::instruments::{Definition, Instruments, Paired};
use super::samples::MemoryGauges;
use super::{Metrics, bytes, label, plain};

const BUDGET: Definition =
    bytes("rheostat_memory_budget_bytes", "Bytes that the operator allows, by kind: weights, kv");
const HELD: Definition = bytes("rheostat_memory_held_bytes", "Bytes held, by kind: weights, kv");
const KV_POOL_BYTES: Definition = bytes("rheostat_kv_pool_bytes", "Size of the KV pool");
const WEIGHT_BYTES: Definition = bytes("rheostat_weight_bytes", "Model weights held in memory");
const BLOCKS: Definition = plain(
    "rheostat_weight_blocks",
    "",
    "Blocks of weights that can be held in part: held, and absent; they add up to the whole model",
);
const BLOCKS_MOVED: Definition = plain(
    "rheostat_weight_blocks_moved_total",
    "",
    "Blocks of weights read or freed since the start, by direction: up, down",
);
const MOVED_DOWN: Definition = plain(
    "rheostat_sequences_moved_down_total",
    "",
    "Sequences that lost blocks of weights which they were served with, and were computed again with fewer",
);

const RELOADS: Definition =
    plain("rheostat_reloads_total", "", "Configuration reloads, by outcome: applied, refused");

pub(super) const DEFINITIONS: [Definition; 8] =
    [BUDGET, HELD, KV_POOL_BYTES, WEIGHT_BYTES, BLOCKS, BLOCKS_MOVED, MOVED_DOWN, RELOADS];

const KINDS: [&str; 2] = ["weights", "kv"];

/// Handles of these metrics.
#[derive(Debug)]
pub(super) struct MemoryInstruments {
    budget: [Paired<Gauge>; 2],
    held: [Paired<Gauge>; 2],
    /// The two kinds under names of their own, weights then KV.
    alone: [Paired<Gauge>; 2],
    blocks: [Paired<Gauge>; 2],
    moved: [Paired<Counter>; 2],
    moved_down: Paired<Counter>,
    reloads: [Paired<Counter>; 2],
}

impl MemoryInstruments {
    pub(super) fn new(instruments: &Instruments) -> Self {
        let gauge = |def, labels: Vec<Label>| instruments.gauge(def, labels, Vec::new());
        let counter = |def, labels: Vec<Label>| instruments.counter(def, labels, Vec::new());
        Self {
            budget: KINDS.map(|kind| gauge(&BUDGET, label("kind", kind))),
            held: KINDS.map(|kind| gauge(&HELD, label("kind", kind))),
            alone: [gauge(&WEIGHT_BYTES, Vec::new()), gauge(&KV_POOL_BYTES, Vec::new())],
            blocks: ["held", "absent"].map(|state| gauge(&BLOCKS, label("state", state))),
            moved: ["up", "down"].map(|to| counter(&BLOCKS_MOVED, label("direction", to))),
            moved_down: counter(&MOVED_DOWN, Vec::new()),
            reloads: ["applied", "refused"].map(|outcome| counter(&RELOADS, label("outcome", outcome))),
        }
    }
}

impl Metrics {
    /// Sets what of memory is allowed and held.
    pub fn memory(&self, now: &MemoryGauges) {
        let own = &self.memory;
        let [held, all] = now.blocks;
        for (gauge, blocks) in own.blocks.iter().zip([held, all.saturating_sub(held)]) {
            gauge.set(blocks as f64);
        }
        for kind in 0..KINDS.len() {
            own.budget[kind].set(now.budget[kind] as f64);
            own.held[kind].set(now.held[kind] as f64);
            own.alone[kind].set(now.held[kind] as f64);
        }
    }

    /// Of elastic weights, `after` blocks are held and `before` were.
    pub fn weights_moved(&self, before: usize, after: usize) {
        self.memory.moved[0].add(after.saturating_sub(before) as u64);
        self.memory.moved[1].add(before.saturating_sub(after) as u64);
    }

    /// A configuration was read again, and applied or refused.
    pub fn reloaded(&self, applied: bool) {
        self.memory.reloads[usize::from(!applied)].add(1);
    }

    /// `count` sequences lost blocks of weights that they were served with.
    pub fn moved_down(&self, count: usize) {
        self.memory.moved_down.add(count as u64);
    }
}
