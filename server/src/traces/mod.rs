//! Traces: W3C trace context in and out, and spans over OTLP where a collector is configured.
//!
//! ```text
//! POST /v1/chat/completions           the call: from its headers to the end of its last event
//!   chat smollm2-135m                 the generation, with the attributes of OpenTelemetry's GenAI conventions
//!     admission                       validate, tokenize, compile the plan
//!     queue · prefill · decode        of each choice, from the engine's clock
//! ```
//!
//! Without a collector there are no spans; a call still has a trace id, its client's or a fresh one, that its
//! log lines carry and its response repeats. Spans are made when a stage has ended, from its times, so that
//! the engine thread only ever hands one to a bounded queue.

mod generation;
#[cfg(test)]
mod tests;

pub use generation::GenerationSpan;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::HeaderMap;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{
    Span as _, SpanContext, SpanKind, Status, TraceContextExt, TraceFlags, TraceState, Tracer as _,
    TracerProvider as _,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator, Sampler, SdkTracer, SdkTracerProvider, Span};

/// The header of W3C trace context.
pub const TRACEPARENT: &str = "traceparent";
/// How long the last spans may take to reach the collector when the server stops.
const FLUSH: Duration = Duration::from_secs(2);

/// Where spans go.
#[derive(Debug, Clone, PartialEq)]
pub struct TraceConfig {
    /// The collector's OTLP endpoint over gRPC, `http://HOST:4317`.
    pub endpoint: String,
    /// Share of the traces that begin here to record, in [0, 1]; a caller's decision is respected.
    pub sample_ratio: f64,
}

/// Makes the traces of a server. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Tracer {
    exporting: Option<(SdkTracerProvider, SdkTracer)>,
}

impl Tracer {
    /// Trace ids only.
    pub fn off() -> Self {
        Self { exporting: None }
    }

    /// Spans to a collector. Needs the async runtime, in whose background they are sent.
    ///
    /// # Errors
    /// A sentence, when the endpoint is none. A collector that does not answer is a warning in the log.
    pub fn export(config: &TraceConfig) -> Result<Self, String> {
        let exporter = SpanExporter::builder().with_tonic().with_endpoint(&config.endpoint).build();
        let exporter = exporter.map_err(|e| format!("telemetry.otlp_endpoint {:?}: {e}", config.endpoint))?;
        let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(config.sample_ratio)));
        let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
        let resource = Resource::builder().with_service_name("rheostat").with_attribute(version).build();
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_sampler(sampler)
            .with_resource(resource)
            .build();
        let tracer = provider.tracer("rheostat");
        Ok(Self { exporting: Some((provider, tracer)) })
    }

    /// The trace of a call with these headers; `name` becomes its span's name.
    pub fn call(&self, name: String, headers: &HeaderMap) -> Trace {
        let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(headers));
        let Some((_, tracer)) = &self.exporting else {
            return Trace { context: local_context(parent.span().span_context()), span: None };
        };
        let span = tracer.span_builder(name).with_kind(SpanKind::Server).start_with_context(tracer, &parent);
        let context = span.span_context().clone();
        let span = context
            .is_sampled()
            .then(|| Arc::new(CallSpan { span: Mutex::new(span), tracer: tracer.clone() }));
        Trace { context, span }
    }

    /// Sends what is waiting. Blocks, for a few seconds at most.
    pub fn shutdown(&self) {
        if let Some((provider, _)) = &self.exporting
            && let Err(error) = provider.shutdown_with_timeout(FLUSH)
        {
            tracing::warn!(%error, "the last spans may not have reached the collector");
        }
    }
}

/// The caller's trace and a span id of ours, or a fresh trace. Nobody records it.
fn local_context(parent: &SpanContext) -> SpanContext {
    let ids = RandomIdGenerator::default();
    if parent.is_valid() {
        let state = parent.trace_state().clone();
        return SpanContext::new(parent.trace_id(), ids.new_span_id(), parent.trace_flags(), false, state);
    }
    let (trace, span) = (ids.new_trace_id(), ids.new_span_id());
    SpanContext::new(trace, span, TraceFlags::default(), false, TraceState::default())
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}

/// A call's place in its trace. Clones share the call's span, which ends with the last of them.
#[derive(Debug, Clone)]
pub struct Trace {
    context: SpanContext,
    span: Option<Arc<CallSpan>>,
}

impl Default for Trace {
    /// Outside any trace.
    fn default() -> Self {
        Self { context: SpanContext::empty_context(), span: None }
    }
}

impl Trace {
    /// The trace's id, for log lines.
    pub fn id(&self) -> impl std::fmt::Display + use<> {
        self.context.trace_id()
    }

    /// The `traceparent` of this call, for its response.
    pub fn traceparent(&self) -> String {
        let context = &self.context;
        let flags = context.trace_flags() & TraceFlags::SAMPLED;
        format!("00-{}-{}-{flags:02x}", context.trace_id(), context.span_id())
    }

    /// An HTTP response begins.
    pub fn responded(&self, method: &'static str, route: &str, status: u16) {
        let Some(span) = &self.span else { return };
        let mut span = span.lock();
        span.set_attributes([
            KeyValue::new("http.request.method", method),
            KeyValue::new("http.route", route.to_owned()),
            KeyValue::new("http.response.status_code", i64::from(status)),
        ]);
        if status >= 500 {
            span.set_status(Status::error(""));
        }
    }

    /// A gRPC call ended.
    pub fn ended(&self, method: &str, code: tonic::Code) {
        let Some(span) = &self.span else { return };
        let mut span = span.lock();
        span.set_attributes([
            KeyValue::new("rpc.system", "grpc"),
            KeyValue::new("rpc.method", method.to_owned()),
            KeyValue::new("rpc.grpc.status_code", code as i64),
        ]);
        if matches!(code, tonic::Code::Internal | tonic::Code::Unavailable | tonic::Code::Unknown) {
            span.set_status(Status::error(""));
        }
    }
}

/// The span of a call that is recorded.
#[derive(Debug)]
struct CallSpan {
    span: Mutex<Span>,
    tracer: SdkTracer,
}

impl CallSpan {
    fn lock(&self) -> std::sync::MutexGuard<'_, Span> {
        self.span.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
