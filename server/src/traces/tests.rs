//! Spans as a collector on the loopback interface gets them.

use std::collections::BTreeMap;

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::trace::v1::Span as Received;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status as RpcStatus};

use super::*;
use crate::request::{Caller, Prompt, RawRequest};
use crate::toy;

const CALLERS: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// A collector that passes everything on.
struct Collector(mpsc::Sender<Received>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, RpcStatus> {
        for resource in request.into_inner().resource_spans {
            for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                self.0.send(span).await.map_err(|_| RpcStatus::unavailable("the test has ended"))?;
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

async fn collector() -> (Tracer, mpsc::Receiver<Received>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
    let (sender, spans) = mpsc::channel(64);
    let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(Collector(sender)));
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    let tracer = Tracer::export(&TraceConfig { endpoint, sample_ratio: 0.0 }).expect("an address");
    (tracer, spans)
}

fn headers(traceparent: &'static str) -> HeaderMap {
    HeaderMap::from_iter([(
        http::HeaderName::from_static(TRACEPARENT),
        http::HeaderValue::from_static(traceparent),
    )])
}

/// A request for two choices of three tokens each.
fn request(trace: Trace) -> RawRequest {
    RawRequest {
        prompt: Prompt::Text("abc".into()),
        max_tokens: Some(3),
        n: 2,
        caller: Caller { client: None, trace },
        ..RawRequest::default()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn attributes(span: &Received) -> BTreeMap<&str, &Any> {
    let pairs = span.attributes.iter();
    pairs.filter_map(|a| Some((a.key.as_str(), a.value.as_ref()?.value.as_ref()?))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_gets_a_call_its_generation_and_their_stages() {
    let (tracer, mut received) = collector().await;
    let (service, _) = toy::service();
    // A ratio of zero: what is recorded is what the caller decided.
    let untraced = service.generate(request(tracer.call("unsampled".into(), &HeaderMap::new()))).await;
    let mut events = untraced.expect("admitted").stream;
    while events.next().await.is_some() {}
    let trace = tracer.call("POST /v1/completions".into(), &headers(CALLERS));
    let traceparent = trace.traceparent();
    trace.responded("POST", "/v1/completions", 200);
    let mut events = service.generate(request(trace)).await.expect("admitted").stream;
    while events.next().await.is_some() {}
    drop(events);
    // The engine drops what it knows of a request once it has ended.
    service.shutdown(Duration::from_secs(10)).await;
    tokio::task::spawn_blocking(move || tracer.shutdown()).await.expect("no panic");

    let mut spans: BTreeMap<String, Vec<Received>> = BTreeMap::new();
    while let Ok(span) = received.try_recv() {
        assert_eq!(hex(&span.trace_id), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert!(span.start_time_unix_nano <= span.end_time_unix_nano);
        spans.entry(span.name.clone()).or_default().push(span);
    }
    let counts: Vec<_> = spans.iter().map(|(name, spans)| (name.as_str(), spans.len())).collect();
    let expected = [
        ("POST /v1/completions", 1),
        ("admission", 1),
        ("decode", 2),
        ("prefill", 2),
        ("queue", 2),
        ("text_completion toy", 1),
    ];
    assert_eq!(counts, expected);
    let (call, generation) = (&spans["POST /v1/completions"][0], &spans["text_completion toy"][0]);
    assert_eq!(hex(&call.parent_span_id), "00f067aa0ba902b7");
    assert_eq!(traceparent, format!("00-{}-{}-01", hex(&call.trace_id), hex(&call.span_id)));
    assert_eq!(generation.parent_span_id, call.span_id);
    assert!(call.end_time_unix_nano >= generation.end_time_unix_nano, "a call ends after what it waits for");
    for stage in ["admission", "queue", "prefill", "decode"] {
        for span in &spans[stage] {
            assert_eq!(span.parent_span_id, generation.span_id, "{stage}");
        }
    }
    let known = attributes(generation);
    assert_eq!(known["gen_ai.operation.name"], &Any::StringValue("text_completion".into()));
    assert_eq!(known["gen_ai.usage.input_tokens"], &Any::IntValue(3));
    assert_eq!(known["gen_ai.usage.output_tokens"], &Any::IntValue(6));
    assert_eq!(known["gen_ai.request.choice.count"], &Any::IntValue(2));
    let reasons = format!("{:?}", known["gen_ai.response.finish_reasons"]);
    assert_eq!(reasons.matches("length").count(), 2, "{reasons}");
    assert_eq!(attributes(call)["http.response.status_code"], &Any::IntValue(200));
}

#[test]
fn without_a_collector_a_call_has_its_callers_trace_or_a_fresh_one() {
    let tracer = Tracer::off();
    let trace = tracer.call("x".into(), &headers(CALLERS));
    assert_eq!(trace.id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
    let ours = trace.traceparent();
    assert!(ours.starts_with(&CALLERS[..36]) && ours.ends_with("-01") && ours != CALLERS, "{ours}");
    for broken in ["", "00-0-0-0", "00-00000000000000000000000000000000-00f067aa0ba902b7-01", "nonsense"] {
        let (one, two) =
            (tracer.call("x".into(), &headers(broken)), tracer.call("x".into(), &headers(broken)));
        assert!(one.id().to_string() != two.id().to_string(), "{broken:?} is no trace");
        assert_eq!(one.traceparent().len(), 55);
    }
}
