//! What every call gets, whatever its service: its deadline, kept to the last message of a stream, and
//! its outcome, counted once.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderMap, Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::{Instant, Sleep};
use tonic::body::Body;
use tonic::codegen::Bytes;
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::Instrument;

use super::metadata::REQUEST_ID;
use crate::auth::Client;
use crate::telemetry::Metrics;
use crate::traces::{TRACEPARENT, Trace, Tracer};
use crate::transport::Unread;

const TIMEOUT_HEADER: &str = "grpc-timeout";
/// Label of a path that no service has: a client must not be able to make new ones.
const UNKNOWN: &str = "unknown";
const HEALTH: &str = "grpc.health.v1.Health/";

/// Wraps services in [`Calls`].
#[derive(Debug, Clone)]
pub(super) struct CallLayer {
    metrics: Arc<Metrics>,
    tracer: Tracer,
    methods: Arc<BTreeSet<String>>,
    unread: Arc<Unread>,
}

impl CallLayer {
    /// Counts into `metrics` by the paths in `methods`; `tracer` gives each call its trace, and `unread` ends streams
    /// that their clients do not read.
    pub(super) fn new(
        metrics: Arc<Metrics>,
        tracer: Tracer,
        methods: BTreeSet<String>,
        unread: Arc<Unread>,
    ) -> Self {
        Self { metrics, tracer, methods: Arc::new(methods), unread }
    }
}

impl<S> Layer<S> for CallLayer {
    type Service = Calls<S>;

    fn layer(&self, inner: S) -> Calls<S> {
        Calls { inner, layer: self.clone() }
    }
}

/// A service whose calls keep their deadlines and are counted.
#[derive(Debug, Clone)]
pub(super) struct Calls<S> {
    inner: S,
    layer: CallLayer,
}

impl<S> Service<Request<Body>> for Calls<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let outcome = self.layer.begin(&request);
        let deadline = timeout(request.headers()).map(|timeout| Instant::now() + timeout);
        request.extensions_mut().insert(outcome.trace.clone());
        let span = tracing::info_span!("request", trace_id = %outcome.trace.id());
        let unread = Arc::clone(&self.layer.unread);
        let response = self.inner.call(request).instrument(span);
        Box::pin(async move {
            let Some(deadline) = deadline else {
                return Ok(track(response.await?, (None, &unread), outcome));
            };
            match tokio::time::timeout_at(deadline, response).await {
                Ok(response) => Ok(track(response?, (Some(deadline), &unread), outcome)),
                Err(_) => Ok(track(deadline_exceeded().into_http(), (None, &unread), outcome)),
            }
        })
    }
}

/// The duration of a `grpc-timeout` header; one that breaks the protocol is as good as none.
fn timeout(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(TIMEOUT_HEADER)?.to_str().ok()?;
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

fn deadline_exceeded() -> Status {
    Status::deadline_exceeded("the call's deadline has passed")
}

fn unread_for_too_long() -> Status {
    Status::cancelled("nothing of what was sent was read for too long")
}

fn track(
    mut response: Response<Body>,
    (deadline, unread): (Option<Instant>, &Arc<Unread>),
    mut outcome: Outcome,
) -> Response<Body> {
    if let Ok(value) = http::HeaderValue::try_from(outcome.trace.traceparent()) {
        response.headers_mut().insert(TRACEPARENT, value);
    }
    outcome.client = response.extensions().get::<Client>().cloned();
    outcome.request_id =
        response.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok()).map(str::to_owned);
    outcome.observe(response.headers());
    let sleep = deadline.map(|deadline| Box::pin(tokio::time::sleep_until(deadline)));
    response.map(|inner| Body::new(unread.watch(TrackedBody { inner, sleep, outcome }, unread_for_too_long)))
}

/// Counts and logs its call once: by the status that is sent, or as cancelled when it is dropped before there
/// is one.
struct Outcome {
    metrics: Arc<Metrics>,
    method: String,
    begin: Instant,
    trace: Trace,
    client: Option<Client>,
    request_id: Option<String>,
    counted: bool,
}

impl CallLayer {
    /// A call arrives. Probes come every few seconds: they make no spans.
    fn begin(&self, request: &Request<Body>) -> Outcome {
        let path = self.methods.get(request.uri().path()).map_or(UNKNOWN, String::as_str);
        let method = path.trim_start_matches('/').to_owned();
        let tracer = if method.starts_with(HEALTH) { &Tracer::off() } else { &self.tracer };
        Outcome {
            metrics: self.metrics.clone(),
            begin: Instant::now(),
            trace: tracer.call(method.clone(), request.headers()),
            method,
            client: None,
            request_id: None,
            counted: false,
        }
    }
}

impl Outcome {
    /// Takes the status from headers (of a response that is only trailers) or trailers, if it is there.
    fn observe(&mut self, headers: &HeaderMap) {
        if let Some(status) = Status::from_header_map(headers) {
            self.count(status.code());
        }
    }

    fn count(&mut self, code: Code) {
        if !std::mem::replace(&mut self.counted, true) {
            self.metrics.grpc_request(&self.method, code);
            self.trace.ended(&self.method, code);
            let (method, trace_id, request_id) = (&self.method, self.trace.id(), self.request_id.as_deref());
            let (seconds, key) = (self.begin.elapsed().as_secs_f32(), self.client.as_ref().map(Client::name));
            tracing::info!(target: "rheostat::access", method, ?code, seconds, key, %trace_id, request_id, "grpc");
        }
    }
}

impl Drop for Outcome {
    fn drop(&mut self) {
        self.count(Code::Cancelled);
    }
}

/// A response body that ends with DEADLINE_EXCEEDED when its time is up.
struct TrackedBody {
    inner: Body,
    sleep: Option<Pin<Box<Sleep>>>,
    outcome: Outcome,
}

impl HttpBody for TrackedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.inner).poll_frame(cx) {
            if let Some(Ok(frame)) = &frame
                && let Some(trailers) = frame.trailers_ref()
            {
                self.outcome.observe(trailers);
            }
            return Poll::Ready(frame);
        }
        let expired = self.sleep.as_mut().is_some_and(|sleep| sleep.as_mut().poll(cx).is_ready());
        if !expired {
            return Poll::Pending;
        }
        self.sleep = None;
        // Dropping the handler's stream cancels its request.
        self.inner = Body::empty();
        let mut trailers = HeaderMap::new();
        let status = deadline_exceeded();
        status.add_header(&mut trailers)?;
        self.outcome.count(status.code());
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_by_their_units() {
        let parsed = |value: &'static str| {
            timeout(&HeaderMap::from_iter([(
                http::HeaderName::from_static(TIMEOUT_HEADER),
                http::HeaderValue::from_static(value),
            )]))
        };
        assert_eq!(parsed("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(parsed("99999999M"), Some(Duration::from_secs(99_999_999 * 60)));
        assert_eq!(parsed("15S"), Some(Duration::from_secs(15)));
        assert_eq!(parsed("250m"), Some(Duration::from_millis(250)));
        assert_eq!(parsed("9u"), Some(Duration::from_micros(9)));
        assert_eq!(parsed("9n"), Some(Duration::from_nanos(9)));
        for broken in ["", "5", "m", "-1S", "123456789S", "5x", "1.5S"] {
            assert_eq!(parsed(broken), None, "{broken:?}");
        }
    }
}
