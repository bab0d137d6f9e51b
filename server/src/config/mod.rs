//! The operator's configuration, in two steps: [`options`] are what flags, environment and file say;
//! [`Config`] is what follows from them, validated, without options.

pub mod bytes;
pub mod device;
mod energy;
mod governor;
pub mod hosts;
pub mod keys;
pub mod options;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::ByteSize;
use device::DeviceChoice;
pub use governor::GovernorConfig;
use hosts::HostList;
use model_zoo::compression::CompressionOptions;
use options::{EngineOptions, ImageOptions, LimitOptions, MemoryOptions, Options};

use crate::admission::Limits;
use crate::auth::KeyConfig;
use crate::energy::EnergyConfig;
use crate::governor::AUTO;
use crate::images::ImageLimits;
use crate::memory::{MemoryTargets, OnShrink, machine_memory};
use crate::telemetry::MetricsCompat;
use crate::telemetry::logs::LogFormat;
use crate::traces::TraceConfig;
use crate::transport::{TlsConfig, WRITE_TIMEOUT};
use crate::verbosity::VerbosityConfig;

/// A configuration that the server can run with.
#[derive(Debug, Clone)]
pub struct Config {
    /// A catalogue name, a GGUF file or a Hugging Face folder.
    pub model: String,
    /// Where pulled models lie.
    pub cache: Option<PathBuf>,
    /// An operator's catalogue, beside the built-in one.
    pub catalogue: Option<PathBuf>,
    /// HTTP front end.
    pub http: HttpConfig,
    /// Where gRPC listens.
    pub grpc: SocketAddr,
    /// Certificates of both servers; `None` serves without TLS.
    pub tls: Option<TlsConfig>,
    /// API keys; without any, everybody may ask everything.
    pub keys: Vec<KeyConfig>,
    /// The engine.
    pub engine: EngineConfig,
    /// Bounds on requests.
    pub limits: Limits,
    /// Bounds on images, and where they may come from.
    pub images: ImageLimits,
    /// How long running requests may go on after a stop signal.
    pub drain: Duration,
    /// A calibration artefact other than the one that is found by itself.
    pub calibration: Option<PathBuf>,
    /// The operator's compression profiles.
    pub profiles: BTreeMap<String, CompressionOptions>,
    /// What the governor holds.
    pub governor: GovernorConfig,
    /// How energy is metered.
    pub energy: EnergyConfig,
    /// How outputs that do not end are found.
    pub verbosity: VerbosityConfig,
    /// Other servers' metric names.
    pub metrics_compat: MetricsCompat,
    /// Where traces go; `None` makes none.
    pub traces: Option<TraceConfig>,
    /// Log filter, as `RUST_LOG` spells it.
    pub log_filter: String,
    /// Log layout.
    pub log_format: LogFormat,
}

/// The HTTP front end.
#[derive(Debug, Clone)]
pub struct HttpConfig {
    /// Where it listens.
    pub address: SocketAddr,
    /// Bytes of a request's body at most.
    pub max_body: usize,
    /// Connections at once, of this front end and of gRPC each.
    pub max_connections: usize,
    /// `/metrics` needs an API key like everything else.
    pub metrics_need_key: bool,
    /// How long a client may take to send a request's headers.
    pub header_timeout: Duration,
    /// How long a client may leave what is sent to it unread; of gRPC too.
    pub write_timeout: Duration,
}

/// The engine.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// What the model runs on.
    pub device: DeviceChoice,
    /// Compute threads.
    pub threads: std::num::NonZeroUsize,
    /// Sequences that run at once.
    pub max_num_seqs: usize,
    /// Tokens of a step.
    pub max_num_batched_tokens: usize,
    /// Longest sequence; `None` means the model's context, or what the KV pool holds.
    pub max_model_len: Option<usize>,
    /// KV slots in a page.
    pub block_size: usize,
    /// Reuse the KV of equal prefixes.
    pub prefix_caching: bool,
    /// Bytes of the KV pool.
    pub kv_bytes: u64,
    /// Nobody set `kv_bytes`: on a GPU the pool takes what is left there.
    pub kv_is_default: bool,
    /// Bytes of the weights at most; `None` means all of them.
    pub weight_bytes: Option<u64>,
    /// What becomes of requests that lose weights while they run.
    pub on_shrink: OnShrink,
}

