//! What the front ends see of everything behind them. `http` and `grpc` convert, call this, convert back.

mod memory;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use model_zoo::compression::{Offer, Plan};
use model_zoo::models::{CausalLm, ModelDims};
use model_zoo::tokenizer::Tokenizer;
use model_zoo::vision::Vision;

use crate::admission::{Admission, Limits};
use crate::auth::{Client, KeyRing};
use crate::current::Current;
use crate::energy::Energy;
use crate::engine::{self, EngineHandle, EngineParts, Record, TokenStream};
use crate::error::{Error, ErrorKind};
use crate::governor::Governor;
use crate::images::{ImageLimits, Images};
use crate::memory::{MemoryTargets, OnShrink};
use crate::request::{Caller, RawRequest};
use crate::scheduler::SchedulerConfig;
use crate::telemetry::Metrics;
use crate::verbosity::VerbosityConfig;

/// The served model as its clients may know it.
#[derive(Debug, Clone)]
pub struct ModelInfo {
    /// The name that clients ask for.
    pub name: String,
    /// Seconds since the epoch at which it was loaded.
    pub created: u64,
    /// Sizes.
    pub dims: ModelDims,
    /// KV slots in a page.
    pub block_size: usize,
    /// Longest sequence that could be served with KV enough: the model's, or the operator's limit.
    pub most_model_len: usize,
    /// Longest sequence served now, prompt and output together: it follows the KV budget.
    pub max_model_len: Current<usize>,
    /// What of compression requests may name.
    pub offer: Current<Offer>,
}

impl ModelInfo {
    /// Longest sequence served now. Ask once a request: it may change.
    pub fn max_model_len(&self) -> usize {
        *self.max_model_len.get()
    }

    /// Fails unless `name` is this model's or empty.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn check_name(&self, name: &str) -> Result<(), Error> {
        if name.is_empty() || name == self.name {
            return Ok(());
        }
        Err(Error {
            kind: ErrorKind::NotFound,
            message: format!("the model `{name}` does not exist; this server serves `{}`", self.name),
            param: Some("model".into()),
        })
    }
}

/// An admitted request: its events, and what a response has to repeat.
#[derive(Debug)]
pub struct Admitted {
    /// The request's id, given or made.
    pub id: String,
    /// The prompt's tokens, for `echo`.
    pub prompt: Arc<[u32]>,
    /// What of the model it runs.
    pub plan: Arc<Plan>,
    /// The profile that the plan comes from.
    pub profile: Arc<str>,
    /// Its events. Dropping them cancels the request.
    pub stream: TokenStream,
}

/// What a service is made of.
pub struct ServiceParts {
    /// The loaded model.
    pub model: Box<dyn CausalLm>,
    /// What it needs to see, if it can.
    pub vision: Option<Vision>,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// What clients may know of it.
    pub info: ModelInfo,
    /// Limits of the scheduler and the size of the KV pool.
    pub scheduler: SchedulerConfig,
    /// The budgets by which the model was loaded and the pool was sized.
    pub memory: MemoryTargets,
    /// What becomes of requests that lose weights while they run.
    pub on_shrink: OnShrink,
    /// Limits of requests.
    pub limits: Limits,
    /// Limits of images.
    pub images: ImageLimits,
    /// Who may ask.
    pub keys: Arc<KeyRing>,
    /// What its energy is metered by.
    pub energy: Arc<Energy>,
    /// How rows that do not end are found.
    pub verbosity: VerbosityConfig,
    /// Where everything reports.
    pub metrics: Arc<Metrics>,
    /// Chooses for `auto` requests, where the model is calibrated.
    pub governor: Option<Arc<Governor>>,
}

/// The service behind both front ends. Cheap to clone.
#[derive(Clone)]
pub struct Service {
    engine: EngineHandle,
    tokenizer: Arc<Tokenizer>,
    model: Arc<ModelInfo>,
    admission: Arc<Admission>,
    keys: Arc<KeyRing>,
    draining: Arc<AtomicBool>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
    governor: Option<Arc<Governor>>,
}

