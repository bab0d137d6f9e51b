//! The compiled plan of a request, and the plain values that the scheduler derives from it.

use std::sync::Arc;

use super::Sublayer;
use super::ffn_skip::FfnPolicy;
use super::must_drop::filter::{FilterDemand, VisualFilter};
use super::options::CompressionOptions;
use super::think::{OBSERVED, Pruning};

/// What of the model a request runs. Immutable after admission; [`Plan::dense`] is the whole model.
///
/// Dropped sublayers run for no token, and the layer sets of later tokens nest in those of earlier ones
/// (methods.md §5b). So every sublayer has one **limit**: it runs the tokens of positions below it. From
/// this follow the KV slots of a layer, and that a replay after preemption repeats the original work.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// `[layer][attention, ffn]`
    limits: Vec<[usize; 2]>,
    key: PlanKey,
    /// Tokens from the start whose K and V depend on `key` alone.
    shareable_len: usize,
    ffn: Option<FfnPolicy>,
    pruning: Option<Pruning>,
    /// Channels of a head, where keys are pruned.
    head_dim: usize,
    /// Tokens of the prompt that never run, ascending: those of images that have no row.
    absent: Arc<[usize]>,
    filter: Option<Arc<VisualFilter>>,
    /// Image tokens in the prompt, absent ones included.
    num_visual: usize,
    options: CompressionOptions,
}

/// Image tokens of a prompt.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct VisualUse {
    /// Tokens of the prompt that stand for images.
    pub shown: usize,
    /// Of those, tokens that went through to the last layer.
    pub kept: usize,
    /// Tokens that ran a layer, mean of the layers.
    pub mean: f32,
}

/// Identifies what of a plan changes K and V of its shareable tokens: part of the prefix-cache key.
/// Equal keys mean interchangeable KV there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PlanKey(pub u64);

impl PlanKey {
    /// The class of requests of this plan that are served with the first `blocks` blocks of elastic weights,
    /// which K and V depend on; this class itself where the weights are not elastic.
    #[must_use]
    pub fn served_with(self, blocks: Option<usize>) -> Self {
        let Some(blocks) = blocks else { return self };
        // The finaliser of `SplitMix64`, a bijection, so that plans of one count never meet.
        let mut z = self.0 ^ (blocks as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        Self(z ^ z >> 31)
    }
}

/// How many KV slots a sequence needs, layer by layer: what the page accounting knows of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvDemand {
    /// `[layer]`: slots at most.
    limits: Arc<[usize]>,
    absent: Arc<[usize]>,
    filter: Option<FilterDemand>,
    shareable_len: usize,
    seal: Option<Seal>,
}

/// How a sequence's prefix shrinks once its prompt is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seal {
    pruning: Pruning,
    head_dim: usize,
}

impl Seal {
    /// Computed tokens at which the sequence is sealed, before it goes on.
    pub fn at(&self) -> usize {
        self.pruning.prompt_len
    }

    /// Tokens from the start that the prefix cache may answer for: the last ones' queries are needed.
    pub fn reusable_len(&self) -> usize {
        self.pruning.prompt_len.saturating_sub(OBSERVED)
    }

    /// Slots that are packed.
    pub fn num_packed(&self, block_size: usize) -> usize {
        self.pruning.num_packed(block_size)
    }

    /// Pages of `block_size` slots that the packed slots of a layer take.
    pub fn packed_pages(&self, block_size: usize) -> usize {
        self.pages_before(self.num_packed(block_size), block_size).1
    }

    /// Of the packed pages of a layer: how many end within its first `slots` slots, whole blocks, and how
    /// many they touch.
    pub fn pages_before(&self, slots: usize, block_size: usize) -> (usize, usize) {
        // K and V of a slot take kept + head_dim values a head, of the 2 · head_dim of other pages.
        let (packed, whole) = (slots * (self.pruning.kept + self.head_dim), block_size * 2 * self.head_dim);
        (packed / whole, packed.div_ceil(whole))
    }
}

impl Plan {
    /// The plan that runs every layer for every token.
    pub fn dense(num_layers: usize) -> Self {
        Self {
            limits: vec![[usize::MAX; 2]; num_layers],
            key: PlanKey(0),
            shareable_len: usize::MAX,
            ffn: None,
            pruning: None,
            head_dim: 0,
            absent: Arc::default(),
            filter: None,
            num_visual: 0,
            options: CompressionOptions::default(),
        }
    }

    /// Number of decoder layers of the model.
    pub fn num_layers(&self) -> usize {
        self.limits.len()
    }

    /// Whether every sublayer runs for every token: the path without gathers and decisions.
    pub fn runs_all(&self) -> bool {
        let is_plain = self.ffn.is_none() && self.absent.is_empty() && self.filter.is_none();
        is_plain && self.limits.iter().flatten().all(|&limit| limit == usize::MAX)
    }

