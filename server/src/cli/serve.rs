//! `rheostat serve`

use crate::config::Config;
use crate::config::options::Options;
use crate::reload::Reload;
use crate::run::{Control, Listeners, run_controlled};
use crate::telemetry::logs::LogFilter;
use crate::{shutdown, telemetry};

/// Serves until a signal.
pub(super) fn main(options: Options) -> Result<(), String> {
    let config = Config::resolve(options.clone()).map_err(|e| e.to_string())?;
    let log = telemetry::logs::init(&config.log_filter, config.log_format)?;
    allow_connections(config.http.max_connections);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| format!("the async runtime cannot start: {e}"))?;
    runtime.block_on(serve(config, (options, log)))
}

/// Lets the process open as many files as it may. Systems start processes with a limit of some thousand, which is
/// less than the connections that the configuration allows, and each is a file.
fn allow_connections(max_connections: usize) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    let open = if raised.is_ok() { limit.maximum } else { limit.current };
    // Of both servers; the model's files and what else is open are few.
    let needed = 2 * max_connections as u64;
    if let Some(open) = open.filter(|open| *open < needed) {
        tracing::warn!(
            open,
            needed,
            "connections above the limit of open files wait: raise it (LimitNOFILE, ulimit -Hn)"
        );
    }
}

async fn serve(config: Config, (flags, log): (Options, LogFilter)) -> Result<(), String> {
    let unhandled = |e| format!("signals cannot be handled: {e}");
    let shutdown = shutdown::signal().map_err(unhandled)?;
    let reload = Some(Reload::new(flags, Some(log)).map_err(unhandled)?);
    let listeners = Listeners::bind(&config).await.map_err(|e| e.to_string())?;
    tracing::info!(?config, "configuration");
    let for_model = config.clone();
    let model = tokio::task::spawn_blocking(move || super::open_model(&for_model))
        .await
        .map_err(|e| format!("loading the model failed: {e}"))??;
    if let (Ok(http), Ok(grpc)) = (listeners.http.local_addr(), listeners.grpc.local_addr()) {
        // Standard output, so that whoever starts the process can read where it listens (port 0).
        println!("serving {} on http://{http} and grpc://{grpc}", model.name);
    }
    run_controlled(config, model, listeners, Control { shutdown, reload }).await.map_err(|e| e.to_string())
}
