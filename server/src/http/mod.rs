//! The HTTP front end: OpenAI's API as its clients use it, and the operators' endpoints.
//!
//! One file an endpoint family; each converts the request, calls [`Service`], converts back. JSON is known
//! nowhere else. A handler's future is dropped when its client goes away, and with it the
//! [`crate::engine::TokenStream`], which cancels the request.

mod access;
mod admin;
mod auth;
mod chat;
mod completions;
mod error;
mod generation;
mod json;
mod memory;
mod models;
mod openapi;
mod server;
mod sse;
#[cfg(test)]
mod tests;
mod tokens;
mod types;

pub use server::serve;

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{Method, Uri};
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use tower_http::catch_panic::CatchPanicLayer;

use crate::config::HttpConfig;
use crate::error::{Error, ErrorKind};
use crate::service::Service;
use crate::telemetry::Metrics;
use crate::traces::Tracer;

/// What every handler sees.
#[derive(Clone)]
pub struct AppState(Arc<Parts>);

/// Behind one pointer: every layer and handler of a request has a clone of its own.
pub struct Parts {
    service: Service,
    metrics: Arc<Metrics>,
    tracer: Tracer,
    limits: HttpConfig,
}

impl AppState {
    /// State over a running service.
    pub fn new(service: Service, metrics: Arc<Metrics>, tracer: Tracer, limits: &HttpConfig) -> Self {
        Self(Arc::new(Parts { service, metrics, tracer, limits: limits.clone() }))
    }
}

impl std::ops::Deref for AppState {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}

/// Every route.
fn router(state: AppState) -> Router {
    let limit = DefaultBodyLimit::max(state.limits.max_body);
    Router::new()
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::retrieve))
        .route("/v1/completions", post(completions::create))
        .route("/v1/chat/completions", post(chat::create))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/tokenizer_info", get(tokens::info))
        .route("/health", get(admin::health))
        .route("/ready", get(admin::ready))
        .route("/metrics", get(admin::metrics))
        .route("/version", get(admin::version))
        .route("/openapi.json", get(openapi::document))
        .route("/admin/requests/{id}/abort", post(admin::abort))
        .route("/admin/memory", get(memory::show).put(memory::change))
        .method_not_allowed_fallback(method_not_allowed)
        .fallback(not_found)
        .layer(limit)
        .layer(from_fn_with_state(state.clone(), auth::check))
        .layer(from_fn_with_state(state.clone(), access::record))
        .layer(CatchPanicLayer::custom(panicked))
        .with_state(state)
}

async fn not_found(uri: Uri) -> Error {
    Error::new(ErrorKind::NotFound, format!("there is no endpoint {}; see /openapi.json", uri.path()))
}

async fn method_not_allowed(method: Method, uri: Uri) -> Error {
    Error::new(
        ErrorKind::MethodNotAllowed,
        format!("{method} is not allowed on {}; see /openapi.json", uri.path()),
    )
}

/// A defect of ours costs its own request only.
fn panicked(_: Box<dyn std::any::Any + Send>) -> axum::response::Response {
    use axum::response::IntoResponse;
    tracing::error!("a handler panicked");
    Error::new(ErrorKind::Internal, "the request could not be served").into_response()
}
