//! Health, readiness, metrics, version, and aborting requests.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use serde_json::{Value, json};

use super::AppState;
use crate::error::{Error, ErrorKind};
use crate::request::Caller;

/// The process is alive.
#[utoipa::path(get, path = "/health", tag = "operations", responses((status = 200, description = "Alive")))]
pub(super) async fn health() -> StatusCode {
    StatusCode::OK
}

/// The server takes requests.
#[utoipa::path(get, path = "/ready", tag = "operations",
    responses((status = 200, description = "Taking requests"), (status = 503, description = "Stopping")))]
pub(super) async fn ready(State(state): State<AppState>) -> Result<Json<Value>, Error> {
    if state.service.is_ready() {
        return Ok(Json(json!({ "status": "ready", "model": state.service.model().name })));
    }
    Err(Error::new(ErrorKind::Unavailable, "the server is stopping"))
}

/// Metrics in Prometheus' text format.
#[utoipa::path(get, path = "/metrics", tag = "operations",
    responses((status = 200, description = "Prometheus text format", body = String)))]
pub(super) async fn metrics(State(state): State<AppState>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], state.metrics.render())
}

/// The server's version.
#[utoipa::path(get, path = "/version", tag = "operations", responses((status = 200, description = "Version")))]
pub(super) async fn version() -> Json<Value> {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}

/// Ends the request of this id (its `x-request-id`) with what it has so far.
#[utoipa::path(post, path = "/admin/requests/{id}/abort", tag = "operations",
    params(("id" = String, Path, description = "The request's id")),
    responses((status = 200, description = "It will end within a step"), (status = 404, description = "No such live request")))]
pub(super) async fn abort(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Json<Value>, Error> {
    state.service.abort(&id, &caller)?;
    Ok(Json(json!({ "id": id, "aborted": true })))
}