    /// What was asked for, with every default filled in: the plan as people read it.
    pub fn options(&self) -> &CompressionOptions {
        &self.options
    }

    /// Levels of weights that come in levels, at most; `None` for all that are held.
    pub fn levels(&self) -> Option<usize> {
        self.options.bitstack.and_then(|bitstack| bitstack.levels)
    }

    /// Sublayers that run for no token.
    pub fn num_dropped(&self) -> usize {
        self.limits.iter().flatten().filter(|&&limit| limit == 0).count()
    }

    /// How many of the `num_tokens` tokens from position `first` may run `sublayer` of `layer`, the first
    /// ones, absent ones included. Of FFN skipping and of filters nothing is counted here.
    pub fn active_len(&self, layer: usize, sublayer: Sublayer, (first, num_tokens): (usize, usize)) -> usize {
        self.limits[layer][sublayer as usize].saturating_sub(first).min(num_tokens)
    }

    /// Tokens `range` of the sequence that are absent, ascending.
    pub fn absent(&self, range: std::ops::Range<usize>) -> &[usize] {
        let border = |position| self.absent.partition_point(|&absent| absent < position);
        &self.absent[border(range.start)..border(range.end).max(border(range.start))]
    }

    /// What a row of this plan, whose prompt is computed, has run of its images; `None` where it shows none.
    pub fn visual_use(&self, state: &super::RowState) -> Option<VisualUse> {
        let (shown, present) = (self.num_visual, self.num_visual - self.absent.len());
        if shown == 0 {
            return None;
        }
        let whole = VisualUse { shown, kept: present, mean: present as f32 };
        let Some(outcome) = &state.visual else { return Some(whole) };
        let mean = outcome.ran.iter().sum::<usize>() as f32 / self.num_layers() as f32;
        Some(VisualUse { kept: outcome.survivors.len(), mean, ..whole })
    }

    /// Whether a token at `position` may run `sublayer` of `layer`.
    pub fn runs(&self, layer: usize, sublayer: Sublayer, position: usize) -> bool {
        position < self.limits[layer][sublayer as usize]
    }

    /// Sublayers that tokens `0..num_tokens` run, attention then FFN, before FFN skipping: the closed
    /// form that a row's counters meet, but for what filters leave out.
    pub fn work(&self, num_tokens: usize) -> [u64; 2] {
        let run = |limit: usize| limit.min(num_tokens) - self.absent(0..limit.min(num_tokens)).len();
        let of = |half: usize| self.limits.iter().map(|limits| run(limits[half]) as u64).sum();
        [of(0), of(1)]
    }

    /// The policy of FFN skipping, if it is on.
    pub fn ffn(&self) -> Option<&FfnPolicy> {
        self.ffn.as_ref()
    }

    /// The pruning of keys, if it is on.
    pub fn pruning(&self) -> Option<&Pruning> {
        self.pruning.as_ref()
    }

    /// The KV slots that this plan fills.
    pub fn kv_demand(&self) -> KvDemand {
        let limits = self.limits.iter().map(|limits| limits[Sublayer::Attention as usize]).collect();
        let seal = self.pruning.map(|pruning| Seal { pruning, head_dim: self.head_dim });
        let filter = self.filter.as_ref().map(|filter| filter.demand(self.num_layers()));
        KvDemand { limits, absent: Arc::clone(&self.absent), filter, shareable_len: self.shareable_len, seal }
    }

    /// The filters of image tokens, if there are any.
    pub fn filter(&self) -> Option<&VisualFilter> {
        self.filter.as_deref()
    }

    /// KV slots that the first `num_tokens` tokens of a row of this plan fill in `layer`, given what `state` says was
    /// decided of its prompt.
    pub fn kv_len(&self, layer: usize, num_tokens: usize, state: &super::RowState) -> usize {
        let limit = self.limits[layer][Sublayer::Attention as usize].min(num_tokens);
        let present = limit - self.absent(0..limit).len();
        let prompt_len = self.filter.as_ref().map_or(usize::MAX, |filter| filter.prompt_len);
        let dropped = state.visual.as_ref().filter(|_| num_tokens >= prompt_len);
        present.saturating_sub(dropped.map_or(0, |outcome| outcome.dropped[layer]))
    }

    /// The class of plans whose K and V are interchangeable with this one's as far as they are shareable.
    pub fn key(&self) -> PlanKey {
        self.key
    }

    /// The options to fill in.
    pub(super) fn options_mut(&mut self) -> &mut CompressionOptions {
        &mut self.options
    }

    /// Lowers the limit of a sublayer to `limit`.
    pub(super) fn limit(&mut self, layer: usize, sublayer: Sublayer, limit: usize) {
        let own = &mut self.limits[layer][sublayer as usize];
        *own = limit.min(*own);
    }

    /// Lets nothing from token `len` on be shared.
    pub(super) fn share_at_most(&mut self, len: usize) {
        self.shareable_len = self.shareable_len.min(len);
    }

