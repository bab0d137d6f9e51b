//! Chats with images: the real client against the real server with a tiny LLaVA model.

use std::path::{Path, PathBuf};

use rheostat_tests::python::run_client;
use rheostat_tests::server::TestServer;
use rheostat_tests::wire::{metric, request};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model-zoo/tests/fixtures")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_openai_client_shows_images() {
    let model = fixtures().join("llava").to_string_lossy().into_owned();
    let server = TestServer::start(&["--model", &model]).await;
    let url = format!("http://{}/v1", server.http);
    let pictures = fixtures().join("images").to_string_lossy().into_owned();
    tokio::task::spawn_blocking(move || {
        run_client("vision_client.py", &["--base-url", &url, "--pictures", &pictures, "--tokens", "9"]);
    })
    .await
    .expect("the client is content");
    let (grpc, picture) = (server.grpc.to_string(), fixtures().join("images/rgb.png"));
    tokio::task::spawn_blocking(move || {
        let picture = picture.to_string_lossy();
        run_client("vision_grpc_client.py", &[&grpc, "--picture", &picture, "--tokens", "9"]);
    })
    .await
    .expect("the gRPC client is content");
    // Three pictures whole, one of them once more with its nine patches merged, perhaps into one.
    let bytes = metric(server.http, "rheostat_image_cache_bytes").await;
    let (row, salience) = (64.0 * 4.0, 9.0 * 4.0);
    assert!((3.0 * (9.0 * row + salience)..=4.0 * (9.0 * row + 3.0 * salience)).contains(&bytes), "{bytes}");
    let spelled = br#"{"messages": [{"role": "user", "content": "what is <image> in HTML?"}]}"#;
    let (status, answer) = request(server.http, "POST", "/v1/chat/completions", spelled).await;
    assert!(status == 400 && answer.contains("must not spell"), "{answer}");
    let tokens = br#"{"prompt": [5, 255, 6]}"#;
    let (status, answer) = request(server.http, "POST", "/v1/completions", tokens).await;
    assert!(status == 400 && answer.contains("must not spell"), "{answer}");
    server.stop().await;
}

/// The small model that was trained for this: its decoder is the default model with an adapter.
#[tokio::test(flavor = "multi_thread")]
async fn a_trained_model_sees_what_is_shown_to_the_openai_client() {
    let model = fixtures().join("../../weights/smollm2-vision").to_string_lossy().into_owned();
    let server = TestServer::start(&["--model", &model]).await;
    let url = format!("http://{}/v1", server.http);
    let pictures = fixtures().join("images").to_string_lossy().into_owned();
    tokio::task::spawn_blocking(move || {
        let questions = rheostat_tests::python::clients_dir().join("scenes/questions.jsonl");
        let questions = questions.to_string_lossy();
        let args =
            ["--base-url", &url, "--pictures", &pictures, "--tokens", "576", "--questions", &questions];
        run_client("vision_client.py", &args);
    })
    .await
    .expect("the client is content");
    let dropped = r#"rheostat_image_tokens_total{method="vision",state="kept"}"#;
    let (_, page) = request(server.http, "GET", "/metrics", b"").await;
    let kept =
        page.lines().find_map(|line| line.strip_prefix(dropped)).and_then(|value| value.trim().parse().ok());
    assert!(kept.is_some_and(|kept: f64| kept > 0.0), "{dropped} in\n{page}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fetching_never_leads_inside() {
    let model = fixtures().join("llava").to_string_lossy().into_owned();
    // The operator allows the host by name; its address is still the machine's own.
    let flags = ["--model", &model, "--images-fetch", "true", "--images-allow-hosts", "localhost,127.0.0.1"];
    let server = TestServer::start(&flags).await;
    for (url, says) in [
        ("http://localhost/a.png", "not public"),
        ("http://127.0.0.1/a.png", "not public"),
        ("http://169.254.169.254/latest/meta-data/", "not among the hosts"),
        ("file:///etc/passwd", "file: URLs"),
    ] {
        let body = format!(
            r#"{{"messages": [{{"role": "user", "content": [{{"type": "image_url", "image_url": {{"url": "{url}"}}}}]}}]}}"#
        );
        let (status, answer) = request(server.http, "POST", "/v1/chat/completions", body.as_bytes()).await;
        assert!(status == 400 && answer.contains(says), "{url}: {answer}");
    }
    server.stop().await;
}
