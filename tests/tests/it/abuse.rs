//! Bad input: each a clear 4xx, and the server goes on.

use rheostat_tests::server::TestServer;
use rheostat_tests::wire::{raw, request};

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_is_refused_clearly_and_costs_nobody_else_anything() {
    let server = TestServer::start(&[]).await;
    let at = server.http;
    let stops = format!("{{\"prompt\": \"x\", \"stop\": [{}]}}", vec!["\"a\""; 10_000].join(","));
    let long = format!("{{\"prompt\": \"{}\"}}", "word ".repeat(9_000));
    let path = "/v1/completions";
    for (path, body, status, says) in [
        (path, r#"{"prompt": ""}"#, 400, "empty"),
        (path, r#"{"prompt": []}"#, 400, "empty"),
        (path, r#"{"prompt": {"a": 1}}"#, 400, "prompt must be"),
        (path, "{}", 400, "prompt is required"),
        (path, long.as_str(), 400, "context"),
        (path, "not json", 400, "not valid JSON"),
        (path, r#"{"prompt": "x", "max_tokens": -1}"#, 400, "max_tokens"),
        (path, r#"{"prompt": "x", "max_tokens": 1.5}"#, 400, "max_tokens"),
        (path, r#"{"prompt": "x", "max_tokens": 99999999}"#, 400, "max_tokens"),
        (path, r#"{"prompt": "x", "temperature": NaN}"#, 400, "JSON"),
        (path, r#"{"prompt": "x", "temperature": 1e999}"#, 400, "number out of range"),
        (path, r#"{"prompt": "x", "temperature": -1}"#, 400, "temperature"),
        (path, r#"{"prompt": "x", "n": 100000}"#, 400, "n is 100000"),
        (path, r#"{"prompt": "x", "n": "two"}"#, 400, "n: invalid type"),
        (path, r#"{"prompt": "x", "logit_bias": {"a": 1}}"#, 400, "logit_bias"),
        (path, r#"{"prompt": [1, 999999999]}"#, 400, "token id"),
        (path, stops.as_str(), 400, "stop is 10000"),
        (path, r#"{"prompt": "x", "suffix": "y"}"#, 400, "suffix is not supported"),
        (path, r#"{"prompt": "x", "compression": {"think": {"ratio": 2}}}"#, 400, "compression.think"),
        (path, r#"{"prompt": "x", "compression": {"vision": {"share": 2}}}"#, 400, "unknown field `share`"),
        (path, r#"{"prompt": "x", "model": "nobody"}"#, 404, "nobody"),
        ("/v1/chat/completions", r#"{"messages": []}"#, 400, "messages is empty"),
        ("/v1/chat/completions", r#"{"messages": [{"content": "x"}]}"#, 400, "messages[0].role"),
        ("/v1/chat/completions", r#"{"messages": "x"}"#, 400, "messages: invalid type"),
        (
            "/v1/chat/completions",
            r#"{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}"#,
            400,
            "image_url.url must be a string",
        ),
        (
            "/v1/chat/completions",
            r#"{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"messages": []}}"#,
            400,
            "must not set",
        ),
        ("/detokenize", r#"{"tokens": [4000000000]}"#, 400, "token"),
        ("/nowhere", "{}", 404, "/nowhere"),
        ("/health", "{}", 405, "POST is not allowed"),
    ] {
        let (got, answer) = request(at, "POST", path, body.as_bytes()).await;
        let shown = &body[..body.len().min(80)];
        assert_eq!(got, status, "{path} {shown}: {answer}");
        assert!(answer.contains(says), "{path} {shown}: {answer} does not say {says:?}");
        assert!(answer.starts_with("{\"error\":{\"message\""), "{answer}");
    }
    let (status, answer) = request(at, "POST", path, b"{\"prompt\": \"\xff\xfe\"}").await;
    assert!(status == 400 && answer.contains("UTF-8"), "{answer}");

    // A body of 50 MB is refused by its announced length.
    let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", 50 << 20);
    let answer = raw(at, &[head.as_bytes(), &vec![b' '; 50 << 20]].concat()).await;
    assert!(answer.starts_with("HTTP/1.1 413") || answer.is_empty(), "{}", &answer[..answer.len().min(200)]);
    let huge_header = format!("GET /health HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "y".repeat(1 << 20));
    let answer = raw(at, huge_header.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 4") || answer.is_empty(), "{answer}");

    let (status, answer) = request(
        at,
        "POST",
        path,
        br#"{"prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}"#,
    )
    .await;
    assert!(status == 200 && answer.contains(" Paris"), "the server goes on: {answer}");
    server.stop().await;
}
