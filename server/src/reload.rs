//! SIGHUP: reads the configuration again and applies what can change on a running server.
//!
//! All of a new configuration is checked before any of it is applied; one that cannot be used is refused with a
//! line in the log, and the old one stays. What can change is the list [`APPLIERS`]; what cannot is named in the
//! log. Flags and the environment win over the file as at the start, and a key that was not edited is left as it
//! is, whatever the admin API has made of it since.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::signal::unix::{Signal, SignalKind, signal};

use model_zoo::compression::Offer;

use crate::cli::offer;
use crate::config::Config;
use crate::config::options::Options;
use crate::governor::Front;
use crate::memory::MemoryTargets;
use crate::service::Service;
use crate::telemetry::Metrics;
use crate::telemetry::logs::LogFilter;
use crate::transport::Tls;

/// How long a reload waits for memory budgets before it goes on; they are approached all the same.
const PATIENCE: Duration = Duration::from_secs(60);

/// Reloads at every SIGHUP.
#[derive(Debug)]
pub struct Reload {
    flags: Options,
    log: Option<LogFilter>,
    tls: Option<Arc<Tls>>,
    hangups: Signal,
}

/// What a reload can change.
#[derive(Clone)]
struct Running {
    service: Service,
    log: Option<LogFilter>,
    tls: Option<Arc<Tls>>,
}

/// A change that was checked and is still to be made.
type Change = BoxFuture<'static, Result<(), String>>;

/// Compares the old configuration with the new one and prepares what differs; `None` when nothing does.
type Applier = fn(&Running, &Config, &Config) -> Result<Option<Change>, String>;

/// What can change on a running server.
const APPLIERS: [(&str, Applier); 7] = [
    ("memory", memory),
    ("limits", limits),
    ("log.filter", log_filter),
    ("profiles", profiles),
    ("targets", targets),
    ("keys", keys),
    ("tls", tls),
];

type Key = fn(&Config) -> Box<dyn Debug>;

/// What needs a restart.
const FIXED: [(&str, Key); 17] = [
    ("server.model", |c| Box::new(c.model.clone())),
    ("server.cache", |c| Box::new(c.cache.clone())),
    ("server.catalogue", |c| Box::new(c.catalogue.clone())),
    ("server.drain_seconds", |c| Box::new(c.drain)),
    ("http", |c| Box::new(c.http.clone())),
    ("grpc.address", |c| Box::new(c.grpc)),
    ("engine.threads", |c| Box::new(c.engine.threads)),
    ("engine", |c| {
        let engine = &c.engine;
        let lengths = (engine.max_num_batched_tokens, engine.max_model_len, engine.block_size);
        Box::new((engine.device, engine.max_num_seqs, lengths, engine.prefix_caching))
    }),
    ("memory.on_shrink", |c| Box::new(c.engine.on_shrink)),
    ("energy", |c| Box::new(c.energy.clone())),
    ("verbosity", |c| Box::new(c.verbosity)),
    ("images", |c| Box::new(c.images.clone())),
    ("compression.calibration", |c| Box::new(c.calibration.clone())),
    ("metrics.compat", |c| Box::new(c.metrics_compat)),
    ("log.format", |c| Box::new(c.log_format)),
    ("tls", |c| Box::new(c.tls.clone())),
    ("telemetry", |c| Box::new(c.traces.clone())),
];

impl Reload {
    /// Takes SIGHUP over from here on: until [`Reload::run`] it is kept, and does not end the process. `flags` are
    /// the command line and the environment, which name the file.
    ///
    /// # Errors
    /// When the operating system refuses a signal handler.
    pub fn new(flags: Options, log: Option<LogFilter>) -> std::io::Result<Self> {
        Ok(Self { flags, log, tls: None, hangups: signal(SignalKind::hangup())? })
    }

    /// Reads the certificates of `tls` again, too.
    #[must_use]
    pub fn with_tls(self, tls: Option<Arc<Tls>>) -> Self {
        Self { tls, ..self }
    }

    /// Reloads `service`, which was started with `config`, at every signal. Never returns.
    pub async fn run(mut self, (service, metrics): (Service, Arc<Metrics>), config: Config) {
        let running = Running { service, log: self.log.take(), tls: self.tls.take() };
        let (started, mut current) = (config.clone(), config);
        while self.hangups.recv().await.is_some() {
            let applied = match self.read().await {
                Ok(new) => {
                    let new = new.sized_as(&started);
                    apply(&running, &current, &new).await.map(|()| new)
                }
                Err(error) => Err(error),
            };
            metrics.reloaded(applied.is_ok());
            let new = match applied {
                Ok(new) => new,
                Err(error) => {
                    tracing::error!(error, "the configuration was not reloaded; the old one stays");
                    continue;
                }
            };
            let differs =
                |(_, key): &&(&str, Key)| format!("{:?}", key(&started)) != format!("{:?}", key(&new));
            let fixed: Vec<&str> = FIXED.iter().filter(differs).map(|(name, _)| *name).collect();
            if !fixed.is_empty() {
                tracing::warn!(keys = fixed.join(", "), "these keys were edited and need a restart");
            }
            current = new;
        }
    }

