//! Memory budgets on the engine thread: what was asked for is approached between steps, a slice at a time.
//!
//! KV grows at once and shrinks some pages a turn (see [`crate::scheduler`]). Weights grow and shrink block by
//! block. A choice is pinned, when it arrives, to the blocks that are held then and that its plan allows; growing
//! changes nothing for it. A shrink that takes its blocks moves it down at once, to the count that will be held.
//! Then it either goes on over the KV that it has, or loses it and is computed again by the blocks that it has now
//! ([`OnShrink`]); one that is not decoding, its prompt or what it lost still to be computed, is always computed from
//! the start. Its usage tells the parts of the text, and which of them go on over KV of other blocks: a solo run that
//! changes blocks at the same tokens has the same text. What its plan has decided for tokens that it has run stays
//! decided.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use model_zoo::models::elastic::ElasticWeights;
use tokio::sync::watch;

use super::run::Engine;
use crate::error::{Error, ErrorKind};
use crate::memory::{KvMemory, MemoryStatus, MemoryTargets, OnShrink, Progress, WeightMemory, of};
use crate::request::GenerateRequest;
use crate::scheduler::PageCopy;
use crate::telemetry::MemoryGauges;

/// Bytes of KV that a turn gives back at most.
const KV_SLICE: usize = 32 << 20;
/// Of the time of the step before it, what moving weights may take: one in so many parts.
const STEP_SHARE: u32 = 2;
/// And between these bounds; the upper one is also that of an idle engine.
const SLICE: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(20)];

/// What was asked for, and since when.
#[derive(Debug)]
pub(super) struct Budgets {
    weights: Option<u64>,
    kv: u64,
    /// Bytes of weights that are held whatever the budget is.
    beside: u64,
    blocks: usize,
    pages: usize,
    error: Option<String>,
    pub(super) on_shrink: OnShrink,
    change: u64,
    clocks: [Clock; 2],
    status: watch::Sender<MemoryStatus>,
}

/// When a budget was asked for, and how long it took.
#[derive(Debug, Clone, Copy)]
struct Clock {
    asked: Instant,
    reached: Option<Duration>,
}

/// Weights that a choice is served with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pin {
    /// Blocks of the stack.
    pub(super) blocks: usize,
    /// Levels of a matrix on average.
    pub(super) levels: f32,
    /// Of its tokens from the start, those whose K and V others may use.
    pub(super) shareable_len: usize,
}

const WEIGHTS: usize = 0;
const KV: usize = 1;

impl Clock {
    fn start() -> Self {
        Self { asked: Instant::now(), reached: None }
    }

    fn tick(&mut self, is_there: bool) {
        if is_there {
            self.reached.get_or_insert(self.asked.elapsed());
        }
    }

    fn progress(self) -> Progress {
        Progress { elapsed: self.asked.elapsed(), reached: self.reached }
    }
}

impl Budgets {
    /// Budgets that are reached from the start: `blocks` held and `pages` in the pool.
    pub(super) fn new(asked: MemoryTargets, (blocks, pages, page_bytes): (usize, usize, usize)) -> Self {
        let reached = Clock { asked: Instant::now(), reached: Some(Duration::ZERO) };
        Self {
            weights: asked.weights,
            kv: asked.kv.unwrap_or((pages * page_bytes) as u64),
            beside: 0,
            blocks,
            pages,
            error: None,
            on_shrink: OnShrink::default(),
            change: 0,
            clocks: [reached; 2],
            status: watch::Sender::new(MemoryStatus::default()),
        }
    }

    /// Where the engine says what it holds.
    pub(super) fn watch(&self) -> watch::Receiver<MemoryStatus> {
        self.status.subscribe()
    }
}

impl Engine {
    /// Counts `bytes` of weights that others hold as held, and as part of the budget.
    pub(super) fn hold_beside(&mut self, bytes: u64) {
        self.budgets.beside = bytes;
        self.report_memory();
    }

