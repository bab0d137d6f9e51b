//! The front end over real connections, before the real engine with a toy model.

use std::sync::Arc;
use std::time::Duration;

use rheostat_proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use rheostat_proto::inference::infer_parameter::ParameterChoice;
use rheostat_proto::inference::model_infer_request::InferInputTensor;
use rheostat_proto::inference::{InferParameter, InferTensorContents, ModelInferRequest};
use rheostat_proto::rheostat::v1::generate_request::Prompt;
use rheostat_proto::rheostat::v1::generate_stream_response::Event;
use rheostat_proto::rheostat::v1::generation_service_client::GenerationServiceClient;
use rheostat_proto::rheostat::v1::{self, GenerateRequest};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use super::{ServeError, serve};
use crate::telemetry::Metrics;
use crate::toy;
use crate::traces::Tracer;
use crate::transport::Transport;

/// Tokens that take longer to make than any test waits.
const LONG: i64 = 100_000;
/// Within this, what must happen has happened.
const PATIENCE: Duration = Duration::from_secs(20);

/// A server, its only connection, and what its engine reports.
struct Harness {
    channel: Channel,
    metrics: Arc<Metrics>,
    stop: oneshot::Sender<()>,
    server: JoinHandle<Result<(), ServeError>>,
}

async fn start() -> Harness {
    start_with(|transport| transport, |endpoint| endpoint).await
}

async fn start_with(
    transport: impl FnOnce(Transport) -> Transport,
    endpoint: impl FnOnce(Endpoint) -> Endpoint,
) -> Harness {
    let (service, metrics) = toy::service();
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("it is bound");
    let (stop, stopped) = oneshot::channel();
    let shutdown = async { stopped.await.unwrap_or(()) };
    let server = tokio::spawn(serve(
        transport(Transport::new(listener, 100, None)),
        service,
        (metrics.clone(), Tracer::off()),
        shutdown,
    ));
    let endpoint = endpoint(Channel::from_shared(format!("http://{address}")).expect("an address"));
    let channel = endpoint.connect().await.expect("the server listens");
    Harness { channel, metrics, stop, server }
}

impl Harness {
    /// Waits until the server's metrics show `line`.
    async fn shows(&self, line: &str) {
        let seen = async {
            while !self.metrics.render().lines().any(|shown| shown == line) {
                tokio::task::yield_now().await;
            }
        };
        let seen = tokio::time::timeout(PATIENCE, seen).await;
        assert!(seen.is_ok(), "{line} is not in\n{}", self.metrics.render());
    }

    /// Waits until `count` sequences run and all KV pages of others are free.
    async fn runs(&self, count: usize) {
        self.shows(&format!("rheostat_sequences_running {count}")).await;
        if count == 0 {
            self.shows("rheostat_kv_pages{state=\"used\"} 0").await;
        }
    }
}

