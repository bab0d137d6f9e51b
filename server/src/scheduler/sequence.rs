//! A sequence as the scheduler sees it: its tokens, how far they are computed, and its pages. Plain
//! data; every change of state is made by the scheduler and by [`super::kv_pages`].

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::{Index, IndexMut, Range};

use model_zoo::kv_cache::PageId;

use super::prefix_cache::{BlockId, CacheKey, Parent};
use super::{ImageSpan, ScheduledSeq, SeqId, SequenceSpec};

/// One choice of one request, waiting or running.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) spec: SequenceSpec,
    /// Prompt followed by output.
    pub(super) tokens: Vec<u32>,
    /// Leading tokens whose KV is in the pages.
    pub(super) num_computed: usize,
    /// Tokens after those that the current plan runs.
    pub(super) num_scheduled: usize,
    /// Tokens found in the prefix cache at the first admission; `None` before it.
    pub(super) num_cached: Option<usize>,
    /// `[layer]`: pages in slot order, at least enough for `kv_len`.
    pub(super) block_tables: Vec<Vec<PageId>>,
    /// `[layer]`: KV slots that the computed tokens fill.
    pub(super) kv_len: Vec<usize>,
    /// The leading pages that the prefix cache owns.
    pub(super) shared: SharedPrefix,
    /// Whether its prompt lies in packed pages.
    pub(super) sealed: bool,
    /// `[layer]`: slots that filters have dropped of its prompt, once it is computed.
    pub(super) dropped: Option<Vec<usize>>,
    /// What the step that is about to be committed has dropped.
    pub(super) dropping: Option<Vec<usize>>,
    /// A part of its KV was made by other weights than its key says.
    pub(super) is_mixed: bool,
    /// Others come before it.
    pub(super) demoted: bool,
    /// Pages that it holds at most.
    pub(super) max_pages: usize,
}

/// The part of a sequence whose pages belong to cached blocks; the pages after it are the sequence's own.
#[derive(Debug, Default)]
pub(super) struct SharedPrefix {
    /// Cached blocks in order; the sequence holds a reference to each.
    pub(super) blocks: Vec<BlockId>,
    /// Tokens that they cover.
    pub(super) num_tokens: usize,
    /// Tokens up to which block borders were looked for, so that no step looks twice.
    pub(super) num_scanned: usize,
}

impl Sequence {
    pub(super) fn new(spec: SequenceSpec, max_pages: usize) -> Self {
        let num_layers = spec.demand.num_layers();
        Self {
            tokens: spec.prompt.to_vec(),
            num_computed: 0,
            num_scheduled: 0,
            num_cached: None,
            block_tables: vec![Vec::new(); num_layers],
            kv_len: vec![0; num_layers],
            shared: SharedPrefix::default(),
            sealed: false,
            dropped: None,
            dropping: None,
            is_mixed: false,
            demoted: false,
            max_pages,
            spec,
        }
    }

    /// Tokens whose KV is computed at most: all but the last sampled one, which nothing follows.
    pub(super) fn max_computed(spec: &SequenceSpec) -> usize {
        spec.prompt.len().saturating_add(spec.max_tokens.saturating_sub(1))
    }

    /// Known tokens that are neither computed nor scheduled.
    pub(super) fn num_remaining(&self) -> usize {
        self.tokens.len() - self.num_computed - self.num_scheduled
    }

    /// Of those, tokens that a step may run: pruning and dropping take place between the prompt and what follows.
    pub(super) fn num_runnable(&self) -> usize {
        let next = self.num_computed + self.num_scheduled;
        if let Some(end) = self.whole().map(|whole| whole.end) {
            return end.saturating_sub(next);
        }
        match self.spec.demand.seal() {
            Some(seal) if !self.sealed && next < seal.at() => self.num_remaining().min(seal.at() - next),
            Some(seal) if !self.sealed && self.num_computed < seal.at() => 0,
            _ => self.num_remaining(),
        }
    }

    /// The tokens that have to run in one step, until they have.
    fn whole(&self) -> Option<Range<usize>> {
        self.spec.demand.filter().filter(|_| self.dropped.is_none()).map(|filter| filter.whole())
    }

    /// Tokens that a step may run within `budget`. 0 where what comes next runs whole and is longer.
    pub(super) fn chunk(&self, budget: usize) -> usize {
        let runnable = self.num_runnable();
        match self.whole() {
            Some(whole) if runnable > budget => {
                budget.min(whole.start.saturating_sub(self.num_computed + self.num_scheduled))
            }
            _ => runnable.min(budget),
        }
    }

