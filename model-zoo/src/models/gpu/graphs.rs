//! Captured steps, by class.

use std::collections::HashMap;

use crate::kernels::cuda::device::{Graph, Part};

/// Captured steps that are kept.
const MOST: usize = 128;

/// Captured steps, and the classes that were seen once.
#[derive(Debug, Default)]
pub(super) struct Graphs {
    captured: HashMap<Vec<u64>, Box<dyn Graph>>,
    seen: HashMap<Vec<u64>, ()>,
}

impl Graphs {
    /// The step of this class.
    pub(super) fn get(&self, key: &[u64]) -> Option<&dyn Graph> {
        self.captured.get(key).map(|graph| &**graph)
    }

    /// Whether the class was asked for before: the first time everything that it needs is prepared.
    pub(super) fn is_due(&mut self, key: &[u64]) -> bool {
        if self.seen.len() > 8 * MOST {
            self.seen.clear();
        }
        self.seen.insert(key.to_vec(), ()).is_some()
    }

    /// Keeps a step. When there are too many, all others go: which are needed shows soon.
    pub(super) fn insert(&mut self, key: Vec<u64>, graph: Box<dyn Graph>) {
        if self.captured.len() >= MOST {
            self.captured.clear();
        }
        self.captured.insert(key, graph);
    }

    /// Forgets all of them: memory that they use has moved.
    pub(super) fn clear(&mut self) {
        self.captured.clear();
    }
}

/// Tokens that a step of `rows` rows of one token is padded to.
pub(super) fn bucket(rows: usize) -> usize {
    match rows {
        0..=8 => rows.next_power_of_two(),
        9..=32 => rows.next_multiple_of(8),
        _ => rows.next_multiple_of(32),
    }
}

/// What a captured step depends on beside the words of its tables.
pub(super) fn key(class: Vec<u32>, (pool, whole): (Part, bool)) -> Vec<u64> {
    let place = [pool.address(), u64::from(whole)];
    place.into_iter().chain(class.into_iter().map(u64::from)).collect()
}
