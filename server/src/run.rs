//! A running server: both front ends over one service, until a shutdown.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use model_zoo::compression::Offer;
use model_zoo::loader::LoadedModel;
use model_zoo::models::ModelDims;
use model_zoo::tokenizer::Tokenizer;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::auth::KeyRing;
use crate::config::Config;
use crate::energy::{Energy, EnergyConfig, meter};
use crate::governor::{Front, Governor, PowerGauge};
use crate::memory::of;
use crate::reload::Reload;
use crate::scheduler::SchedulerConfig;
use crate::service::{ModelInfo, Service, ServiceParts};
use crate::telemetry::{Metrics, ServedModel};
use crate::traces::Tracer;
use crate::transport::{Tls, TlsError, Transport};
use crate::{grpc, http};

/// How often histogram samples are folded into buckets.
const UPKEEP: Duration = Duration::from_secs(5);

/// Why the server cannot run, as a sentence.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// An address cannot be listened on.
    #[error("cannot listen on {address} ({what}): {source}")]
    Bind {
        /// The address asked for.
        address: SocketAddr,
        /// Which server wanted it.
        what: &'static str,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// The model cannot be served with this configuration.
    #[error("{0}")]
    Model(String),
    /// The certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The collector's address is none.
    #[error("{0}")]
    Traces(String),
    /// The operating system refused a resource.
    #[error("the server cannot start: {0}")]
    Io(#[from] std::io::Error),
    /// The gRPC server failed.
    #[error(transparent)]
    Grpc(#[from] grpc::ServeError),
}

/// Open sockets of both servers.
#[derive(Debug)]
pub struct Listeners {
    /// HTTP.
    pub http: TcpListener,
    /// gRPC.
    pub grpc: TcpListener,
}

impl Listeners {
    /// Listens where `config` says.
    ///
    /// # Errors
    /// [`RunError::Bind`].
    pub async fn bind(config: &Config) -> Result<Self, RunError> {
        let bind = async |address: SocketAddr, what| {
            TcpListener::bind(address).await.map_err(|source| RunError::Bind { address, what, source })
        };
        Ok(Self { http: bind(config.http.address, "http").await?, grpc: bind(config.grpc, "grpc").await? })
    }
}

/// A model ready to be served under a name.
pub struct NamedModel {
    /// What clients call it.
    pub name: String,
    /// The loaded model.
    pub loaded: LoadedModel,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its calibration, and the operator's profiles.
    pub offer: Offer,
}

/// What acts on a running server from outside.
pub struct Control<F> {
    /// Completes when it is to stop.
    pub shutdown: F,
    /// Reads the configuration again.
    pub reload: Option<Reload>,
}

/// Serves `model` until `shutdown`, as [`run_controlled`] without reloads.
///
/// # Errors
/// As [`run_controlled`].
pub async fn run(
    config: Config,
    model: NamedModel,
    listeners: Listeners,
    shutdown: impl Future<Output = ()>,
) -> Result<(), RunError> {
    run_controlled(config, model, listeners, Control { shutdown, reload: None }).await
}

/// Serves `model` until `shutdown`, then lets running requests finish up to the configured deadline.
///
/// # Errors
/// [`RunError`]: the model does not fit the configuration, or a server failed.
pub async fn run_controlled(
    mut config: Config,
    model: NamedModel,
    listeners: Listeners,
    control: Control<impl Future<Output = ()>>,
) -> Result<(), RunError> {
    if let Some(room) = model.loaded.model.kv_room().filter(|_| config.engine.kv_is_default) {
        tracing::info!(room, "memory.kv is not set: the KV pool takes what the device has left");
        config.engine.kv_bytes = room;
    }
    let scheduler = scheduler_config(&config, model.loaded.model.dims())?;
    let tls = config.tls.clone().map(Tls::load).transpose()?.map(Arc::new);
    let (service, metrics, energy) = start_service(&config, model, scheduler)?;
    let metering = energy.source().map(|_| tokio::spawn(energy.run()));
    let governing = service.governor().map(|governor| tokio::spawn(Arc::clone(governor).run()));
    let tracer =
        config.traces.as_ref().map_or(Ok(Tracer::off()), Tracer::export).map_err(RunError::Traces)?;
    let (stop, stopping) = watch::channel(false);
    let stopped = |mut stopping: watch::Receiver<bool>| async move {
        // An error means that the sender is gone: the server stops then, too.
        let _ = stopping.wait_for(|stop| *stop).await;
    };
    let transport = |listener| {
        Transport::new(listener, config.http.max_connections, tls.clone())
            .with_write_timeout(config.http.write_timeout)
    };
    let http = tokio::spawn(http::serve(
        transport(listeners.http),
        http::AppState::new(service.clone(), Arc::clone(&metrics), tracer.clone(), &config.http),
        stopped(stopping.clone()),
    ));
    let grpc = tokio::spawn(grpc::serve(
        transport(listeners.grpc),
        service.clone(),
        (Arc::clone(&metrics), tracer.clone()),
        stopped(stopping),
    ));
    let reload = control.reload.map(|reload| {
        tokio::spawn(
            reload.with_tls(tls.clone()).run((service.clone(), Arc::clone(&metrics)), config.clone()),
        )
    });
    let upkeep = tokio::spawn(async move {
        let mut ticks = tokio::time::interval(UPKEEP);
        loop {
            ticks.tick().await;
            metrics.upkeep();
        }
    });
    control.shutdown.await;
    if let Some(reload) = reload {
        reload.abort();
    }
    tracing::info!(deadline_s = config.drain.as_secs(), "stopping: running requests may finish");
    // Until the last request has ended both servers go on: `/ready` says no, probes and scrapes are answered,
    // and who asks for more is told to come back.
    service.shutdown(config.drain).await;
    stop.send_replace(true);
    upkeep.abort();
    for task in governing.into_iter().chain(metering) {
        task.abort();
    }
    // Every request has ended; what is left are idle connections and last bytes on their way.
    let grace = Duration::from_secs(2);
    let _ = tokio::time::timeout(grace, http).await;
    let grpc = tokio::time::timeout(grace, grpc).await;
    let _ = tokio::task::spawn_blocking(move || tracer.shutdown()).await;
    match grpc {
        Ok(Ok(result)) => result.map_err(RunError::from),
        _ => Ok(()),
    }
}

fn start_service(
    config: &Config,
    model: NamedModel,
    scheduler: SchedulerConfig,
) -> Result<(Service, Arc<Metrics>, Arc<Energy>), RunError> {
    let dims = model.loaded.model.dims().clone();
    let max_model_len = model_len(config, &dims, &scheduler)?;
    let served = ServedModel {
        model: model.name.clone(),
        architecture: dims.architecture.clone(),
        block_size: scheduler.block_size,
        num_pages: scheduler.num_pages,
    };
    let metrics = Arc::new(Metrics::new(&served, config.metrics_compat));
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let on_gpu = model.loaded.model.is_on_gpu();
    let device = if on_gpu { meter::Device::Gpu } else { meter::Device::Cpu };
    let meter = meter::open(&config.energy, device);
    // The image encoder gets half of the threads, one at least.
    let threads = config.engine.threads.get();
    let encoder_share = threads.div_ceil(2) as f64 / threads as f64;
    let metering = EnergyConfig { encoder_share, ..config.energy.clone() };
    let energy = Arc::new(Energy::new(meter, &metering, &metrics));
    if config.governor.policy.cap_watts.is_some() && energy.source().is_none() {
        tracing::warn!("power.cap_watts has no effect: there is no energy meter");
    }
    let governor = governor(config, &model.offer, (&dims, &metrics, &energy));
    let most_model_len = config.engine.max_model_len.unwrap_or(dims.max_context).min(dims.max_context);
    let info = ModelInfo {
        name: model.name,
        created,
        dims,
        block_size: scheduler.block_size,
        most_model_len,
        max_model_len: max_model_len.into(),
        offer: model.offer.into(),
    };
    let service = Service::start(ServiceParts {
        model: model.loaded.model,
        vision: model.loaded.vision,
        tokenizer: Arc::new(model.tokenizer),
        info,
        scheduler,
        memory: config.memory(),
        on_shrink: config.engine.on_shrink,
        limits: config.limits.clone(),
        images: config.images.clone(),
        keys: Arc::new(KeyRing::new(&config.keys, Arc::clone(&metrics))),
        energy: Arc::clone(&energy),
        verbosity: config.verbosity,
        metrics: Arc::clone(&metrics),
        governor,
    })?;
    Ok((service, metrics, energy))
}

/// The governor, where the model has a front to choose from.
fn governor(
    config: &Config,
    offer: &Offer,
    (dims, metrics, energy): (&ModelDims, &Arc<Metrics>, &Arc<Energy>),
) -> Option<Arc<Governor>> {
    let front = Front::of(offer, dims, config.governor.max_perplexity_increase)?;
    let points: Vec<_> = front.points().iter().map(|point| point.name.as_str()).collect();
    tracing::info!(?points, "profile auto chooses between these");
    let energy = Arc::clone(energy);
    let power: PowerGauge = Box::new(move || energy.watts());
    Some(Arc::new(Governor::new(front, config.governor.policy, Some(power), Arc::clone(metrics))))
}

/// The scheduler's limits, with as many pages as the KV budget holds.
fn scheduler_config(config: &Config, dims: &ModelDims) -> Result<SchedulerConfig, RunError> {
    let engine = &config.engine;
    let page_bytes = dims.kv_layout(engine.block_size).page_bytes();
    let num_pages = usize::try_from(engine.kv_bytes).unwrap_or(usize::MAX) / page_bytes;
    if num_pages < dims.num_layers {
        let least = page_bytes * dims.num_layers;
        return Err(RunError::Model(format!(
            "memory.kv is {}; this model needs at least {}, for one block of tokens",
            of(engine.kv_bytes),
            of(least as u64)
        )));
    }
    Ok(SchedulerConfig {
        max_num_batched_tokens: engine.max_num_batched_tokens,
        max_num_seqs: engine.max_num_seqs,
        block_size: engine.block_size,
        num_pages,
        prefix_caching: engine.prefix_caching,
    })
}

/// The longest sequence: as configured, else the model's context or what the KV pool holds.
fn model_len(config: &Config, dims: &ModelDims, scheduler: &SchedulerConfig) -> Result<usize, RunError> {
    let pool = scheduler.num_pages / dims.num_layers * scheduler.block_size;
    let most = dims.max_context.min(pool);
    match config.engine.max_model_len {
        Some(asked) if asked > dims.max_context => Err(RunError::Model(format!(
            "engine.max_model_len is {asked}; the model's context is {} tokens",
            dims.max_context
        ))),
        Some(asked) if asked > pool => Err(RunError::Model(format!(
            "engine.max_model_len is {asked}; memory.kv holds {pool} tokens: raise it or lower the length"
        ))),
        Some(asked) => Ok(asked),
        None => Ok(most),
    }
}
