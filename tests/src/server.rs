//! The real server with the real model, in this process, on ports that the system chose.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;
use rheostat::config::Config;
use rheostat::config::options::Options;
use rheostat::reload::Reload;
use rheostat::run::{Control, Listeners, NamedModel, run_controlled};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    options: Options,
}

/// A running server. Stop it with [`TestServer::stop`].
pub struct TestServer {
    /// Address of the HTTP server.
    pub http: SocketAddr,
    /// Address of the gRPC server.
    pub grpc: SocketAddr,
    shutdown: oneshot::Sender<()>,
    running: JoinHandle<()>,
}

/// The default model's file, pulled by the catalogue if it is not on this machine.
///
/// # Panics
/// When it cannot be pulled.
pub fn real_model() -> PathBuf {
    use model_zoo::catalogue::{Catalogue, PullOptions, default_cache, pull};
    let catalogue = Catalogue::builtin().expect("the catalogue is well-formed");
    let entry = catalogue.get("smollm2-135m").expect("the default model is in the catalogue");
    let options = PullOptions { cache: default_cache(), ..PullOptions::default() };
    pull(entry, &options).expect("the default model can be pulled")
}

impl TestServer {
    /// Starts the server as `rheostat serve` does, with these flags besides.
    ///
    /// # Panics
    /// When it cannot start.
    pub async fn start(flags: &[&str]) -> Self {
        Self::start_over(flags, |config| rheostat::cli::open_model(config).expect("the model loads")).await
    }

    /// The same over what `open` makes of the configuration.
    ///
    /// # Panics
    /// As [`TestServer::start`].
    pub async fn start_over(
        flags: &[&str],
        open: impl FnOnce(&Config) -> NamedModel + Send + 'static,
    ) -> Self {
        let ports = ["test", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
        let options = Flags::parse_from(ports.iter().chain(flags)).options;
        let reload = Reload::new(options.clone(), None).expect("signals can be handled");
        let config = Config::resolve(options).expect("the flags are valid");
        let listeners = Listeners::bind(&config).await.expect("port 0 is free");
        let http = listeners.http.local_addr().expect("bound");
        let grpc = listeners.grpc.local_addr().expect("bound");
        let for_model = config.clone();
        let model =
            tokio::task::spawn_blocking(move || open(&for_model)).await.expect("loading does not panic");
        let (shutdown, stopped) = oneshot::channel();
        let running = tokio::spawn(async move {
            let stopped = async {
                let _ = stopped.await;
            };
            let control = Control { shutdown: stopped, reload: Some(reload) };
            run_controlled(config, model, listeners, control).await.expect("the server runs");
        });
        Self { http, grpc, shutdown, running }
    }

    /// Stops it as a signal does, and waits for it to end.
    ///
    /// # Panics
    /// When it ended with an error.
    pub async fn stop(self) {
        let _ = self.shutdown.send(());
        self.running.await.expect("the server ends cleanly");
    }
}
