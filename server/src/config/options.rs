//! What can be configured. Each key is a flag, an environment variable and a key of the TOML file; its
//! comment is the help text.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use model_zoo::compression::CompressionOptions;

use super::bytes::ByteSize;
use super::device::DeviceChoice;
use super::hosts::HostList;
use super::keys::KeyOptions;
use crate::energy::MeterChoice;
use crate::memory::OnShrink;
use crate::telemetry::MetricsCompat;
use crate::telemetry::logs::LogFormat;
use crate::traces::TraceConfig;
use crate::transport::TlsConfig;
use crate::verbosity::VerbosityMode;

/// A group of keys: a struct of optional values that clap and serde fill, and that can be laid over
/// another.
macro_rules! section {
    ($(#[$meta:meta])* $name:ident { $($(#[doc = $doc:literal])+ $field:ident: $ty:ty = $flag:literal, $env:literal;)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Default, clap::Args, serde::Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct $name {
            $($(#[doc = $doc])+ #[arg(id = $flag, long = $flag, env = $env)] pub $field: Option<$ty>,)*
        }

        impl $name {
            /// Values of `self` where it has them, else of `below`.
            fn over(self, below: Self) -> Self {
                Self { $($field: self.$field.or(below.$field),)* }
            }
        }
    };
}

section! {
    /// `[server]`
    ServerOptions {
        /// Model to serve: a name of the catalogue, a GGUF file, or a Hugging Face folder [default: smollm2-135m]
        model: String = "model", "RHEOSTAT_MODEL";
        /// Folder for pulled models [default: the user's cache folder]
        cache: PathBuf = "cache", "RHEOSTAT_CACHE";
        /// TOML file with further catalogue entries
        catalogue: PathBuf = "catalogue", "RHEOSTAT_CATALOGUE";
        /// Seconds that running requests may go on after a stop signal [default: 30]
        drain_seconds: u64 = "drain-seconds", "RHEOSTAT_DRAIN_SECONDS";
    }
}

section! {
    /// `[http]`
    HttpOptions {
        /// Address of the HTTP server [default: 127.0.0.1:8080]
        address: SocketAddr = "http", "RHEOSTAT_HTTP";
        /// Largest request body [default: 4MiB]
        max_body: ByteSize = "http-max-body", "RHEOSTAT_HTTP_MAX_BODY";
        /// Connections at once, of each of the two servers [default: 10240]
        max_connections: usize = "http-max-connections", "RHEOSTAT_HTTP_MAX_CONNECTIONS";
        /// Ask for an API key on /metrics too, once there are keys [default: false]
        metrics_need_key: bool = "http-metrics-need-key", "RHEOSTAT_HTTP_METRICS_NEED_KEY";
        /// Seconds that a client may take to send a request's headers [default: 15]
        header_timeout_seconds: u64 = "http-header-timeout-seconds", "RHEOSTAT_HTTP_HEADER_TIMEOUT_SECONDS";
        /// Seconds that a client may leave what is sent to it unread, of HTTP and gRPC [default: 60]
        write_timeout_seconds: u64 = "http-write-timeout-seconds", "RHEOSTAT_HTTP_WRITE_TIMEOUT_SECONDS";
    }
}

section! {
    /// `[grpc]`
    GrpcOptions {
        /// Address of the gRPC server [default: 127.0.0.1:50051]
        address: SocketAddr = "grpc", "RHEOSTAT_GRPC";
    }
}

section! {
    /// `[tls]`
    TlsOptions {
        /// Certificate chain of both servers, a PEM file; without it they serve plain text
        cert: PathBuf = "tls-cert", "RHEOSTAT_TLS_CERT";
        /// Private key of the certificate, a PEM file
        key: PathBuf = "tls-key", "RHEOSTAT_TLS_KEY";
        /// Roots of clients' certificates, a PEM file; when it is set, clients need one
        client_ca: PathBuf = "tls-client-ca", "RHEOSTAT_TLS_CLIENT_CA";
    }
}

impl TlsOptions {
    /// All of it or nothing.
    pub(super) fn config(self) -> Result<Option<TlsConfig>, String> {
        match (self.cert, self.key, self.client_ca) {
            (Some(cert), Some(key), client_ca) => Ok(Some(TlsConfig { cert, key, client_ca })),
            (None, None, None) => Ok(None),
            _ => Err("tls needs both cert and key, with or without client_ca".into()),
        }
    }
}

section! {
    /// `[engine]`
    EngineOptions {
        /// What the model runs on: cpu, cuda, cuda:N (the GPU of that index), or auto (a GPU where there is one) [default: cpu]
        device: DeviceChoice = "device", "RHEOSTAT_DEVICE";
        /// Compute threads [default: all cores]
        threads: NonZeroUsize = "threads", "RHEOSTAT_THREADS";
        /// Sequences that run at once [default: 256]
        max_num_seqs: usize = "max-num-seqs", "RHEOSTAT_MAX_NUM_SEQS";
        /// Tokens that a step runs, over prefill chunks and decode rows [default: 512]
        max_num_batched_tokens: usize = "max-num-batched-tokens", "RHEOSTAT_MAX_NUM_BATCHED_TOKENS";
        /// Longest sequence, prompt and output together [default: the model's context, or what the KV pool holds]
        max_model_len: usize = "max-model-len", "RHEOSTAT_MAX_MODEL_LEN";
        /// KV slots in a page, a multiple of 16 [default: 16]
        block_size: usize = "block-size", "RHEOSTAT_BLOCK_SIZE";
        /// Reuse the KV of equal prefixes [default: true]
        prefix_caching: bool = "prefix-caching", "RHEOSTAT_PREFIX_CACHING";
    }
}

section! {
    /// `[memory]`
    MemoryOptions {
        /// Size of the KV pool [default: a quarter of the machine's memory, 1GiB at most; on a GPU what is left there]
        kv: ByteSize = "memory-kv", "RHEOSTAT_MEMORY_KV";
        /// What the weights may take, of a model that can be held in part [default: all of it]
        weights: ByteSize = "memory-weights", "RHEOSTAT_MEMORY_WEIGHTS";
        /// Requests that lose weights while they run: `continue` with the KV that they have, or `recompute` it
        /// [default: continue]
        on_shrink: OnShrink = "memory-on-shrink", "RHEOSTAT_MEMORY_ON_SHRINK";
    }
}

section! {
    /// `[limits]`
    LimitOptions {
        /// Requests that are queued or running at once; more are refused with 503 [default: 512]
        max_concurrent_requests: usize = "max-concurrent-requests", "RHEOSTAT_MAX_CONCURRENT_REQUESTS";
        /// Requests of those that wait for their first step; more are refused with 503 [default: no limit of its own]
        max_queued_requests: usize = "max-queued-requests", "RHEOSTAT_MAX_QUEUED_REQUESTS";
        /// Choices (`n`) of a request [default: 128]
        max_n: usize = "max-n", "RHEOSTAT_MAX_N";
        /// Tokens that all choices of a request may generate together [default: 1048576]
        max_total_tokens: usize = "max-total-tokens", "RHEOSTAT_MAX_TOTAL_TOKENS";
        /// Stop texts of a request [default: 16]
        max_stop_texts: usize = "max-stop-texts", "RHEOSTAT_MAX_STOP_TEXTS";
        /// Alternatives reported per token [default: 20]
        max_logprobs: usize = "max-logprobs", "RHEOSTAT_MAX_LOGPROBS";
        /// Bytes of a prompt as written, messages and template arguments together [default: 1MiB]
        max_prompt_bytes: ByteSize = "max-prompt-bytes", "RHEOSTAT_MAX_PROMPT_BYTES";
    }
}

section! {
    /// `[images]`
    ImageOptions {
        /// Fetch images by URL, from the hosts of images.allow_hosts [default: false]
        fetch: bool = "images-fetch", "RHEOSTAT_IMAGES_FETCH";
        /// Hosts to fetch from: host, host:port, *.domain, or * for every public one
        allow_hosts: HostList = "images-allow-hosts", "RHEOSTAT_IMAGES_ALLOW_HOSTS";
        /// Largest file of an image [default: 8MiB]
        max_bytes: ByteSize = "images-max-bytes", "RHEOSTAT_IMAGES_MAX_BYTES";
        /// Pixels of an image [default: 16777216]
        max_pixels: u64 = "images-max-pixels", "RHEOSTAT_IMAGES_MAX_PIXELS";
        /// Images of a request [default: 8]
        max_images: usize = "images-max-images", "RHEOSTAT_IMAGES_MAX_IMAGES";
        /// Seconds that fetching an image may take [default: 10]
        timeout_seconds: u64 = "images-timeout-seconds", "RHEOSTAT_IMAGES_TIMEOUT_SECONDS";
        /// Embeddings kept for images that are shown again [default: 64MiB]
        cache: ByteSize = "images-cache", "RHEOSTAT_IMAGES_CACHE";
        /// Embeddings that live requests hold; more wait [default: 256MiB]
        live: ByteSize = "images-live", "RHEOSTAT_IMAGES_LIVE";
    }
}

section! {
    /// `[metrics]`
    MetricsOptions {
        /// Repeat the core metrics under another server's names [default: vllm]
        compat: MetricsCompat = "metrics-compat", "RHEOSTAT_METRICS_COMPAT";
    }
}

section! {
    /// `[telemetry]`
    TelemetryOptions {
        /// OTLP collector (gRPC) that gets traces, http://HOST:4317; without it there are none
        otlp_endpoint: String = "otlp-endpoint", "RHEOSTAT_OTLP_ENDPOINT";
        /// Share of the traces that begin here to record, 0 to 1; a caller's decision is respected [default: 1]
        sample_ratio: f64 = "trace-sample-ratio", "RHEOSTAT_TRACE_SAMPLE_RATIO";
    }
}

impl TelemetryOptions {
    /// Where traces go, if anywhere.
    pub(super) fn config(self) -> Result<Option<TraceConfig>, String> {
        let sample_ratio = self.sample_ratio.unwrap_or(1.0);
        if !(0.0..=1.0).contains(&sample_ratio) {
            return Err(format!("telemetry.sample_ratio is {sample_ratio}; it must be between 0 and 1"));
        }
        let Some(endpoint) = self.otlp_endpoint else { return Ok(None) };
        if !endpoint.starts_with("http://") {
            return Err(format!(
                "telemetry.otlp_endpoint is {endpoint:?}; it must be http://HOST:PORT of a collector's gRPC port"
            ));
        }
        Ok(Some(TraceConfig { endpoint, sample_ratio }))
    }
}

section! {
    /// `[log]`
    LogOptions {
        /// Level, or directives such as `info,rheostat::http=debug` [default: info]
        filter: String = "log", "RHEOSTAT_LOG";
        /// Layout of log lines [default: text]
        format: LogFormat = "log-format", "RHEOSTAT_LOG_FORMAT";
    }
}

section! {
    /// `[compression]`
    CompressionKeys {
        /// Artefact of `rheostat calibrate` for the model [default: the one beside the weights, else the shipped one]
        calibration: PathBuf = "calibration", "RHEOSTAT_CALIBRATION";
    }
}

section! {
    /// `[targets]`: what the governor holds by choosing the profile of `auto` requests.
    TargetOptions {
        /// Milliseconds to the first token [default: 2000]
        ttft_ms: f64 = "target-ttft-ms", "RHEOSTAT_TARGET_TTFT_MS";
        /// Milliseconds per further token [default: 100]
        tpot_ms: f64 = "target-tpot-ms", "RHEOSTAT_TARGET_TPOT_MS";
        /// The most that `auto` may lose: perplexity over dense less 1, as calibration measured it [default: 0.08]
        max_perplexity_increase: f64 = "target-max-perplexity-increase", "RHEOSTAT_TARGET_MAX_PERPLEXITY_INCREASE";
        /// Seconds after a move of the governor in which it does not move [default: 2]
        hold_seconds: f64 = "target-hold-seconds", "RHEOSTAT_TARGET_HOLD_SECONDS";
        /// Seconds of low load before the governor goes a step back towards the whole model [default: 10]
        calm_seconds: f64 = "target-calm-seconds", "RHEOSTAT_TARGET_CALM_SECONDS";
    }
}

section! {
    /// `[power]`
    PowerOptions {
        /// Watts that the governor keeps the server below, where a meter is [default: no cap]
        cap_watts: f64 = "power-cap-watts", "RHEOSTAT_POWER_CAP_WATTS";
    }
}

section! {
    /// `[energy]`
    EnergyOptions {
        /// What joules are measured by: the counter of the device that runs the model (auto), else an estimate from CPU time [default: auto]
        meter: MeterChoice = "energy-meter", "RHEOSTAT_ENERGY_METER";
        /// Watts that the estimate takes for a busy core [default: 8]
        watts_per_core: f64 = "energy-watts-per-core", "RHEOSTAT_ENERGY_WATTS_PER_CORE";
        /// Watts that are drawn when nothing runs, and charged to nobody [default: measured; the estimate takes 10]
        idle_watts: f64 = "energy-idle-watts", "RHEOSTAT_ENERGY_IDLE_WATTS";
        /// Least milliseconds between two readings of the meter [default: 100 for nvml, 5 for rapl, 0 for the estimate]
        period_ms: u64 = "energy-period-ms", "RHEOSTAT_ENERGY_PERIOD_MS";
        /// GPU that nvml is asked about, by its number in nvidia-smi [default: 0]
        gpu: u32 = "energy-gpu", "RHEOSTAT_ENERGY_GPU";
        /// Folder of the processors' counters [default: /sys/class/powercap]
        powercap: PathBuf = "energy-powercap", "RHEOSTAT_ENERGY_POWERCAP";
    }
}

section! {
    /// `[verbosity]`: sequences that do not end when others of their kind do.
    VerbosityOptions {
        /// Look for them, and count them (report) or lower their priority, raise their end and end them (act) [default: off]
        mode: VerbosityMode = "verbosity", "RHEOSTAT_VERBOSITY";
        /// Tokens below which no output is one of them [default: 256]
        min_tokens: usize = "verbosity-min-tokens", "RHEOSTAT_VERBOSITY_MIN_TOKENS";
        /// Tokens from a flag to the first change of its logits; it ends after three times as many [default: 64]
        grace_tokens: usize = "verbosity-grace-tokens", "RHEOSTAT_VERBOSITY_GRACE_TOKENS";
    }
}

/// Every key, from one source or several.
#[derive(Debug, Clone, Default, clap::Args, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// TOML file with any of these keys
    #[arg(long, env = "RHEOSTAT_CONFIG")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub server: ServerOptions,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub http: HttpOptions,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub grpc: GrpcOptions,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub tls: TlsOptions,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub engine: EngineOptions,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub memory: MemoryOptions,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub limits: LimitOptions,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub images: ImageOptions,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub metrics: MetricsOptions,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub telemetry: TelemetryOptions,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub log: LogOptions,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub compression: CompressionKeys,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub targets: TargetOptions,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub power: PowerOptions,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub energy: EnergyOptions,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub verbosity: VerbosityOptions,
    /// `[profiles.NAME]`: the operator's own compression profiles, in the file alone.
    #[arg(skip)]
    pub profiles: BTreeMap<String, CompressionOptions>,
    /// `[[keys]]`: API keys, in the file alone.
    #[arg(skip)]
    pub keys: Vec<KeyOptions>,
}

impl Options {
    /// Reads a TOML file's text.
    ///
    /// # Errors
    /// The line and what is wrong with it; of an unknown key, the keys that there are.
    pub fn from_toml(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|e| e.to_string())
    }

    /// Values of `self` where it has them, else of `below`.
    #[must_use]
    pub fn over(self, below: Self) -> Self {
        Self {
            config: self.config.or(below.config),
            server: self.server.over(below.server),
            http: self.http.over(below.http),
            grpc: self.grpc.over(below.grpc),
            tls: self.tls.over(below.tls),
            engine: self.engine.over(below.engine),
            memory: self.memory.over(below.memory),
            limits: self.limits.over(below.limits),
            images: self.images.over(below.images),
            metrics: self.metrics.over(below.metrics),
            telemetry: self.telemetry.over(below.telemetry),
            log: self.log.over(below.log),
            compression: self.compression.over(below.compression),
            targets: self.targets.over(below.targets),
            power: self.power.over(below.power),
            energy: self.energy.over(below.energy),
            verbosity: self.verbosity.over(below.verbosity),
            profiles: if self.profiles.is_empty() { below.profiles } else { self.profiles },
            keys: if self.keys.is_empty() { below.keys } else { self.keys },
        }
    }
}