    /// Takes new budgets, and returns the number of the change. They are approached from now on.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a budget that the model cannot be served with, and nothing changes.
    pub(super) fn set_memory(&mut self, targets: &MemoryTargets) -> Result<u64, Error> {
        self.status().check(targets).map_err(|(param, message)| Error::invalid(param, message))?;
        if let Some(bytes) = targets.kv {
            self.set_kv(bytes)?;
        }
        if let Some(bytes) = targets.weights {
            self.set_weights(bytes);
        }
        self.budgets.change += 1;
        Ok(self.budgets.change)
    }

    fn set_kv(&mut self, bytes: u64) -> Result<(), Error> {
        let pages = usize::try_from(bytes).unwrap_or(usize::MAX) / self.kv.layout().page_bytes();
        // What an earlier shrink has left to be copied lies where the storage may be cut now.
        self.move_storage();
        if pages > self.kv.num_pages() {
            let failed =
                |e: model_zoo::ZooError| Error::new(ErrorKind::Unavailable, format!("memory.kv: {e}"));
            self.kv.resize(pages).map_err(failed)?;
        }
        if pages >= self.scheduler.num_pages() {
            self.scheduler.set_num_pages(pages);
        }
        (self.budgets.kv, self.budgets.pages) = (bytes, pages);
        self.budgets.clocks[KV] = Clock::start();
        Ok(())
    }

    fn set_weights(&mut self, bytes: u64) {
        self.budgets.weights = Some(bytes);
        self.budgets.error = None;
        self.budgets.clocks[WEIGHTS] = Clock::start();
        let Some(elastic) = self.model.elastic() else { return };
        // The check has found room for the base at least.
        let blocks = elastic.blocks_within(bytes.saturating_sub(self.budgets.beside)).unwrap_or(0);
        self.budgets.blocks = blocks;
        if blocks < elastic.held() {
            self.move_down(blocks);
        }
    }

    /// Moves every choice that is pinned to more than `blocks` down to them.
    fn move_down(&mut self, blocks: usize) {
        let levels = self.model.elastic().map_or(0.0, |elastic| elastic.mean_levels(blocks));
        let (mut kept, mut changed) = (HashMap::new(), HashMap::new());
        for (&id, choice) in &mut self.choices {
            if choice.state.blocks.is_some_and(|own| own > blocks) {
                let key = choice.live.request.plan.key().served_with(Some(blocks));
                let keeps = self.budgets.on_shrink == OnShrink::Continue && self.scheduler.is_decoding(id);
                choice.move_down((blocks, levels as f32), keeps);
                if keeps { &mut kept } else { &mut changed }.insert(id, key);
            }
        }
        self.shared.metrics.moved_down(kept.len() + changed.len());
        self.scheduler.continue_as(&kept);
        self.scheduler.recompute(&changed);
    }

    /// What a choice which arrives now is served with; `None` where the weights are held whole.
    pub(super) fn pin(&mut self, request: &GenerateRequest) -> Option<Pin> {
        let target = self.budgets.blocks;
        let elastic = self.model.elastic()?;
        let allowed = request.plan.levels().map_or(usize::MAX, |levels| elastic.blocks_of_levels(levels));
        let blocks = elastic.held().min(target).min(allowed);
        Some(Pin {
            blocks,
            levels: elastic.mean_levels(blocks) as f32,
            shareable_len: elastic.shareable_len(request.prompt.len()),
        })
    }

    /// Whether the budgets ask for something that is not done yet and can be done now.
    pub(super) fn is_memory_pending(&mut self) -> bool {
        let (blocks, stopped) = (self.budgets.blocks, self.budgets.error.is_some());
        let weights = self.model.elastic().is_some_and(|elastic| match elastic.held() {
            held if held < blocks => !stopped,
            held => held > blocks,
        });
        weights || self.scheduler.num_pages() > self.budgets.pages
    }

    /// Comes nearer to the budgets, after a step that took `step`, or none.
    pub(super) fn adjust_memory(&mut self, step: Option<Duration>) {
        self.shrink_kv();
        let slice = step.map_or(SLICE[1], |step| (step / STEP_SHARE).clamp(SLICE[0], SLICE[1]));
        self.adjust_weights(slice);
        let held = self.model.elastic().map(|elastic| elastic.held());
        let weights = held.is_none_or(|held| held == self.budgets.blocks);
        self.budgets.clocks[WEIGHTS].tick(weights);
        self.budgets.clocks[KV].tick(self.kv.num_pages() == self.budgets.pages);
    }

