//! A model-free engine: it runs plans on a simulated KV cache and checks, before every row, that each slot
//! which attention would read holds the KV of exactly that token after exactly that prefix.

use std::collections::hash_map::{DefaultHasher, Entry};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{Hash, Hasher};

use model_zoo::kv_cache::PageId;

use crate::scheduler::{AddError, RowOutcome, Scheduler, SchedulerConfig, SeqId, SequenceSpec, StepPlan};

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
        let live = Live { tokens: spec.prompt.to_vec(), spec, next_pos: None };
        self.live.insert(live.spec.id, live);
        self.check_pages();
        Ok(())
    }

    pub(super) fn abort(&mut self, id: SeqId) {
        let was_live = self.live.remove(&id).is_some();
        assert_eq!(self.scheduler.abort(id), was_live);
        self.check_pages();
    }

    pub(super) fn resize(&mut self, num_pages: usize) -> usize {
        let now = self.scheduler.set_num_pages(num_pages);
        // Storage beyond the pool is cut off.
        self.slots.retain(|&(page, _), _| (page as usize) < now);
        self.check_pages();
        now
    }

    /// Schedules and checks the plan.
    pub(super) fn schedule(&mut self) -> StepPlan {
        let plan = self.scheduler.schedule();
        assert_eq!(plan, self.scheduler.schedule(), "an uncommitted plan is planned again");
        for id in &plan.preempted {
            self.live.get_mut(id).expect("preempted sequences are live").next_pos = None;
        }
        let num_tokens: usize = plan.rows.iter().map(|row| row.num_tokens).sum();
        assert!(num_tokens <= self.config.max_num_batched_tokens);
        assert!(self.scheduler.stats().running <= self.config.max_num_seqs);
        assert_eq!(plan.rows.is_empty(), self.live.is_empty(), "there is a row as long as there is work");
        self.check_no_decode_starves(&plan);
        self.check_pages();
        plan
    }

    /// Who is past its prompt has a row, unless there is no page for it.
    fn check_no_decode_starves(&self, plan: &StepPlan) {
        let stats = self.scheduler.stats();
        for (&id, live) in &self.live {
            let decoding = live.next_pos.is_some_and(|pos| pos + 1 == live.tokens.len());
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
                    let found = self.slots.get(&self.slot(row.id, layer, pos));
                    assert_eq!(found, Some(&content(live, layer, pos)), "{row:?} reads wrong KV at {pos}");
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
        (tables[layer][pos / self.config.block_size], pos % self.config.block_size)
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
                    let last_pos = (index + 1) * self.config.block_size - 1;
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