impl Service {
    /// Starts the engine thread over `parts`.
    ///
    /// # Errors
    /// When the operating system refuses a thread.
    pub fn start(parts: ServiceParts) -> std::io::Result<Self> {
        let ServiceParts {
            model,
            vision,
            tokenizer,
            info,
            scheduler,
            memory,
            on_shrink,
            limits,
            images,
            keys,
            energy,
            verbosity,
            metrics,
            governor,
        } = parts;
        let encoder_bytes = vision.as_ref().map_or(0, |vision| vision.encoder.weight_bytes()) as u64;
        let info = Arc::new(info);
        let images = Images::new(vision, images, Arc::clone(&metrics), Arc::clone(&energy));
        let admission = Admission::new(Arc::clone(&info), Arc::clone(&tokenizer), images, limits)
            .governed_by(governor.clone())
            .metered(energy.source().is_some());
        let parts = EngineParts {
            model,
            encoder_bytes,
            tokenizer: Arc::clone(&tokenizer),
            scheduler,
            memory,
            on_shrink,
            energy,
            verbosity,
            metrics,
        };
        let (engine, thread) = engine::start(parts)?;
        Ok(Self {
            engine,
            tokenizer,
            model: info,
            admission: Arc::new(admission),
            keys,
            draining: Arc::default(),
            thread: Arc::new(Mutex::new(Some(thread))),
            governor,
        })
    }

    /// Validates, tokenizes and admits a request, and starts it.
    ///
    /// # Errors
    /// The client's mistakes as [`ErrorKind::InvalidArgument`] or [`ErrorKind::NotFound`] (model), a
    /// client over its own limits as [`ErrorKind::RateLimited`], a full queue as
    /// [`ErrorKind::Overloaded`], a stopping server as [`ErrorKind::Unavailable`].
    pub async fn generate(&self, request: RawRequest) -> Result<Admitted, Error> {
        if !self.is_ready() {
            return Err(Error::new(ErrorKind::Unavailable, "the server is stopping"));
        }
        let begin = Instant::now();
        let span = request.caller.trace.generation(&request, &self.model.name);
        let client = request.caller.client.clone();
        let admitted = self.admission.admit(request).await;
        if let (Some(span), Err(error)) = (&span, &admitted) {
            span.failed(error);
        }
        let (mut request, guard) = admitted?;
        if let Some(span) = &span {
            span.admitted(begin, &request);
        }
        request.span = span;
        let (id, prompt) = (request.id.clone(), Arc::clone(&request.prompt));
        let (plan, profile) = (Arc::clone(&request.plan), Arc::clone(&request.profile));
        let record = Record::of(&request, client.as_ref().map(Client::name));
        let stream = self.engine.generate(request, guard)?.recorded(record);
        Ok(Admitted { id, prompt, plan, profile, stream })
    }

    /// Aborts the live request of this id: its choices end with what they have. A client may abort its own,
    /// an operator all.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when no live request that the caller may touch has it.
    pub fn abort(&self, id: &str, caller: &Caller) -> Result<(), Error> {
        self.admission.check_live(id, caller)?;
        self.engine.abort(id)
    }

    /// Bounds requests by `limits` from now on.
    pub fn set_limits(&self, limits: Limits) {
        self.admission.set_limits(limits);
    }

    /// Whether the server takes requests.
    pub fn is_ready(&self) -> bool {
        !self.draining.load(Ordering::Relaxed) && self.engine.is_running()
    }

    /// Takes no more requests from now on.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Takes no more requests, waits for the running ones up to `deadline`, ends what is left, and joins
    /// the engine thread.
    pub async fn shutdown(&self, deadline: Duration) {
        self.drain();
        let drained = tokio::time::timeout(deadline, self.admission.live().drained()).await;
        if drained.is_err() {
            tracing::warn!(?deadline, "requests were still running at the deadline; ending them");
        }
        self.engine.stop().await;
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // The thread ends after its current step.
            let _ = tokio::task::spawn_blocking(move || thread.join()).await;
        }
    }

    /// Who may ask.
    pub fn keys(&self) -> &KeyRing {
        &self.keys
    }

    /// The model's tokenizer. Encode long texts off the async threads.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// The served model.
    pub fn model(&self) -> &ModelInfo {
        &self.model
    }

    /// What chooses for `auto` requests, where the model is calibrated.
    pub fn governor(&self) -> Option<&Arc<Governor>> {
        self.governor.as_ref()
    }

    /// Fails unless `name` is the served model or empty.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn check_model(&self, name: &str) -> Result<(), Error> {
        self.model.check_name(name)
    }
}