/// A configuration that cannot be used, as a sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

impl Config {
    /// Reads the file that `flags` (command line and environment) name, lets flags win over it, and
    /// validates the result.
    ///
    /// # Errors
    /// The first mistake, with where it is and what would be right.
    pub fn resolve(flags: Options) -> Result<Self, ConfigError> {
        let file = match &flags.config {
            Some(path) => read(path)?,
            None => Options::default(),
        };
        Self::validate(flags.over(file))
    }

    fn validate(options: Options) -> Result<Self, ConfigError> {
        let Options {
            server,
            http,
            grpc,
            tls,
            engine,
            memory,
            limits,
            images,
            metrics,
            telemetry,
            log,
            compression,
            targets,
            power,
            energy,
            verbosity,
            profiles,
            keys,
            config: _,
        } = options;
        let config = Self {
            model: server.model.unwrap_or_else(|| "smollm2-135m".into()),
            cache: server.cache,
            catalogue: server.catalogue,
            http: HttpConfig {
                address: http.address.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 8080))),
                max_body: http.max_body.map_or(4 << 20, |size| size.bytes() as usize),
                max_connections: http.max_connections.unwrap_or(10_240),
                metrics_need_key: http.metrics_need_key.unwrap_or(false),
                header_timeout: Duration::from_secs(http.header_timeout_seconds.unwrap_or(15)),
                write_timeout: http.write_timeout_seconds.map_or(WRITE_TIMEOUT, Duration::from_secs),
            },
            grpc: grpc.address.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 50051))),
            tls: tls.config().map_err(ConfigError)?,
            keys: keys::validate(keys).map_err(ConfigError)?,
            engine: engine_config(engine, memory),
            limits: request_limits(limits),
            images: image_limits(images),
            drain: Duration::from_secs(server.drain_seconds.unwrap_or(30)),
            calibration: compression.calibration,
            profiles,
            governor: GovernorConfig::of(&targets, &power),
            energy: energy::config(energy).map_err(ConfigError)?,
            verbosity: energy::verbosity(verbosity),
            metrics_compat: metrics.compat.unwrap_or_default(),
            traces: telemetry.config().map_err(ConfigError)?,
            log_filter: log.filter.unwrap_or_else(|| "info".into()),
            log_format: log.format.unwrap_or_default(),
        };
        config.check()?;
        config.governor.check().map_err(ConfigError)?;
        Ok(config)
    }

    /// The same with the KV pool that `started` ended up with, where neither says what it is to be: on a GPU it is
    /// what was left there.
    #[must_use]
    pub fn sized_as(mut self, started: &Self) -> Self {
        if self.engine.kv_is_default && started.engine.kv_is_default {
            self.engine.kv_bytes = started.engine.kv_bytes;
        }
        self
    }

    /// The memory budgets.
    pub fn memory(&self) -> MemoryTargets {
        MemoryTargets { weights: self.engine.weight_bytes, kv: Some(self.engine.kv_bytes) }
    }

    /// One sentence a rule.
    fn check(&self) -> Result<(), ConfigError> {
        let engine = &self.engine;
        let rules = [
            (
                engine.block_size == 0 || !engine.block_size.is_multiple_of(16),
                format!("engine.block_size is {}; it must be a multiple of 16", engine.block_size),
            ),
            (engine.max_num_seqs == 0, "engine.max_num_seqs must be at least 1".into()),
            (engine.max_num_batched_tokens == 0, "engine.max_num_batched_tokens must be at least 1".into()),
            (engine.max_model_len == Some(0), "engine.max_model_len must be at least 1".into()),
            (
                self.limits.max_concurrent_requests == 0,
                "limits.max_concurrent_requests must be at least 1".into(),
            ),
            (
                self.limits.max_queued_requests == 0,
                "limits.max_queued_requests must be at least 1: every request waits for a step".into(),
            ),
            (self.http.write_timeout.is_zero(), "http.write_timeout_seconds must be at least 1".into()),
            (self.limits.max_n == 0, "limits.max_n must be at least 1".into()),
            (self.http.max_body < 1024, "http.max_body must be at least 1KiB".into()),
            (self.http.max_connections == 0, "http.max_connections must be at least 1".into()),
            (
                self.http.address == self.grpc && self.grpc.port() != 0,
                format!("http.address and grpc.address are both {}; they must differ", self.grpc),
            ),
            (
                self.images.fetch && self.images.allow_hosts.is_empty(),
                "images.fetch is on and images.allow_hosts is empty; name the hosts that may be fetched from, or \"*\"".into(),
            ),
            (self.images.max_images == 0, "images.max_images must be at least 1".into()),
            (
                !(1..=1 << 28).contains(&self.images.max_pixels),
                format!("images.max_pixels is {}; it must be from 1 to {}", self.images.max_pixels, 1u64 << 28),
            ),
            (
                self.profiles.contains_key(AUTO),
                format!("profiles.{AUTO}: the name is the governor's; give the profile another"),
            ),
            (self.model.is_empty(), "model is empty; name one of the catalogue or give a path".into()),
        ];
        match rules.into_iter().find(|(broken, _)| *broken) {
            Some((_, sentence)) => Err(ConfigError(sentence)),
            None => Ok(()),
        }
    }
}