    async fn read(&self) -> Result<Config, String> {
        let flags = self.flags.clone();
        let read = tokio::task::spawn_blocking(move || Config::resolve(flags)).await;
        read.map_err(|e| e.to_string())?.map_err(|e| e.to_string())
    }
}

/// Checks everything, then applies it.
///
/// # Errors
/// The first key that cannot be used, and why. Nothing was applied then.
async fn apply(running: &Running, old: &Config, new: &Config) -> Result<(), String> {
    let mut changes = Vec::new();
    for (name, applier) in APPLIERS {
        let change = applier(running, old, new).map_err(|e| format!("{name}: {e}"))?;
        changes.extend(change.map(|change| (name, change)));
    }
    let names: Vec<&str> = changes.iter().map(|(name, _)| *name).collect();
    let names = if names.is_empty() { "nothing".to_owned() } else { names.join(", ") };
    for (name, change) in changes {
        // Checked a moment ago: what fails now is the machine's (no memory, an unreadable block).
        if let Err(error) = change.await {
            tracing::error!(error, key = name, "a reloaded key could not be applied in full");
        }
    }
    tracing::info!(changed = names, "configuration reloaded");
    Ok(())
}

fn memory(running: &Running, old: &Config, new: &Config) -> Result<Option<Change>, String> {
    let (before, after) = (old.memory(), new.memory());
    if before == after {
        return Ok(None);
    }
    // A budget that is not set any more allows the whole model.
    let weights = after.weights.unwrap_or_else(|| running.service.memory().weights.most);
    let targets = MemoryTargets {
        weights: (before.weights != after.weights).then_some(weights),
        kv: after.kv.filter(|_| before.kv != after.kv),
    };
    running.service.check_memory(&targets).map_err(|e| e.to_string())?;
    let service = running.service.clone();
    Ok(Some(Box::pin(async move {
        service.set_memory(targets, PATIENCE).await.map(drop).map_err(|e| e.to_string())
    })))
}

fn limits(running: &Running, old: &Config, new: &Config) -> Result<Option<Change>, String> {
    if old.limits == new.limits {
        return Ok(None);
    }
    let (service, limits) = (running.service.clone(), new.limits.clone());
    Ok(Some(Box::pin(async move {
        service.set_limits(limits);
        Ok(())
    })))
}

/// Without a calibrated front there is no governor, and nothing that targets could change.
fn targets(running: &Running, old: &Config, new: &Config) -> Result<Option<Change>, String> {
    let Some(governor) = running.service.governor().filter(|_| old.governor != new.governor) else {
        return Ok(None);
    };
    let model = running.service.model();
    let front = Front::of(&model.offer.get(), &model.dims, new.governor.max_perplexity_increase);
    let (governor, policy) = (Arc::clone(governor), new.governor.policy);
    Ok(front.map(|front| -> Change {
        Box::pin(async move {
            governor.set(front, policy);
            Ok(())
        })
    }))
}

fn log_filter(running: &Running, old: &Config, new: &Config) -> Result<Option<Change>, String> {
    if old.log_filter == new.log_filter {
        return Ok(None);
    }
    let filter = crate::telemetry::logs::parse(&new.log_filter)?;
    let log = running.log.clone();
    Ok(Some(Box::pin(async move { log.map_or(Ok(()), |log| log.set(filter)) })))
}

fn keys(running: &Running, old: &Config, new: &Config) -> Result<Option<Change>, String> {
    if old.keys == new.keys {
        return Ok(None);
    }
    let (service, keys) = (running.service.clone(), new.keys.clone());
    Ok(Some(Box::pin(async move {
        service.keys().replace(&keys);
        Ok(())
    })))
}

/// The files may have changed where their names have not: they are read at every reload.
fn tls(running: &Running, _: &Config, _: &Config) -> Result<Option<Change>, String> {
    let Some(tls) = running.tls.clone() else { return Ok(None) };
    let fresh = tls.read().map_err(|e| e.to_string())?;
    Ok(Some(Box::pin(async move {
        tls.set(fresh);
        Ok(())
    })))
}

fn profiles(running: &Running, old: &Config, new: &Config) -> Result<Option<Change>, String> {
    if old.profiles == new.profiles {
        return Ok(None);
    }
    let model = running.service.model();
    let offer = Offer { profiles: new.profiles.clone(), ..(*model.offer.get()).clone() };
    let offer = offer::checked(offer, &model.dims)?;
    let current = model.offer.clone();
    Ok(Some(Box::pin(async move {
        current.set(offer);
        Ok(())
    })))
}