fn request(max_tokens: i64) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(Prompt::Text("abc xyz".into())),
        max_tokens: Some(max_tokens),
        n: Some(2),
        sampling: Some(v1::SamplingParams {
            temperature: Some(0.0),
            logprobs: Some(1),
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_stream_carries_what_the_unary_call_answers() {
    let harness = start().await;
    let mut client = GenerationServiceClient::new(harness.channel);
    let whole = client.generate(request(3)).await.expect("answered").into_inner();
    assert_eq!(whole.choices[1].text, "abc");
    let usage = whole.usage.clone().expect("always there");
    assert_eq!((usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens), (7, 0, 6));
    let work = usage.compression.clone().expect("always there");
    // Two choices of one layer, each over its prompt and all output tokens but the last.
    assert_eq!((work.plan, work.dense_layers), (Some(v1::Compression::default()), 2 * (7 + 2)));

    let stream = client.generate_stream(request(3)).await.expect("answered").into_inner();
    let events: Vec<_> = stream.map(|event| event.expect("no error").event.expect("set")).collect().await;
    assert!(matches!(&events[0], Event::Started(s) if s.prompt_tokens == 7), "{events:?}");
    assert_eq!(events.last(), Some(&Event::Completed(v1::Completed { usage: Some(usage) })));
    for choice in whole.choices {
        let deltas = events.iter().filter_map(|event| match event {
            Event::Delta(delta) if delta.index == choice.index => Some(delta.clone()),
            _ => None,
        });
        let (texts, scored): (Vec<_>, Vec<_>) = deltas.map(|d| (d.text, d.logprobs)).unzip();
        assert_eq!((texts.concat(), scored.concat()), (choice.text, choice.logprobs));
    }
}

#[tokio::test]
async fn a_call_that_ends_early_cancels_its_request() {
    let harness = start().await;
    let mut client = GenerationServiceClient::new(harness.channel.clone());

    let mut unary_client = client.clone();
    let call = tokio::spawn(async move { unary_client.generate(request(LONG)).await });
    harness.runs(2).await;
    call.abort();
    harness.runs(0).await;

    let mut stream = client.generate_stream(request(LONG)).await.expect("answered").into_inner();
    while !matches!(stream.next().await, Some(Ok(r)) if matches!(r.event, Some(Event::Delta(_)))) {}
    drop(stream);
    harness.runs(0).await;

    let mut late = tonic::Request::new(request(LONG));
    late.set_timeout(Duration::from_millis(50));
    let mut stream = client.generate_stream(late).await.expect("answered").into_inner();
    let error = loop {
        match stream.next().await {
            Some(Ok(_)) => {}
            Some(Err(error)) => break error,
            None => panic!("the stream ended without an error"),
        }
    };
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
    harness.runs(0).await;

    for (method, code) in
        [("Generate", "Cancelled"), ("GenerateStream", "Cancelled"), ("GenerateStream", "DeadlineExceeded")]
    {
        let labels = format!("method=\"rheostat.v1.GenerationService/{method}\",code=\"{code}\"");
        harness.shows(&format!("rheostat_grpc_requests_total{{{labels}}} 1")).await;
    }
}

/// The connection's socket takes all that is sent; the stream's window does not.
#[tokio::test]
async fn a_stream_whose_client_opens_no_window_is_ended_and_the_connection_is_not() {
    let impatient = |transport: Transport| transport.with_write_timeout(Duration::from_millis(400));
    let harness = start_with(impatient, |endpoint| endpoint.initial_stream_window_size(256)).await;
    let mut client = GenerationServiceClient::new(harness.channel.clone());
    let mut unread = client.generate_stream(request(LONG)).await.expect("answered").into_inner();
    harness.runs(2).await;
    harness.runs(0).await;
    let labels = "method=\"rheostat.v1.GenerationService/GenerateStream\",code=\"Cancelled\"";
    harness.shows(&format!("rheostat_grpc_requests_total{{{labels}}} 1")).await;
    // Others are served meanwhile, and who comes back to read is told.
    client.generate(request(4)).await.expect("answered");
    let error = loop {
        match unread.next().await {
            Some(Ok(_)) => {}
            Some(Err(error)) => break error,
            None => panic!("the stream ended without an error"),
        }
    };
    assert!([Code::Cancelled, Code::Internal, Code::Unknown].contains(&error.code()), "{error}");
}

/// A request with typed contents, greedy, of at most `max_tokens`; `true` and `false` are BOOL tensors.
fn infer(id: &str, tensors: &[(&str, &str)], max_tokens: i64) -> ModelInferRequest {
    let input = |(name, value): &(&str, &str)| {
        let flag = value.parse::<bool>().ok();
        let contents = InferTensorContents {
            bool_contents: flag.into_iter().collect(),
            bytes_contents: if flag.is_none() { vec![value.as_bytes().to_vec()] } else { Vec::new() },
            ..Default::default()
        };
        InferInputTensor {
            name: (*name).into(),
            datatype: if flag.is_some() { "BOOL" } else { "BYTES" }.into(),
            shape: vec![1],
            contents: Some(contents),
            ..Default::default()
        }
    };
    let parameter = |name: &str, value| {
        (name.to_owned(), InferParameter { parameter_choice: Some(ParameterChoice::Int64Param(value)) })
    };
    ModelInferRequest {
        id: id.into(),
        inputs: tensors.iter().map(input).collect(),
        parameters: [parameter("max_tokens", max_tokens), parameter("temperature", 0)].into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn requests_of_one_inference_stream_run_at_once_and_fail_alone() {
    let harness = start().await;
    let mut client = GrpcInferenceServiceClient::new(harness.channel.clone());
    let (requests, outgoing) = mpsc::channel(4);
    let streamed = [("text_input", "abc"), ("stream", "true")];
    // The long request stays open in front of the others.
    requests.send(infer("long", &streamed, LONG)).await.expect("room");
    requests.send(infer("bad", &[("stream", "true")], 1)).await.expect("room");
    requests.send(infer("short", &streamed, 2)).await.expect("room");
    let outgoing = ReceiverStream::new(outgoing);
    let mut responses = client.model_stream_infer(outgoing).await.expect("answered").into_inner();

    let (mut text, mut refused) = (String::new(), false);
    loop {
        let response = responses.next().await.expect("the stream goes on").expect("no error");
        let infer = response.infer_response.expect("every response carries its id");
        let is_final = infer.parameters["triton_final_response"].parameter_choice
            == Some(ParameterChoice::BoolParam(true));
        match infer.id.as_str() {
            "bad" => refused = response.error_message.contains("text_input") && is_final,
            "short" => {
                let bytes = infer.outputs[0].contents.as_ref().expect("typed").bytes_contents.concat();
                text.push_str(std::str::from_utf8(&bytes).expect("UTF-8"));
                if is_final {
                    break;
                }
            }
            _ => assert!(!is_final, "the long request goes on"),
        }
    }
    assert_eq!(text, "de");
    assert!(refused, "the bad request was answered with an error");
    drop((requests, responses));
    harness.runs(0).await;
}

#[tokio::test]
async fn model_infer_answers_once_and_refuses_to_stream() {
    let harness = start().await;
    let mut client = GrpcInferenceServiceClient::new(harness.channel);
    let whole = client.model_infer(infer("x", &[("text_input", "abc")], 2)).await.expect("answered");
    let text = whole.get_ref().outputs[0].contents.as_ref().map(|c| c.bytes_contents.clone());
    assert_eq!(text, Some(vec![b"abcde".to_vec()]));
    let streamed = infer("x", &[("text_input", "abc"), ("stream", "true")], 2);
    let error = client.model_infer(streamed).await.expect_err("refused");
    assert_eq!((error.code(), error.message().contains("ModelStreamInfer")), (Code::InvalidArgument, true));
    let other = ModelInferRequest { model_version: "2".into(), ..infer("x", &[("text_input", "abc")], 2) };
    assert_eq!(client.model_infer(other).await.expect_err("refused").code(), Code::NotFound);
}

#[tokio::test]
async fn shutdown_ends_idle_streams_and_waits_for_requests() {
    let harness = start().await;
    let mut health = HealthClient::new(harness.channel.clone());
    let mut watch = health.watch(HealthCheckRequest::default()).await.expect("answered").into_inner();
    assert_eq!(watch.next().await.expect("a status").expect("no error").status, 1);

    let mut client = GrpcInferenceServiceClient::new(harness.channel.clone());
    let (_requests, outgoing) = mpsc::channel(1);
    let outgoing = ReceiverStream::new(outgoing);
    let mut idle = client.model_stream_infer(outgoing).await.expect("answered").into_inner();
    let mut client = GenerationServiceClient::new(harness.channel.clone());
    let mut running = client.generate_stream(request(LONG)).await.expect("answered").into_inner();
    harness.runs(2).await;

    let Harness { stop, server, .. } = harness;
    stop.send(()).expect("the server runs");
    assert_eq!(watch.next().await.expect("a status").expect("no error").status, 2);
    assert!(watch.next().await.is_none(), "a watcher is let go");
    assert!(idle.next().await.is_none(), "an idle stream is let go");
    assert!(matches!(running.next().await, Some(Ok(_))), "a request under way goes on");
    assert!(!server.is_finished());
    drop(running);
    server.await.expect("no panic").expect("no error");
}
