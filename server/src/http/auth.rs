//! API keys on HTTP: `Authorization: Bearer KEY`.

use std::convert::Infallible;

use axum::extract::{FromRequestParts, Request, State};
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::AppState;
use crate::auth::{Access, Client};
use crate::request::Caller;
use crate::traces::Trace;

/// What the path asks of its caller. The router compares paths byte by byte, as this does; what is not
/// named here needs a key, also where there is no endpoint.
fn access(path: &str, metrics_need_key: bool) -> Access {
    match path {
        "/health" | "/ready" => Access::Open,
        "/metrics" if !metrics_need_key => Access::Open,
        _ if path.starts_with("/admin") => Access::Admin,
        _ => Access::Client,
    }
}

/// Lets a request through with its [`Client`] in the extensions of both request and response, or refuses it.
pub(super) async fn check(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    let access = access(request.uri().path(), state.limits.metrics_need_key);
    let authorization = request.headers().get(AUTHORIZATION).map(|value| value.as_bytes());
    match state.service.keys().authorize(access, authorization) {
        Ok(None) => next.run(request).await,
        Ok(Some(client)) => {
            request.extensions_mut().insert(client.clone());
            let mut response = next.run(request).await;
            response.extensions_mut().insert(client);
            response
        }
        Err(error) => error.into_response(),
    }
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        let extensions = &parts.extensions;
        Ok(Self {
            client: extensions.get::<Client>().cloned(),
            trace: extensions.get::<Trace>().cloned().unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_probes_are_open() {
        for path in ["/health", "/ready", "/metrics"] {
            assert_eq!(access(path, false), Access::Open, "{path}");
        }
        for path in ["/v1/models", "/health/", "//health", "/tokenize", "/version", "/nowhere", "*", ""] {
            assert_eq!(access(path, false), Access::Client, "{path}");
        }
        assert_eq!(access("/metrics", true), Access::Client);
        for path in ["/admin/memory", "/admin/requests/1/abort", "/administration"] {
            assert_eq!(access(path, false), Access::Admin, "{path}");
        }
    }
}
