//! The engine: one OS thread that owns the model, its KV cache and the scheduler.
//!
//! Loop: take commands → drop what was cancelled → schedule → batch → forward → sample → commit →
//! send events. Only this thread touches the device.

mod detokenizer;
mod energy;
mod events;
mod memory;
mod run;
mod sampler;
mod sequence;
mod step;
mod stop;
mod stream;
#[cfg(test)]
mod tests;
mod verbosity;

pub use events::{EventReceiver, EventSender};
pub use stream::{Guard, Record, TokenStream};

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use model_zoo::models::CausalLm;
use model_zoo::tokenizer::Tokenizer;
use tokio::sync::{mpsc, oneshot, watch};

use crate::energy::Energy;
use crate::error::{Error, ErrorKind};
use crate::memory::{MemoryStatus, MemoryTargets, OnShrink};
use crate::request::GenerateRequest;
use crate::scheduler::SchedulerConfig;
use crate::telemetry::Metrics;
use crate::verbosity::{Detector, VerbosityConfig};

/// Commands that wait for the engine thread at most: it takes all of them before every step.
const COMMANDS: usize = 1024;

/// What the front of the server asks of the engine thread.
#[derive(Debug)]
pub enum Command {
    /// Run a request and send its events here. A closed receiver cancels it.
    Generate {
        /// The validated request.
        request: GenerateRequest,
        /// Where its events go. Sending never blocks.
        events: EventSender,
    },
    /// End the request of this id with [`crate::request::FinishReason::Abort`].
    Abort {
        /// The request's id.
        id: String,
    },
    /// Change memory budgets.
    SetMemory {
        /// The new ones.
        targets: MemoryTargets,
        /// The number of the change, which is under way then, or why it is refused.
        reply: oneshot::Sender<Result<u64, Error>>,
    },
    /// End every request with [`crate::request::FinishReason::Abort`] and the thread with them.
    Stop,
}

/// What the engine thread owns or uses.
pub struct EngineParts {
    /// The model.
    pub model: Box<dyn CausalLm>,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Limits of the scheduler and the size of the KV pool.
    pub scheduler: SchedulerConfig,
    /// Bytes of weights that the front of the server holds beside the model's: an image encoder's.
    pub encoder_bytes: u64,
    /// The budgets by which the model was loaded and the pool was sized.
    pub memory: MemoryTargets,
    /// What becomes of requests that lose weights while they run.
    pub on_shrink: OnShrink,
    /// What its energy is metered by.
    pub energy: Arc<Energy>,
    /// How rows that do not end are found.
    pub verbosity: VerbosityConfig,
    /// Where it reports.
    pub metrics: Arc<Metrics>,
}

/// Starts the engine thread. It ends when every handle is gone and all work is done, or by
/// [`EngineHandle::stop`].
///
/// # Errors
/// When the operating system refuses a thread, or memory for the KV pool.
pub fn start(parts: EngineParts) -> io::Result<(EngineHandle, JoinHandle<()>)> {
    let (commands, receiver) = mpsc::channel(COMMANDS);
    let kv_layout = parts.model.dims().kv_layout(parts.scheduler.block_size);
    let shared = sequence::Shared {
        tokenizer: parts.tokenizer,
        metrics: parts.metrics,
        energy: parts.energy,
        kv_layout,
    };
    let engine = run::Engine::new(parts.model, (&parts.scheduler, parts.memory), shared);
    let mut engine = engine.map_err(io::Error::other)?;
    engine.hold_beside(parts.encoder_bytes);
    engine.budgets.on_shrink = parts.on_shrink;
    engine.detector = Detector::new(parts.verbosity);
    let memory = engine.budgets.watch();
    let thread = std::thread::Builder::new().name("engine".into()).spawn(move || engine.run(receiver))?;
    Ok((EngineHandle { commands, memory }, thread))
}

/// The sending end of the engine thread's command channel. Cheap to clone.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    memory: watch::Receiver<MemoryStatus>,
}

impl EngineHandle {
    /// Hands a request to the engine and returns its events, which hold `guard` until they are dropped.
    /// Never waits.
    ///
    /// # Errors
    /// [`ErrorKind::Overloaded`] when the command channel is full, [`ErrorKind::Unavailable`] when the
    /// engine has stopped.
    pub fn generate(&self, request: GenerateRequest, guard: Guard) -> Result<TokenStream, Error> {
        let (sender, receiver) = events::channel();
        let command = Command::Generate { request, events: sender };
        self.send(command)?;
        Ok(TokenStream::new(receiver, guard))
    }

    /// Asks the engine to abort a request. Unknown ids are ignored by the engine.
    ///
    /// # Errors
    /// As [`EngineHandle::generate`].
    pub fn abort(&self, id: &str) -> Result<(), Error> {
        self.send(Command::Abort { id: id.to_owned() })
    }

    /// What the engine holds, as of its last turn.
    pub fn memory(&self) -> MemoryStatus {
        self.memory.borrow().clone()
    }

    /// Asks the engine for other budgets and returns the number of the change, which is under way then.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a budget that the model cannot be served with; else as
    /// [`EngineHandle::generate`].
    pub async fn set_memory(&self, targets: MemoryTargets) -> Result<u64, Error> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::SetMemory { targets, reply })?;
        answer.await.map_err(|_| Error::new(ErrorKind::Unavailable, "the server is stopping"))?
    }

    /// Waits until the change of this number is done, has failed, or was replaced by a later one.
    pub async fn memory_settled(&self, change: u64) {
        let mut memory = self.memory.clone();
        let done = |status: &MemoryStatus| {
            status.change > change || (status.change == change && status.is_settled())
        };
        // An error means that the engine has stopped: nothing more will happen.
        let _ = memory.wait_for(done).await;
    }

    /// Whether the engine thread runs.
    pub fn is_running(&self) -> bool {
        !self.commands.is_closed()
    }

    /// Ends the engine thread and every request that is still running. Waits for room in the channel.
    pub async fn stop(&self) {
        // An error means that the thread has ended already.
        let _ = self.commands.send(Command::Stop).await;
    }

    fn send(&self, command: Command) -> Result<(), Error> {
        self.commands.try_send(command).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => {
                Error::new(ErrorKind::Overloaded, "the server's queue is full; retry later")
            }
            mpsc::error::TrySendError::Closed(_) => {
                Error::new(ErrorKind::Unavailable, "the server is stopping")
            }
        })
    }
}
