//! Structured logs on standard error, as text for people or JSON for machines.

use std::io::IsTerminal;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One readable line an event.
    #[default]
    Text,
    /// One JSON object an event.
    Json,
}

/// The filter of the installed subscriber, which can be replaced.
#[derive(Debug, Clone)]
pub struct LogFilter(reload::Handle<EnvFilter, Registry>);

impl LogFilter {
    /// Filters by `filter` from now on.
    ///
    /// # Errors
    /// A sentence, when the subscriber is gone.
    pub fn set(&self, filter: EnvFilter) -> Result<(), String> {
        self.0.reload(filter).map_err(|e| format!("the log filter cannot be replaced: {e}"))
    }
}

/// Reads a level (`info`) or directives (`info,rheostat::http=debug`).
///
/// # Errors
/// A sentence, when `filter` is neither.
pub fn parse(filter: &str) -> Result<EnvFilter, String> {
    EnvFilter::try_new(filter).map_err(|e| format!("log.filter {filter:?} is not a filter: {e}"))
}

/// Installs the process's log subscriber; only `main` calls this. `filter` is what [`parse`] reads.
///
/// # Errors
/// A sentence, when `filter` cannot be parsed or a subscriber is installed already.
pub fn init(filter: &str, format: LogFormat) -> Result<LogFilter, String> {
    let (filter, handle) = reload::Layer::new(parse(filter)?);
    let registry = tracing_subscriber::registry().with(filter);
    // Colours are for people: files and pipes get none.
    let lines = fmt::layer().with_ansi(std::io::stderr().is_terminal()).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => registry.with(lines.with_target(false)).try_init(),
        LogFormat::Json => registry.with(lines.json().flatten_event(true)).try_init(),
    }
    .map_err(|e| format!("logging cannot start: {e}"))?;
    Ok(LogFilter(handle))
}