    /// KV slots that its first `num_tokens` tokens fill in `layer`.
    pub(super) fn slots(&self, layer: usize, num_tokens: usize) -> usize {
        match &self.dropped {
            Some(dropped) => self.spec.demand.present(layer, num_tokens).saturating_sub(dropped[layer]),
            None => self.spec.demand.kv_len(layer, num_tokens),
        }
    }

    /// Pages of `block_size` slots that its first `num_tokens` tokens fill in `layer`.
    pub(super) fn layer_pages(&self, layer: usize, block_size: usize, num_tokens: usize) -> usize {
        match self.spec.demand.seal() {
            Some(_) => self.spec.demand.layer_pages(layer, block_size, (num_tokens, self.sealed)),
            None => self.slots(layer, num_tokens).div_ceil(block_size),
        }
    }

    /// Whether its prompt is computed and has to be packed before anything else of it runs.
    pub(super) fn is_seal_due(&self) -> bool {
        let seal = self.spec.demand.seal();
        !self.sealed && seal.is_some_and(|seal| self.num_computed == seal.at())
    }

    /// Only its last known token is to be computed: the next step is a decode step.
    pub(super) fn is_decoding(&self) -> bool {
        self.num_computed + 1 == self.tokens.len()
    }

    pub(super) fn num_outputs(&self) -> usize {
        self.tokens.len() - self.spec.prompt.len()
    }

    /// Whether the prefix cache may answer for it. A bypass holds until the prompt has been computed once.
    pub(super) fn reads_cache(&self) -> bool {
        !self.spec.bypass_prefix_cache || self.num_outputs() > 0
    }

    /// Of its first `num_tokens` tokens, those whose pages other sequences may use.
    pub(super) fn shareable(&self, num_tokens: usize) -> usize {
        let most = if self.is_mixed { self.shared.num_tokens } else { self.spec.demand.shareable_len() };
        num_tokens.min(most)
    }

    /// Of its first `num_tokens` tokens, those that the prefix cache may answer for.
    pub(super) fn reusable(&self, num_tokens: usize) -> usize {
        let most = self.spec.demand.seal().map_or(usize::MAX, |seal| seal.reusable_len());
        self.shareable(num_tokens).min(most)
    }

    /// Its row in the plan.
    pub(super) fn row(&self) -> ScheduledSeq {
        ScheduledSeq {
            id: self.spec.id,
            first_pos: self.num_computed,
            num_tokens: self.num_scheduled,
            samples: self.num_remaining() == 0,
        }
    }

    /// Counts the scheduled tokens as computed.
    pub(super) fn advance(&mut self) {
        self.num_computed += self.num_scheduled;
        self.num_scheduled = 0;
        self.dropped = self.dropping.take().or(self.dropped.take());
        self.refresh_kv_len();
    }

    pub(super) fn refresh_kv_len(&mut self) {
        for layer in 0..self.kv_len.len() {
            self.kv_len[layer] = self.slots(layer, self.num_computed);
        }
    }

    /// Where in the prefix cache the chain of this sequence begins.
    pub(super) fn cache_key(&self) -> CacheKey {
        CacheKey { plan_key: self.spec.plan_key, salt: self.spec.cache_salt }
    }

    /// What the KV of its tokens `range` depends on, besides what comes before: the tokens, and the digests
    /// of images among them. A digest's words have their highest bit set, which no token's id has.
    pub(super) fn block_key(&self, range: Range<usize>) -> Cow<'_, [u32]> {
        let tokens = &self.tokens[range.clone()];
        let overlaps =
            |image: &&ImageSpan| image.start < range.end && range.start < image.start + image.num_tokens;
        let mut images = self.spec.images.iter().filter(overlaps).peekable();
        if images.peek().is_none() {
            return Cow::Borrowed(tokens);
        }
        let digests = images.flat_map(|image| image.digest.map(|word| word | 1 << 31));
        Cow::Owned(tokens.iter().copied().chain(digests).collect())
    }

    /// The cached block after which its next one comes.
    pub(super) fn chain_end(&self) -> Parent {
        self.shared.blocks.last().map_or(Parent::Root(self.cache_key()), |&id| Parent::Block(id))
    }
}

/// All live sequences by id.
#[derive(Debug, Default)]
pub(super) struct Sequences(pub(super) HashMap<SeqId, Sequence>);

// The waiting queue and the running list hold ids of live sequences only; indexing says so.
impl Index<SeqId> for Sequences {
    type Output = Sequence;

    fn index(&self, id: SeqId) -> &Sequence {
        self.0.get(&id).expect("invariant: queued and running sequences are live")
    }
}

impl IndexMut<SeqId> for Sequences {
    fn index_mut(&mut self, id: SeqId) -> &mut Sequence {
        self.0.get_mut(&id).expect("invariant: queued and running sequences are live")
    }
}
