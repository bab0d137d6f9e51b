//! A model-free engine: it runs plans on a simulated KV cache and checks, before every row, that each slot
//! which attention would read holds the KV of exactly that token after exactly that prefix.

use std::collections::hash_map::{DefaultHasher, Entry};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{Hash, Hasher};

use model_zoo::compression::PlanKey;
use model_zoo::compression::think::PageMove;
use model_zoo::kv_cache::PageId;

use crate::scheduler::{
    AddError, PageCopy, RowOutcome, Scheduler, SchedulerConfig, SeqId, SequenceSpec, StepPlan,
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
}

impl Simulation {
    pub(super) fn new(config: SchedulerConfig) -> Self {
        Self {
            scheduler: Scheduler::new(config.clone()),
            config,
            slots: HashMap::new(),
            live: BTreeMap::new(),
            finishing: BTreeSet::new(),
            num_finished: 0,
        }
    }

    pub(super) fn add(&mut self, spec: SequenceSpec) -> Result<(), AddError> {
        self.scheduler.add(spec.clone())?;
        let live = Live { tokens: spec.prompt.to_vec(), spec, next_pos: None, sealed: false };
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
            (live.next_pos, live.sealed) = (None, false);
        }
        let num_tokens: usize = plan.rows.iter().map(|row| row.num_tokens).sum();
        assert!(num_tokens <= self.config.max_num_batched_tokens);
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
                match *page_move {
                    PageMove::Pack { layer, page, first } => {
                        let touched = touched(live, first, block_size);
                        for offset in 0..block_size {
                            let content = self.slots.get(&(page, offset)).copied().unwrap_or(GARBAGE);
                            for place in touched.clone() {
                                let slot = PACKED + first + offset;
                                self.slots.insert((seal.packed[layer][place], slot), content);
                            }
                        }
                    }
                    PageMove::Copy { from, to } => {
                        for offset in 0..block_size {
                            let content = self.slots.get(&(from, offset)).copied().unwrap_or(GARBAGE);
                            self.slots.insert((to, offset), content);
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
            if decoding && plan.rows.iter().all(|row| row.id != id) {
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
            for layer in 0..live.spec.demand.num_layers() {
                assert_eq!(self.scheduler.kv_len(row.id).unwrap()[layer], row.first_pos);
                for pos in 0..row.first_pos {
                    for slot in self.read(row.id, layer, pos) {
                        let found = self.slots.get(&slot);
                        assert_eq!(
                            found,
                            Some(&content(live, layer, pos)),
                            "{row:?} reads wrong KV at {pos}"
                        );
                    }
                }
                for pos in row.first_pos..row.first_pos + row.num_tokens {
                    let (page, slot) = self.slot(row.id, layer, pos);
                    assert!(self.holders(page).len() == 1, "{row:?} writes a shared page");
                    self.slots.insert((page, slot), content(live, layer, pos));
                }
            }
        }
    }

    /// A forward pass that fails half-way: what it should have written is garbage.
    pub(super) fn fail(&mut self, plan: &StepPlan) {
        self.forward(plan);
        for row in &plan.rows {
            for layer in 0..self.live[&row.id].spec.demand.num_layers() {
                for pos in row.first_pos..row.first_pos + row.num_tokens {
                    self.slots.insert(self.slot(row.id, layer, pos), GARBAGE);
                }
            }
        }
    }

    /// Samples and commits. Rows of sequences that were aborted or preempted since have their outcome too.
    pub(super) fn commit(&mut self, plan: &StepPlan) {
        let mut outcomes = Vec::new();
        for row in &plan.rows {
            // A preempted sequence has no pages, whatever the plan said.
            let lost = self.scheduler.kv_len(row.id).is_none_or(|len| len[0] != row.first_pos)
                || self.scheduler.block_tables(row.id).is_none_or(|tables| tables[0].is_empty());
            let next = match self.live.get_mut(&row.id) {
                Some(live) if !lost => {
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

    fn slot(&self, id: SeqId, layer: usize, pos: usize) -> (PageId, usize) {
        let tables = self.scheduler.block_tables(id).expect("a scheduled sequence is live");
        let (pages, slots) = self.live[&id].packed(self.config.block_size);
        let pos = pos - slots;
        (tables[layer][pages + pos / self.config.block_size], pos % self.config.block_size)
    }

    /// Where the KV of a token lies.
    fn read(&self, id: SeqId, layer: usize, pos: usize) -> Vec<(PageId, usize)> {
        let (live, block_size) = (&self.live[&id], self.config.block_size);
        if pos >= live.packed(block_size).1 {
            return vec![self.slot(id, layer, pos)];
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
                    let last_pos = slots + (dense + 1) * self.config.block_size - 1;
                    let shareable = last_pos < self.scheduler.kv_len(id).expect("live")[layer];
                    match held.entry(page) {
                        Entry::Occupied(other) => {
                            assert!(shareable, "page {page} is shared before it is full");
                            assert_eq!(*other.get(), content(live, layer, last_pos));
                        }
                        Entry::Vacant(free) => {
                            // A page that is not full has a content that no other place can equal.
                            free.insert(if shareable { content(live, layer, last_pos) } else { GARBAGE });
                        }
                    }
                }
            }
        }
        assert_eq!(held.len(), stats.pages_used, "pages in block tables");
    }
}

impl Live {
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
