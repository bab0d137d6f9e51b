//! The accept loop: HTTP/1.1 and HTTP/2, with bounds on headers.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::Version;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;

use super::AppState;
use crate::transport::{Transport, Unread};

const MAX_HEADERS: usize = 128;
const MAX_HEADER_BYTES: usize = 32 << 10;

/// Serves the API on `transport` until `shutdown`; then takes no new connections and returns when the
/// requests under way have ended.
pub async fn serve(transport: Transport, state: AppState, shutdown: impl Future<Output = ()>) {
    let builder = builder(state.limits.header_timeout);
    let unread = Unread::start(transport.write_timeout());
    let router = super::router(state).layer(from_fn_with_state(unread, end_unread));
    let graceful = GracefulShutdown::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let incoming = tokio::select! {
            incoming = transport.accept() => incoming,
            () = &mut shutdown => break,
        };
        let (builder, router, watcher) = (builder.clone(), router.clone(), graceful.watcher());
        tokio::spawn(async move {
            let served = match incoming.open().await {
                Ok(io) => {
                    let service = TowerToHyperService::new(router);
                    let connection = builder.serve_connection(TokioIo::new(io), service);
                    watcher.watch(connection.into_owned()).await.map_err(|e| e.to_string())
                }
                Err(error) => Err(error.to_string()),
            };
            // An error here is the client's: a reset, a timeout, a malformed request, a failed handshake.
            if let Err(error) = served {
                tracing::debug!(error, "a connection ended early");
            }
        });
    }
    drop(transport);
    graceful.shutdown().await;
}

/// Streams of HTTP/2 are ended when their clients do not read them; of HTTP/1 the connection is, which is the same.
async fn end_unread(State(unread): State<Arc<Unread>>, request: Request, next: Next) -> Response {
    let is_stream = request.version() == Version::HTTP_2;
    let response = next.run(request).await;
    if !is_stream {
        return response;
    }
    let error = || axum::Error::new(io::Error::from(io::ErrorKind::TimedOut));
    response.map(|body| Body::new(unread.watch(body, error)))
}

fn builder(header_timeout: Duration) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEADER_BYTES * 2);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(MAX_HEADER_BYTES as u32)
        .max_concurrent_streams(256)
        .keep_alive_interval(Duration::from_secs(30));
    builder
}
