//! SIGTERM: whoever was accepted is answered, up to the deadline; whoever comes later is told so.

use std::path::Path;

use rheostat_proto::rheostat::v1::generate_request::Prompt;
use rheostat_proto::rheostat::v1::generate_stream_response::Event;
use rheostat_proto::rheostat::v1::generation_service_client::GenerationServiceClient;
use rheostat_proto::rheostat::v1::{GenerateRequest, SamplingParams};
use rheostat_tests::process::ServerProcess;
use rheostat_tests::wire::{metric, raw, request, until};

const TOKENS: usize = 48;
const REQUESTS: usize = 12;

fn start(flags: &[&str]) -> ServerProcess {
    ServerProcess::start(Path::new(env!("CARGO_BIN_EXE_rheostat-under-test")), flags)
}

fn body(tokens: usize, stream: bool) -> String {
    format!(
        r#"{{"prompt": "Once upon a time", "max_tokens": {tokens}, "ignore_eos": true, "stream": {stream},
            "stream_options": {{"include_usage": {stream}}}}}"#
    )
}

async fn live(server: &ServerProcess) -> usize {
    let running = metric(server.http, "rheostat_sequences_running").await;
    (running + metric(server.http, "rheostat_sequences_waiting").await) as usize
}

/// Tokens of an answer over gRPC, streamed or whole.
async fn generate(server: &ServerProcess, stream: bool) -> u32 {
    let mut client =
        GenerationServiceClient::connect(format!("http://{}", server.grpc)).await.expect("served");
    let sampling = SamplingParams { ignore_eos: true, ..SamplingParams::default() };
    let request = GenerateRequest {
        prompt: Some(Prompt::Text("Once upon a time".into())),
        max_tokens: Some(TOKENS as i64),
        sampling: Some(sampling),
        ..GenerateRequest::default()
    };
    if !stream {
        let answer = client.generate(request).await.expect("an accepted call is answered");
        return answer.into_inner().usage.expect("usage").completion_tokens;
    }
    let mut events =
        client.generate_stream(request).await.expect("an accepted call is answered").into_inner();
    let mut completed = None;
    while let Some(event) = events.message().await.expect("the stream goes on to its end") {
        if let Some(Event::Completed(end)) = event.event {
            completed = end.usage;
        }
    }
    completed.expect("a stream ends with its usage").completion_tokens
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_signal_under_load_loses_no_accepted_request() {
    let server = start(&["--drain-seconds", "120", "--max-num-seqs", "6"]);
    let calls = (0..REQUESTS).map(|index| {
        let (http, body) = (server.http, body(TOKENS, index % 2 == 0));
        tokio::spawn(async move { request(http, "POST", "/v1/completions", body.as_bytes()).await })
    });
    let calls: Vec<_> = calls.collect();
    let called = async {
        let both = futures_util::future::join(generate(&server, false), generate(&server, true)).await;
        assert_eq!(both, (TOKENS as u32, TOKENS as u32));
    };
    let stopped = async {
        // Half of them run and half are queued.
        until(async || live(&server).await == REQUESTS + 2).await;
        server.signal("TERM");
        until(async || request(server.http, "GET", "/ready", b"").await.0 == 503).await;
        assert!(live(&server).await > 0, "it is not ready while requests still run");
        assert_eq!(request(server.http, "GET", "/health", b"").await.0, 200, "it is alive");
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            15
        );
        let late = raw(server.http, format!("{head}{{\"prompt\": \"x\"}}").as_bytes()).await;
        assert!(late.starts_with("HTTP/1.1 503") && late.contains("retry-after: 1"), "{late}");
    };
    futures_util::future::join(called, stopped).await;
    let usage = format!("\"completion_tokens\":{TOKENS},");
    for call in calls {
        let (status, answer) = call.await.expect("no panic");
        assert_eq!(status, 200, "{answer}");
        assert!(answer.contains("\"finish_reason\":\"length\"") && answer.contains(&usage), "{answer}");
    }
    assert!(server.wait().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_outlive_the_deadline_end_with_what_they_have() {
    let server = start(&["--drain-seconds", "1"]);
    let (http, body) = (server.http, body(8000, true));
    let call = tokio::spawn(async move { request(http, "POST", "/v1/completions", body.as_bytes()).await });
    until(async || live(&server).await == 1).await;
    server.signal("TERM");
    let (status, answer) = call.await.expect("no panic");
    assert_eq!(status, 200, "{answer}");
    assert!(
        answer.contains("\"finish_reason\":\"abort\"") && answer.ends_with("data: [DONE]\n\n\r\n0\r\n\r\n")
    );
    assert!(server.wait().success());
}