    pub(super) fn set_ffn(&mut self, policy: FfnPolicy) {
        self.ffn = Some(policy);
    }

    pub(super) fn set_pruning(&mut self, pruning: Pruning, head_dim: usize) {
        self.pruning = Some(pruning);
        self.head_dim = head_dim;
    }

    pub(super) fn set_filter(&mut self, filter: Arc<VisualFilter>) {
        self.filter = Some(filter);
    }

    /// Notes the images of the prompt: tokens without a row never run.
    pub(super) fn show(&mut self, images: &[crate::vision::PromptImage]) {
        self.num_visual = images.iter().map(|image| image.embeddings.num_tokens()).sum();
        let absent = |image: &crate::vision::PromptImage| {
            let all = image.range();
            let is_absent = |position: &usize| image.embeddings.row(position - image.start).is_none();
            all.filter(is_absent).collect::<Vec<_>>()
        };
        self.absent = images.iter().filter(|image| !image.embeddings.is_whole()).flat_map(absent).collect();
    }

    /// Sets the key from the sublayers that never run; those of no drop keep the dense key.
    pub(super) fn seal_key(&mut self) {
        // FNV-1a over the dropped sublayers, which is stable from build to build.
        let mut hash = 0xCBF2_9CE4_8422_2325_u64;
        let mut dropped = false;
        for (index, &limit) in self.limits.iter().flatten().enumerate() {
            if limit == 0 {
                dropped = true;
                hash = (hash ^ index as u64).wrapping_mul(0x0100_0000_01B3);
            }
        }
        self.key = PlanKey(if dropped { hash.max(1) } else { 0 });
    }
}

impl KvDemand {
    /// Demand of a plan that fills every layer for every token.
    pub fn dense(num_layers: usize) -> Self {
        let limits = vec![usize::MAX; num_layers].into();
        Self { limits, absent: Arc::default(), filter: None, shareable_len: usize::MAX, seal: None }
    }

    /// This demand, of which no more than the first `len` tokens may be shared.
    #[must_use]
    pub fn shared_at_most(self, len: usize) -> Self {
        Self { shareable_len: self.shareable_len.min(len), ..self }
    }

    /// Number of decoder layers that have a block table.
    pub fn num_layers(&self) -> usize {
        self.limits.len()
    }

    /// KV slots filled in `layer` once the first `num_tokens` tokens of the sequence are computed, at most: filters
    /// of image tokens may drop more. Never decreases with `num_tokens` up to the end of what runs whole, nor from
    /// there on.
    pub fn kv_len(&self, layer: usize, num_tokens: usize) -> usize {
        let filter = self.filter.as_ref().filter(|filter| num_tokens >= filter.prompt_len);
        self.present(layer, num_tokens).saturating_sub(filter.map_or(0, |filter| filter.during[layer]))
    }

    /// The same without filters.
    pub fn present(&self, layer: usize, num_tokens: usize) -> usize {
        let limit = self.limits[layer].min(num_tokens);
        limit - self.absent.partition_point(|&absent| absent < limit)
    }

    /// What has to run in one step, and what becomes of it, if image tokens are filtered.
    pub fn filter(&self) -> Option<&FilterDemand> {
        self.filter.as_ref()
    }

    /// How the prefix shrinks, if it does.
    pub fn seal(&self) -> Option<&Seal> {
        self.seal.as_ref()
    }

    /// Pages of `block_size` slots that the first `num_tokens` tokens fill in `layer`, its prefix packed or
    /// not.
    pub fn layer_pages(&self, layer: usize, block_size: usize, (num_tokens, sealed): (usize, bool)) -> usize {
        let slots = self.kv_len(layer, num_tokens);
        match &self.seal {
            Some(seal) if sealed && slots > 0 => {
                seal.packed_pages(block_size) + (slots - seal.num_packed(block_size)).div_ceil(block_size)
            }
            _ => slots.div_ceil(block_size),
        }
    }

    /// Pages that the first `num_tokens` tokens fill at most, over all layers, once what is to be packed or dropped is.
    pub fn num_pages(&self, block_size: usize, num_tokens: usize) -> usize {
        if let Some(filter) = self.filter.as_ref().filter(|filter| num_tokens > filter.prompt_len) {
            let slots = |layer| self.present(layer, num_tokens).saturating_sub(filter.after[layer]);
            return (0..self.num_layers()).map(|layer| slots(layer).div_ceil(block_size)).sum();
        }
        let sealed = self.seal.is_some_and(|seal| num_tokens > seal.at());
        (0..self.num_layers()).map(|layer| self.layer_pages(layer, block_size, (num_tokens, sealed))).sum()
    }

    /// Tokens from the start whose pages other sequences may use: later ones were computed in a way that
    /// depends on more than the tokens and the plan's key.
    pub fn shareable_len(&self) -> usize {
        self.shareable_len
    }
}
