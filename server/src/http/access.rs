//! One log line and one count a response.

use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use tracing::Instrument;

use super::AppState;
use super::generation::{MAX_REQUEST_ID, REQUEST_ID};
use crate::auth::Client;
use crate::traces::{TRACEPARENT, Tracer};

/// Labels of a method that is none of the usual ones would be the client's to choose.
fn known_method(method: &axum::http::Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "POST" => "POST",
        "PUT" => "PUT",
        "DELETE" => "DELETE",
        "HEAD" => "HEAD",
        "OPTIONS" => "OPTIONS",
        _ => "other",
    }
}

/// Probes and scrapes come every few seconds: they make no spans.
fn is_probe(route: &str) -> bool {
    matches!(route, "/health" | "/ready" | "/metrics")
}

pub(super) async fn record(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    let begin = Instant::now();
    let method = known_method(request.method());
    let route = request.extensions().get::<MatchedPath>().cloned();
    let route = route.as_ref().map_or("unknown", MatchedPath::as_str).to_owned();
    let tracer = if is_probe(&route) { &Tracer::off() } else { &state.tracer };
    let trace = tracer.call(format!("{method} {route}"), request.headers());
    let id = make_id(request.headers_mut());
    request.extensions_mut().insert(trace.clone());
    let span = tracing::info_span!("request", trace_id = %trace.id(), request_id = id);
    let mut response = next.run(request).instrument(span).await;
    let status = response.status().as_u16();
    state.metrics.http_request(&route, method, status);
    trace.responded(method, &route, status);
    if let Ok(value) = HeaderValue::try_from(trace.traceparent()) {
        response.headers_mut().insert(TRACEPARENT, value);
    }
    let seconds = begin.elapsed().as_secs_f32();
    let key = response.extensions().get::<Client>().map(Client::name);
    let (trace_id, request_id) = (trace.id(), id);
    tracing::info!(target: "rheostat::access", method, route, status, seconds, key, %trace_id, request_id, "http");
    response
}

/// The request's id, for its log lines: the client's, or a fresh one that the handlers find as if it were. One
/// that is no valid id is left to them to refuse.
fn make_id(headers: &mut HeaderMap) -> String {
    if let Some(id) = headers.get(REQUEST_ID) {
        return id.to_str().unwrap_or_default().chars().take(MAX_REQUEST_ID).collect();
    }
    let id = uuid::Uuid::new_v4().simple().to_string();
    if let Ok(value) = HeaderValue::try_from(id.as_str()) {
        headers.insert(REQUEST_ID, value);
    }
    id
}
