//! A model-free engine: it runs plans on a simulated KV cache and checks, before every row, that each slot
//! which attention would read holds the KV of exactly that token after exactly that prefix.

use std::collections::hash_map::{DefaultHasher, Entry};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{Hash, Hasher};

use model_zoo::compression::PlanKey;
use model_zoo::kv_cache::PageId;
use model_zoo::kv_cache::PageMove;

use crate::scheduler::{
    AddError, PageCopy, RowOutcome, ScheduledSeq, Scheduler, SchedulerConfig, SeqId, SequenceSpec, StepPlan,
};

/// Where packed slots are counted from in a page.
const PACKED: usize = 1000;
/// Content of a slot after a failed forward pass.
const GARBAGE: u64 = 0;

pub(super) struct Simulation {
    pub(super) scheduler: Scheduler,
    config: SchedulerConfig,
    /// What was written last, as a digest of layer, plan, salt and the tokens up to the slot's.
    slots: HashMap<(PageId, usize), u64>,
    live: BTreeMap<SeqId, Live>,
    /// Sequences that the engine ends with their next sampled token.
    pub(super) finishing: BTreeSet<SeqId>,
    /// Sequences that give way to others.
    demoted: BTreeSet<SeqId>,
    pub(super) num_finished: usize,
}

struct Live {
    spec: SequenceSpec,
    /// The tokens that the scheduler must know.
    tokens: Vec<u32>,
    /// Where its next row must begin; `None` while it holds no pages.
    next_pos: Option<usize>,
    /// Its prompt lies in packed pages.
    sealed: bool,
    /// `[layer]`: tokens of its prompt whose slots filters have left, once it is computed.
    kept: Option<Vec<Vec<usize>>>,
}

impl Simulation {
    pub(super) fn new(config: SchedulerConfig) -> Self {
        Self {
            scheduler: Scheduler::new(config.clone()),
            config,
            slots: HashMap::new(),
            live: BTreeMap::new(),
            finishing: BTreeSet::new(),
            demoted: BTreeSet::new(),
            num_finished: 0,
        }
    }

    pub(super) fn add(&mut self, spec: SequenceSpec) -> Result<(), AddError> {
        self.scheduler.add(spec.clone())?;
        let live = Live { tokens: spec.prompt.to_vec(), spec, next_pos: None, sealed: false, kept: None };
        self.live.insert(live.spec.id, live);
        self.check_pages();
        Ok(())
    }

    pub(super) fn abort(&mut self, id: SeqId) {
        let was_live = self.live.remove(&id).is_some();
        assert_eq!(self.scheduler.abort(id), was_live);
        self.move_storage();
        self.check_pages();
    }

    pub(super) fn demote(&mut self, id: SeqId) {
        self.scheduler.demote(id);
        self.demoted.insert(id);
        self.check_pages();
    }

    pub(super) fn resize(&mut self, num_pages: usize) -> usize {
        let now = self.scheduler.set_num_pages(num_pages);
        self.move_storage();
        self.check_pages();
        now
    }

    /// Has a live sequence computed anew under another key.
    pub(super) fn recompute(&mut self, id: SeqId, key: PlanKey) {
        self.scheduler.recompute(&HashMap::from([(id, key)]));
        if let Some(live) = self.live.get_mut(&id) {
            live.spec.plan_key = key;
        }
        self.check_pages();
    }

    /// Follows a pool that has shrunk: copies what moved, and cuts the storage off behind its end.
    fn move_storage(&mut self) {
        for PageCopy { from, to } in self.scheduler.drain_copies() {
            self.slots.retain(|&(page, _), _| page != to);
            let moved: Vec<_> = self.slots.iter().filter(|((page, _), _)| *page == from).collect();
            let moved: Vec<_> =
                moved.into_iter().map(|(&(_, slot), &content)| ((to, slot), content)).collect();
            self.slots.extend(moved);
        }
        let num_pages = self.scheduler.num_pages();
        self.slots.retain(|&(page, _), _| (page as usize) < num_pages);
    }

