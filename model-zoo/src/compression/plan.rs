//! The compiled plan of a request, and the two plain values that the scheduler derives from it.

use super::Sublayer;

/// What of the model a request runs. Immutable after admission; [`Plan::dense`] is the whole model.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Plan {
    num_layers: usize,
}

/// Identifies everything in a plan that changes K or V: part of the prefix-cache key, and the class by
/// which rows of a step are grouped. Equal keys mean interchangeable KV.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PlanKey(pub u64);

/// How many KV slots a sequence needs, layer by layer: what the page accounting knows of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvDemand {
    num_layers: usize,
}

impl Plan {
    /// The plan that runs every layer for every token.
    pub fn dense(num_layers: usize) -> Self {
        Self { num_layers }
    }

    /// Whether this plan runs `sublayer` of `layer`.
    pub fn runs(&self, layer: usize, _sublayer: Sublayer) -> bool {
        layer < self.num_layers
    }

    /// The KV slots that this plan fills.
    pub fn kv_demand(&self) -> KvDemand {
        KvDemand { num_layers: self.num_layers }
    }

    /// The class of plans whose K and V are interchangeable with this one's.
    pub fn key(&self) -> PlanKey {
        PlanKey(0)
    }
}

impl KvDemand {
    /// Demand of a plan that fills every layer for every token.
    pub fn dense(num_layers: usize) -> Self {
        Self { num_layers }
    }

    /// Number of decoder layers that have a block table.
    pub fn num_layers(&self) -> usize {
        self.num_layers
    }

    /// KV slots filled in `layer` once the first `num_tokens` tokens of the sequence are computed.
    /// Never decreases with `num_tokens`.
    pub fn kv_len(&self, _layer: usize, num_tokens: usize) -> usize {
        num_tokens
    }
}
