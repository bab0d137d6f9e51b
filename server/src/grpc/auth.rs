//! API keys on gRPC: `authorization: Bearer KEY` in a call's metadata.

use std::pin::Pin;
use std::task::{Context, Poll};

use http::header::AUTHORIZATION;
use http::{Request, Response};
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

use crate::auth::{Access, Client};
use crate::request::Caller;
use crate::traces::Trace;

/// What the method at `path` asks of its caller: probes nothing, everything else, reflection too, a key.
fn access(path: &str) -> Access {
    match path {
        "/inference.GRPCInferenceService/ServerLive" | "/inference.GRPCInferenceService/ServerReady" => {
            Access::Open
        }
        _ if path.starts_with("/grpc.health.v1.Health/") => Access::Open,
        _ if path.starts_with("/rheostat.v1.AdminService/") => Access::Admin,
        _ => Access::Client,
    }
}

/// Who a call comes from, as [`Keys`] left it in the call's extensions.
pub(super) fn caller(extensions: &tonic::Extensions) -> Caller {
    Caller {
        client: extensions.get::<Client>().cloned(),
        trace: extensions.get::<Trace>().cloned().unwrap_or_default(),
    }
}

/// Wraps services in [`Keys`].
#[derive(Clone)]
pub(super) struct KeyLayer {
    service: crate::service::Service,
}

impl KeyLayer {
    /// Asks the key ring of `service`.
    pub(super) fn new(service: crate::service::Service) -> Self {
        Self { service }
    }
}

impl<S> Layer<S> for KeyLayer {
    type Service = Keys<S>;

    fn layer(&self, inner: S) -> Keys<S> {
        Keys { inner, service: self.service.clone() }
    }
}

/// A service that only calls with a known key reach. Their [`Client`] is in the extensions of the call and of
/// its response.
#[derive(Clone)]
pub(super) struct Keys<S> {
    inner: S,
    service: crate::service::Service,
}

impl<S> Service<Request<Body>> for Keys<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Error: Send + 'static,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let authorization = request.headers().get(AUTHORIZATION).map(|value| value.as_bytes());
        match self.service.keys().authorize(access(request.uri().path()), authorization) {
            Ok(None) => Box::pin(self.inner.call(request)),
            Ok(Some(client)) => {
                request.extensions_mut().insert(client.clone());
                let response = self.inner.call(request);
                Box::pin(async move {
                    let mut response = response.await?;
                    response.extensions_mut().insert(client);
                    Ok(response)
                })
            }
            Err(error) => Box::pin(std::future::ready(Ok(Status::from(error).into_http()))),
        }
    }
}