    /// Schedules and checks the plan.
    pub(super) fn schedule(&mut self) -> StepPlan {
        let plan = self.scheduler.schedule();
        assert_eq!(plan, self.scheduler.schedule(), "an uncommitted plan is planned again");
        self.move_sealed();
        for id in &plan.preempted {
            let live = self.live.get_mut(id).expect("preempted sequences are live");
            (live.next_pos, live.sealed, live.kept) = (None, false, None);
        }
        // What runs whole may be longer than the budget; then it is the step's only prefill.
        let is_whole = |row: &&ScheduledSeq| self.live[&row.id].computes_whole(row);
        let num_tokens: usize = plan.rows.iter().map(|row| row.num_tokens).sum();
        let num_prefills = plan.rows.iter().filter(|row| !row.samples || row.num_tokens > 1).count();
        assert!(
            num_tokens <= self.config.max_num_batched_tokens
                || (plan.rows.iter().any(|row| is_whole(&row)) && num_prefills == 1)
        );
        assert!(self.scheduler.stats().running <= self.config.max_num_seqs);
        assert_eq!(plan.rows.is_empty(), self.live.is_empty(), "there is a row as long as there is work");
        self.check_no_decode_starves(&plan);
        self.check_pages();
        plan
    }

    /// Packs pages as the engine does. A packed slot is kept once for every page that its block touches.
    fn move_sealed(&mut self) {
        let block_size = self.config.block_size;
        for (id, seal) in self.scheduler.drain_seals() {
            let Some(live) = self.live.get_mut(&id) else { continue };
            live.sealed = true;
            for page_move in &seal.moves {
                match page_move {
                    PageMove::Pack { page, first, packed, .. } => {
                        assert_eq!(packed.len(), touched(live, *first, block_size).len());
                        for offset in 0..block_size {
                            let content = self.slots.get(&(*page, offset)).copied().unwrap_or(GARBAGE);
                            for to in packed {
                                self.slots.insert((*to, PACKED + first + offset), content);
                            }
                        }
                    }
                    PageMove::Copy { from, to } => {
                        for offset in 0..block_size {
                            let content = self.slots.get(&(*from, offset)).copied().unwrap_or(GARBAGE);
                            self.slots.insert((*to, offset), content);
                        }
                    }
                }
            }
        }
    }

    /// Who is past its prompt has a row, unless there is no page for it.
    fn check_no_decode_starves(&self, plan: &StepPlan) {
        let stats = self.scheduler.stats();
        for (&id, live) in &self.live {
            // What sealing needs depends on who shares the prompt.
            let seals = live.spec.demand.seal().is_some() && !live.sealed;
            let decoding = !seals && live.next_pos.is_some_and(|pos| pos + 1 == live.tokens.len());
            let waits = self.demoted.contains(&id);
            if decoding && !waits && plan.rows.iter().all(|row| row.id != id) {
                let num_layers = live.spec.demand.num_layers();
                assert!(stats.pages_free + stats.pages_cached < num_layers, "{id:?} starves");
            }
        }
    }

    /// Writes KV for every row of the plan, checking what each row reads.
    pub(super) fn forward(&mut self, plan: &StepPlan) {
        for row in &plan.rows {
            let live = &self.live[&row.id];
            assert!(live.next_pos.is_none_or(|pos| pos == row.first_pos), "{row:?} skips or repeats tokens");
            assert!(row.num_tokens > 0 && row.first_pos + row.num_tokens <= live.tokens.len());
            assert_eq!(row.samples, row.first_pos + row.num_tokens == live.tokens.len());
            let num_layers = live.spec.demand.num_layers();
            for layer in 0..num_layers {
                let live = &self.live[&row.id];
                let first = live.held(layer, row.first_pos);
                assert_eq!(self.scheduler.kv_len(row.id).unwrap()[layer], first);
                for pos in (0..row.first_pos).filter(|&pos| live.holds(layer, pos)) {
                    for slot in self.read(row.id, layer, pos) {
                        let found = self.slots.get(&slot);
                        assert_eq!(
                            found,
                            Some(&content(live, layer, pos)),
                            "{row:?} reads wrong KV at {pos}"
                        );
                    }
                }
                let kept = live.computes_whole(row).then(|| live.filtered(layer));
                let runs = |pos: &usize| kept.as_ref().is_none_or(|[during, _]| during.contains(pos));
                let written = (row.first_pos..row.first_pos + row.num_tokens).filter(runs).collect();
                self.write(row.id, layer, (first, written));
                if let Some([_, after]) = kept {
                    let moved = after.into_iter().filter(|&pos| pos >= row.first_pos).collect();
                    self.write(row.id, layer, (first, moved));
                }
            }
        }
    }

    /// Writes the KV of these tokens to the slots from the `first` on.
    fn write(&mut self, id: SeqId, layer: usize, (first, tokens): (usize, Vec<usize>)) {
        for (index, pos) in tokens.into_iter().enumerate() {
            let (page, slot) = self.place(id, layer, first + index);
            assert!(self.holders(page).len() == 1, "{id:?} writes a shared page");
            self.slots.insert((page, slot), content(&self.live[&id], layer, pos));
        }
    }

