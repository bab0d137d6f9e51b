//! One log line and one count a response.

use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::Response;

use super::AppState;

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

pub(super) async fn record(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let begin = Instant::now();
    let method = known_method(request.method());
    let route = request.extensions().get::<MatchedPath>().cloned();
    let route = route.as_ref().map_or("unknown", MatchedPath::as_str).to_owned();
    let response = next.run(request).await;
    let status = response.status().as_u16();
    state.metrics.http_request(&route, method, status);
    let seconds = begin.elapsed().as_secs_f32();
    tracing::info!(target: "rheostat::access", method, route, status, seconds, "http");
    response
}
