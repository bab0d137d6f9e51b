//! Clients that others wrote, against the real server with the real model.

use rheostat_tests::python::run_client;
use rheostat_tests::server::TestServer;
use rheostat_tests::wire::request;

#[tokio::test(flavor = "multi_thread")]
async fn the_openai_the_grpc_and_the_triton_client_are_served() {
    let server = TestServer::start(&[]).await;
    let (http, grpc) = (format!("http://{}", server.http), server.grpc.to_string());
    tokio::task::spawn_blocking(move || {
        run_client("openai_client.py", &["--base-url", &format!("{http}/v1")]);
        run_client("grpc_client.py", &[&grpc, "--http-url", &http]);
        run_client("oip_client.py", &[&grpc]);
    })
    .await
    .expect("every client is content");
    promtool_finds_nothing(&server).await;
    server.stop().await;
}

/// Prometheus' own linter over a page that has seen traffic. Our names must be clean; vLLM's are vLLM's.
async fn promtool_finds_nothing(server: &TestServer) {
    use std::io::Write;
    use std::process::{Command, Stdio};
    let (_, page) = request(server.http, "GET", "/metrics", b"").await;
    let ours: String =
        page.lines().filter(|line| !line.contains("vllm:")).map(|line| format!("{line}\n")).collect();
    assert!(ours.contains("rheostat_time_to_first_token_seconds_bucket"));
    let required = std::env::var_os("RHEOSTAT_REQUIRE_PROMTOOL").is_some();
    let spawned = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut promtool) = spawned else {
        assert!(!required, "promtool is required and cannot be run");
        eprintln!("promtool is not on this machine (Debian package prometheus): its check is left to CI");
        return;
    };
    promtool.stdin.take().expect("piped").write_all(ours.as_bytes()).expect("promtool reads");
    let output = promtool.wait_with_output().expect("promtool ends");
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.trim().is_empty(), "{said}");
}