    fn shrink_kv(&mut self) {
        let (now, wanted) = (self.scheduler.num_pages(), self.budgets.pages);
        if now > wanted {
            let slice = KV_SLICE.div_ceil(self.kv.layout().page_bytes());
            self.scheduler.set_num_pages(wanted.max(now.saturating_sub(slice)));
        }
        self.move_storage();
    }

    /// Follows a pool that has shrunk: copies the pages that moved, and gives the storage behind its end back.
    pub(super) fn move_storage(&mut self) {
        for PageCopy { from, to } in self.scheduler.drain_copies() {
            self.kv.copy_page(from, to);
        }
        let num_pages = self.scheduler.num_pages();
        if num_pages < self.kv.num_pages()
            && let Err(error) = self.kv.resize(num_pages)
        {
            tracing::warn!(%error, "KV memory could not be given back");
        }
    }

    fn adjust_weights(&mut self, slice: Duration) {
        let Some(elastic) = self.model.elastic() else { return };
        let (begin, before) = (Instant::now(), elastic.held());
        let target = self.budgets.blocks;
        while elastic.held() > target && begin.elapsed() < slice {
            elastic.shrink();
        }
        while elastic.held() < target && self.budgets.error.is_none() && begin.elapsed() < slice {
            if let Err(error) = grow(elastic) {
                tracing::error!(error, held = elastic.held(), target, "weights stopped growing");
                self.budgets.error = Some(error);
            }
        }
        let after = elastic.held();
        self.shared.metrics.weights_moved(before, after);
    }

    /// Says what is held to whoever waits for it, and to the metrics.
    pub(super) fn report_memory(&mut self) {
        let status = self.status();
        self.shared.metrics.memory(&MemoryGauges {
            budget: [status.weights.budget.unwrap_or(status.weights.most), status.kv.budget],
            held: [status.weights.held, status.kv.held],
            blocks: [status.weights.blocks, status.weights.num_blocks],
        });
        self.budgets.status.send_replace(status);
    }

    fn status(&mut self) -> MemoryStatus {
        let stats = self.scheduler.stats();
        let (page_bytes, num_layers) =
            (self.kv.layout().page_bytes() as u64, self.model.dims().num_layers as u64);
        let kv = KvMemory {
            budget: self.budgets.kv,
            held: self.kv.num_pages() as u64 * page_bytes,
            least: num_layers * page_bytes,
            page_bytes,
            target_pages: self.budgets.pages,
            pages_used: stats.pages_used,
            pages_cached: stats.pages_cached,
            pages_free: stats.pages_free,
            progress: self.budgets.clocks[KV].progress(),
        };
        MemoryStatus { change: self.budgets.change, weights: self.weight_status(), kv }
    }

    fn weight_status(&mut self) -> WeightMemory {
        let whole = self.model.dims().weight_bytes as u64;
        let mut status = WeightMemory {
            budget: self.budgets.weights,
            held: whole,
            least: whole,
            most: whole,
            error: self.budgets.error.clone(),
            progress: self.budgets.clocks[WEIGHTS].progress(),
            ..WeightMemory::default()
        };
        if let Some(elastic) = self.model.elastic() {
            status.held = elastic.bytes_of(elastic.held());
            status.least = elastic.bytes_of(0);
            status.most = elastic.bytes_of(elastic.num_blocks());
            (status.blocks, status.num_blocks) = (elastic.held(), elastic.num_blocks());
            status.target_blocks = self.budgets.blocks;
            status.levels = elastic.mean_levels(elastic.held());
        }
        for bytes in [&mut status.held, &mut status.least, &mut status.most] {
            *bytes += self.budgets.beside;
        }
        status
    }
}

/// Grows by one block.
///
/// # Errors
/// Why it stopped, as a sentence.
fn grow(elastic: &mut dyn ElasticWeights) -> Result<(), String> {
    let before = elastic.held();
    elastic.grow().map_err(|e| format!("stopped at {}: {e}", of(elastic.bytes_of(before))))?;
    if elastic.held() > before { Ok(()) } else { Err("there are no more blocks".into()) }
}
