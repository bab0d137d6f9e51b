//! The engine thread's loop: commands, cancellation, steps.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use model_zoo::compression::KvDemand;
use model_zoo::kv_cache::KvCache;
use model_zoo::models::CausalLm;
use model_zoo::vision::PromptImage;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;

use super::Command;
use super::events::EventSender;
use super::memory::{Budgets, Pin};
use super::sequence::{Choice, Live, Shared};
use crate::energy::Paid;
use crate::energy::work::Costs;
use crate::error::{Error, ErrorKind};
use crate::memory::MemoryTargets;
use crate::request::{FinishReason, GenerateRequest, TokenEvent};
use crate::scheduler::{AddError, ImageSpan, Scheduler, SchedulerConfig, SeqId, SequenceSpec};
use crate::telemetry::SchedulerGauges;
use crate::verbosity::{Detector, VerbosityConfig};

/// Everything that the engine thread owns.
pub(super) struct Engine {
    pub(super) model: Box<dyn CausalLm>,
    pub(super) kv: KvCache,
    pub(super) scheduler: Scheduler,
    pub(super) choices: HashMap<SeqId, Choice>,
    pub(super) shared: Shared,
    pub(super) budgets: Budgets,
    /// What the model's parts cost, to share energy by.
    pub(super) costs: Costs,
    /// Finds rows that do not end.
    pub(super) detector: Detector,
    /// Scratch: what came due.
    pub(super) paid: Vec<Paid>,
    /// Steps run: energy is theirs.
    pub(super) is_busy: bool,
    next_id: u64,
    next_group: u64,
}

/// How long the engine's thread looks for work before it sleeps: about what a request takes from answer to answer.
const LINGER: Duration = Duration::from_micros(200);

impl Engine {
    /// An engine over `model` with a KV pool as `config` says.
    ///
    /// # Errors
    /// When there is no memory for the pool.
    pub(super) fn new(
        mut model: Box<dyn CausalLm>,
        (config, memory): (&SchedulerConfig, MemoryTargets),
        shared: Shared,
    ) -> model_zoo::Result<Self> {
        let kv = model.new_kv(model.dims().kv_layout(config.block_size), config.num_pages)?;
        let blocks = model.elastic().map_or(0, |elastic| elastic.held());
        let budgets = Budgets::new(memory, (blocks, config.num_pages, kv.layout().page_bytes()));
        let scheduler = Scheduler::new(config.clone());
        let choices = HashMap::new();
        let mut engine = Self {
            costs: Costs::on(model.dims(), model.is_on_gpu()),
            detector: Detector::new(VerbosityConfig::default()),
            paid: Vec::new(),
            is_busy: false,
            model,
            kv,
            scheduler,
            choices,
            shared,
            budgets,
            next_id: 0,
            next_group: 0,
        };
        engine.report_memory();
        Ok(engine)
    }