fn request_limits(options: LimitOptions) -> Limits {
    let defaults = Limits::default();
    Limits {
        max_concurrent_requests: options.max_concurrent_requests.unwrap_or(defaults.max_concurrent_requests),
        max_queued_requests: options.max_queued_requests.unwrap_or(defaults.max_queued_requests),
        max_n: options.max_n.unwrap_or(defaults.max_n),
        max_total_tokens: options.max_total_tokens.unwrap_or(defaults.max_total_tokens),
        max_stop_texts: options.max_stop_texts.unwrap_or(defaults.max_stop_texts),
        max_logprobs: options.max_logprobs.unwrap_or(defaults.max_logprobs),
        max_prompt_bytes: options
            .max_prompt_bytes
            .map_or(defaults.max_prompt_bytes, |size| size.bytes() as usize),
        ..defaults
    }
}

fn engine_config(engine: EngineOptions, memory: MemoryOptions) -> EngineConfig {
    EngineConfig {
        device: engine.device.unwrap_or_default(),
        threads: engine.threads.unwrap_or_else(cores),
        max_num_seqs: engine.max_num_seqs.unwrap_or(256),
        max_num_batched_tokens: engine.max_num_batched_tokens.unwrap_or(512),
        max_model_len: engine.max_model_len,
        block_size: engine.block_size.unwrap_or(16),
        prefix_caching: engine.prefix_caching.unwrap_or(true),
        kv_bytes: memory.kv.map_or_else(default_kv, ByteSize::bytes),
        kv_is_default: memory.kv.is_none(),
        weight_bytes: memory.weights.map(ByteSize::bytes),
        on_shrink: memory.on_shrink.unwrap_or_default(),
    }
}

fn image_limits(options: ImageOptions) -> ImageLimits {
    let defaults = ImageLimits::default();
    let size = |given: Option<ByteSize>, default| given.map_or(default, |size| size.bytes() as usize);
    ImageLimits {
        fetch: options.fetch.unwrap_or(defaults.fetch),
        allow_hosts: options.allow_hosts.map_or(defaults.allow_hosts, HostList::into_hosts),
        max_bytes: size(options.max_bytes, defaults.max_bytes),
        max_pixels: options.max_pixels.unwrap_or(defaults.max_pixels),
        max_images: options.max_images.unwrap_or(defaults.max_images),
        timeout: options.timeout_seconds.map_or(defaults.timeout, Duration::from_secs),
        cache_bytes: size(options.cache, defaults.cache_bytes),
        live_bytes: size(options.live, defaults.live_bytes),
    }
}

fn read(path: &Path) -> Result<Options, ConfigError> {
    let fail = |what: String| ConfigError(format!("{}: {what}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|e| fail(e.to_string()))?;
    Options::from_toml(&text).map_err(fail)
}

fn cores() -> std::num::NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(std::num::NonZeroUsize::MIN)
}

/// A quarter of the machine's memory, 1 GiB at most. Pages that were never used cost nothing.
fn default_kv() -> u64 {
    const MOST: u64 = 1 << 30;
    machine_memory().map_or(MOST, |bytes| (bytes / 4).min(MOST))
}

#[cfg(test)]
mod tests;