    /// A forward pass that fails half-way: what it should have written is garbage.
    pub(super) fn fail(&mut self, plan: &StepPlan) {
        self.forward(plan);
        for row in &plan.rows {
            for layer in 0..self.live[&row.id].spec.demand.num_layers() {
                let live = &self.live[&row.id];
                let first = live.held(layer, row.first_pos);
                let count = match live.computes_whole(row) {
                    true => live.filtered(layer)[0].len() - first,
                    false => row.num_tokens,
                };
                for slot in first..first + count {
                    self.slots.insert(self.place(row.id, layer, slot), GARBAGE);
                }
            }
        }
    }

    /// Samples and commits. Rows of sequences that were aborted or preempted since have their outcome too.
    pub(super) fn commit(&mut self, plan: &StepPlan) {
        let mut outcomes = Vec::new();
        for row in &plan.rows {
            // A preempted sequence has no pages, whatever the plan said.
            let held = self.live.get(&row.id).map(|live| live.held(0, row.first_pos));
            let lost = self.scheduler.kv_len(row.id).is_none_or(|len| Some(len[0]) != held)
                || self.scheduler.block_tables(row.id).is_none_or(|tables| tables[0].is_empty());
            let next = match self.live.get_mut(&row.id) {
                Some(live) if !lost => {
                    if live.computes_whole(row) {
                        let layers = 0..live.spec.demand.num_layers();
                        let kept: Vec<_> = layers.map(|layer| live.filtered(layer)[1].clone()).collect();
                        let dropped: Vec<_> =
                            kept.iter().map(|kept| live.spec.prompt.len() - kept.len()).collect();
                        self.scheduler.drop_slots(row.id, &dropped);
                        live.kept = Some(kept);
                    }
                    live.next_pos = Some(row.first_pos + row.num_tokens);
                    sample(live)
                }
                _ => 0,
            };
            outcomes.push(match self.live.get_mut(&row.id) {
                _ if !row.samples => RowOutcome::Prefilled,
                Some(live) if !lost => {
                    live.tokens.push(next);
                    let full = live.tokens.len() >= live.spec.prompt.len() + live.spec.max_tokens;
                    let stopped = self.finishing.remove(&row.id);
                    if full || stopped {
                        self.live.remove(&row.id);
                        self.num_finished += 1;
                    }
                    // The scheduler ends a full sequence by itself as well.
                    if stopped || (full && next == 0) {
                        RowOutcome::Finished
                    } else {
                        RowOutcome::Sampled(next)
                    }
                }
                _ => RowOutcome::Sampled(next),
            });
        }
        self.scheduler.commit(plan, &outcomes);
        self.move_storage();
        self.check_pages();
    }

    pub(super) fn step(&mut self) -> StepPlan {
        let plan = self.schedule();
        self.forward(&plan);
        self.commit(&plan);
        plan
    }

    /// Live sequences in order of id.
    pub(super) fn live(&self) -> Vec<SeqId> {
        self.live.keys().copied().collect()
    }

    /// Where a slot that is not packed lies.
    fn place(&self, id: SeqId, layer: usize, slot: usize) -> (PageId, usize) {
        let tables = self.scheduler.block_tables(id).expect("a scheduled sequence is live");
        let (pages, slots) = self.live[&id].packed(self.config.block_size);
        let slot = slot - slots;
        (tables[layer][pages + slot / self.config.block_size], slot % self.config.block_size)
    }

    /// Where the KV of a token lies.
    fn read(&self, id: SeqId, layer: usize, pos: usize) -> Vec<(PageId, usize)> {
        let (live, block_size) = (&self.live[&id], self.config.block_size);
        if pos >= live.packed(block_size).1 {
            return vec![self.place(id, layer, live.held(layer, pos))];
        }
        let tables = self.scheduler.block_tables(id).expect("a scheduled sequence is live");
        let touched = touched(live, pos / block_size * block_size, block_size);
        touched.map(|place| (tables[layer][place], PACKED + pos)).collect()
    }

    fn holders(&self, page: PageId) -> Vec<SeqId> {
        let holds = |id: &&SeqId| {
            let tables = self.scheduler.block_tables(**id).expect("known sequences are live");
            tables.iter().flatten().any(|&held| held == page)
        };
        self.live.keys().filter(holds).copied().collect()
    }