    /// Runs until every sender of `commands` is gone and all work is done, or a `Stop` came.
    pub(super) fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            if !self.scheduler.has_work() && !self.is_memory_pending() {
                self.set_busy(false);
                self.report();
                match next(&mut commands) {
                    Some(Command::Stop) | None => return,
                    Some(command) => self.take(command),
                }
            }
            loop {
                match commands.try_recv() {
                    Ok(Command::Stop) => return self.abort_where(|_| true),
                    Ok(command) => self.take(command),
                    Err(_) => break,
                }
            }
            self.turn();
        }
    }

    /// Drops what was cancelled, runs a step if there is work, comes nearer to the memory budgets, and reports.
    pub(super) fn turn(&mut self) {
        self.drop_cancelled();
        self.end_over_budget();
        let begin = self.scheduler.has_work().then(Instant::now);
        self.set_busy(begin.is_some());
        if begin.is_some() {
            self.step();
        }
        self.adjust_memory(begin.map(|begin| begin.elapsed()));
        self.report();
    }

    pub(super) fn take(&mut self, command: Command) {
        match command {
            Command::Generate { request, events } => self.add(request, events),
            Command::Abort { id } => self.abort_where(|choice| choice.live.request.id == id),
            Command::SetMemory { targets, reply } => {
                // Nobody waits any more for the answer of a request that went away.
                let _ = reply.send(self.set_memory(&targets));
            }
            // The loop ends before it gets here.
            Command::Stop => {}
        }
    }

    /// Queues every choice of a request, or none.
    fn add(&mut self, request: GenerateRequest, events: EventSender) {
        let live = Arc::new(Live::new(request, events));
        let group = self.next_group;
        self.next_group += 1;
        let mut added = Vec::new();
        for index in 0..live.request.n {
            let id = SeqId(self.next_id);
            self.next_id += 1;
            let pin = self.pin(&live.request);
            let spec = spec(&live.request, (id, group, index), pin);
            if let Err(error) = self.scheduler.add(spec) {
                added.into_iter().for_each(|id| self.remove(id));
                return live.send(TokenEvent::Failed(refusal(error)));
            }
            let mut choice = Choice::new(&live, (id, index), &self.shared);
            if let Some(pin) = pin {
                choice.serve_with((pin.blocks, pin.levels), false);
            }
            if index == 0 {
                choice.pay_for_images();
            }
            self.watch(&mut choice);
            self.choices.insert(id, choice);
            added.push(id);
        }
    }

    /// Frees everything that a sequence holds.
    pub(super) fn remove(&mut self, id: SeqId) {
        self.scheduler.abort(id);
        self.choices.remove(&id);
    }

    /// Frees the choices of clients that went away: in the queue, in prefill or in decode.
    fn drop_cancelled(&mut self) {
        let gone = |(id, choice): (&SeqId, &Choice)| choice.live.is_cancelled().then_some(*id);
        let ids: Vec<_> = self.choices.iter().filter_map(gone).collect();
        ids.into_iter().for_each(|id| self.remove(id));
    }

    fn abort_where(&mut self, matches: impl Fn(&Choice) -> bool) {
        let ids: Vec<_> = self.choices.iter().filter(|(_, c)| matches(c)).map(|(id, _)| *id).collect();
        for id in ids {
            if let Some(choice) = self.choices.get_mut(&id) {
                choice.end(FinishReason::Abort, None);
            }
            self.remove(id);
        }
    }

    fn report(&mut self) {
        self.report_memory();
        let stats = self.scheduler.stats();
        self.shared.metrics.scheduler(&SchedulerGauges {
            running: stats.running,
            waiting: stats.waiting,
            pages_used: stats.pages_used,
            pages_cached: stats.pages_cached,
            pages_free: stats.pages_free,
        });
    }
}

fn spec(
    request: &GenerateRequest,
    (id, group, index): (SeqId, u64, usize),
    pin: Option<Pin>,
) -> SequenceSpec {
    let demand: KvDemand = request.plan.kv_demand();
    let shareable_len = pin.map_or(usize::MAX, |pin| pin.shareable_len);
    SequenceSpec {
        id,
        group,
        prompt: Arc::clone(&request.prompt),
        images: request.images.iter().map(span).collect(),
        max_tokens: request.max_tokens,
        demand: demand.shared_at_most(shareable_len),
        plan_key: request.plan.key().served_with(pin.map(|pin| pin.blocks)),
        cache_salt: request.cache_salt,
        // One choice scores the prompt; its siblings share what it computed.
        bypass_prefix_cache: request.prompt_logprobs && index == 0,
    }
}

fn span(image: &PromptImage) -> ImageSpan {
    let digest = image.embeddings.digest();
    let word = |i: usize| u32::from_le_bytes(std::array::from_fn(|byte| digest[4 * i + byte]));
    ImageSpan {
        start: image.start,
        num_tokens: image.embeddings.num_tokens(),
        digest: std::array::from_fn(word),
    }
}

fn refusal(error: AddError) -> Error {
    match error {
        AddError::NeverFits { needed, total } => Error::new(
            ErrorKind::InvalidArgument,
            format!(
                "the request needs {needed} KV pages and the server has {total}: shorten the prompt or lower max_tokens"
            ),
        ),
        AddError::EmptyPrompt => Error::invalid("prompt", "the prompt has no tokens"),
        AddError::DuplicateId => Error::new(ErrorKind::Internal, "a sequence id was given twice"),
    }
}

/// The next command; `None` when every sender is gone. A client that was just answered often asks again at once, and a
/// core that has halted takes longer to come back than its request takes: so the thread looks for a while before it
/// sleeps, and lets others run meanwhile.
fn next(commands: &mut mpsc::Receiver<Command>) -> Option<Command> {
    let begin = Instant::now();
    while begin.elapsed() < LINGER {
        match commands.try_recv() {
            Ok(command) => return Some(command),
            Err(TryRecvError::Disconnected) => return None,
            Err(TryRecvError::Empty) => std::thread::yield_now(),
        }
    }
    commands.blocking_recv()
}