    /// Every page is in one state, and two block tables share one only at the same place of the same
    /// prefix.
    fn check_pages(&self) {
        let stats = self.scheduler.stats();
        assert_eq!(stats.pages_used + stats.pages_cached + stats.pages_free, stats.pages_total);
        assert_eq!(stats.running + stats.waiting, self.live.len());
        let mut held: HashMap<PageId, u64> = HashMap::new();
        for (&id, live) in &self.live {
            assert_eq!(self.scheduler.tokens(id), Some(live.tokens.as_slice()));
            let mut own = BTreeSet::new();
            for (layer, table) in self.scheduler.block_tables(id).expect("live").iter().enumerate() {
                for (index, &page) in table.iter().enumerate() {
                    assert!((page as usize) < stats.pages_total, "page {page} is beyond the pool");
                    assert!(own.insert(page), "page {page} is twice in the tables of {id:?}");
                    let (pages, slots) = live.packed(self.config.block_size);
                    let Some(dense) = index.checked_sub(pages) else {
                        assert!(held.insert(page, GARBAGE).is_none(), "packed page {page} is shared");
                        continue;
                    };
                    let last = slots + (dense + 1) * self.config.block_size - 1;
                    let shareable = last < self.scheduler.kv_len(id).expect("live")[layer];
                    // A page that is not full has a content that no other place can equal.
                    let own = if shareable { content(live, layer, live.token(layer, last)) } else { GARBAGE };
                    match held.entry(page) {
                        Entry::Occupied(other) => {
                            assert!(shareable, "page {page} is shared before it is full");
                            assert_eq!(*other.get(), own);
                        }
                        Entry::Vacant(free) => _ = free.insert(own),
                    }
                }
            }
        }
        assert_eq!(held.len(), stats.pages_used, "pages in block tables");
    }
}

impl Live {
    /// Whether `row` computes the part of its prompt that runs whole.
    fn computes_whole(&self, row: &ScheduledSeq) -> bool {
        let end = row.first_pos + row.num_tokens;
        self.spec.demand.filter().is_some_and(|filter| filter.whole().end == end)
    }

    /// The tokens of the prompt whose KV filters leave in `layer`: while it is computed, as many as they may; once it
    /// is, two fewer than that where there are any.
    fn filtered(&self, layer: usize) -> [Vec<usize>; 2] {
        let filter = self.spec.demand.filter().expect("it has filters");
        let (first, [during, after]) = (filter.whole().start, filter.dropped_at_least(layer));
        let num_visual: usize = self.spec.images.iter().map(|image| image.num_tokens).sum();
        let without = |count: usize| {
            (0..self.spec.prompt.len())
                .filter(|pos| !(first..first + count).contains(pos))
                .collect::<Vec<_>>()
        };
        [without(during), without((after + 2).min(num_visual).max(during))]
    }

    /// KV slots of `layer` that hold tokens before `pos`.
    fn held(&self, layer: usize, pos: usize) -> usize {
        let Some(kept) = &self.kept else { return pos };
        let prompt = kept[layer].partition_point(|&token| token < pos);
        prompt + pos.saturating_sub(self.spec.prompt.len())
    }

    /// Whether the KV of token `pos` is held in `layer`.
    fn holds(&self, layer: usize, pos: usize) -> bool {
        let Some(kept) = &self.kept else { return true };
        pos >= self.spec.prompt.len() || kept[layer].contains(&pos)
    }

    /// The token whose KV `slot` of `layer` holds.
    fn token(&self, layer: usize, slot: usize) -> usize {
        let Some(kept) = &self.kept else { return slot };
        let rest = slot.checked_sub(kept[layer].len());
        rest.map_or_else(|| kept[layer][slot], |rest| self.spec.prompt.len() + rest)
    }

    /// Pages and slots of its packed prefix.
    fn packed(&self, block_size: usize) -> (usize, usize) {
        let seal = self.spec.demand.seal().filter(|_| self.sealed);
        seal.map_or((0, 0), |seal| (seal.packed_pages(block_size), seal.num_packed(block_size)))
    }
}

/// The packed pages that the block at slot `first` touches.
fn touched(live: &Live, first: usize, block_size: usize) -> std::ops::Range<usize> {
    let seal = live.spec.demand.seal().expect("it was sealed");
    seal.pages_before(first, block_size).0..seal.pages_before(first + block_size, block_size).1
}

/// What the KV of token `pos` in `layer` depends on.
fn content(live: &Live, layer: usize, pos: usize) -> u64 {
    let mut hasher = DefaultHasher::new();
    (layer, live.spec.plan_key, live.spec.cache_salt, &live.tokens[..=pos]).hash(&mut hasher);
    hasher.finish()
}

/// A model whose next token depends on all tokens before, from a vocabulary of two.
fn sample(live: &Live) -> u32 {
    let mut hasher = DefaultHasher::new();
    live.tokens.hash(&mut hasher);
    (hasher.finish() % 2) as u32
}
