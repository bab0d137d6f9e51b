//! Five hundred requests of all plans at once, some cancelled, in a pool too small for them: every text is
//! that of a solo run, every page comes back, and what the metrics count is what the clients got.

use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::StreamExt;
use rheostat_tests::server::TestServer;
use rheostat_tests::wire::{metric, request, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const REQUESTS: usize = 500;
const AT_ONCE: usize = 24;
const TOKENS: usize = 20;

const PLANS: [&str; 9] = [
    r#"{}"#,
    r#"{"profile": "eco"}"#,
    r#"{"drop": {"attention": 3, "ffn": 1}}"#,
    r#"{"skip_decode": {"min_layers": 20, "horizon": 16}}"#,
    r#"{"skip_decode": {"min_layers": 24, "region": "low"}, "drop": {"attention": 2}}"#,
    r#"{"ffn_skip": {"target": 0.25, "warmup": 4}}"#,
    r#"{"ffn_skip": {"target": 0.2, "warmup": 2, "selection": "random"}}"#,
    r#"{"think": {"ratio": 0.4, "recent": 16}}"#,
    r#"{"think": {"ratio": 0.5, "recent": 0}, "skip_decode": {"min_layers": 22, "horizon": 20}}"#,
];

const PROMPTS: [&str; 5] = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived an old man who mended nets. Every morning he \
     walked down to the harbour, looked at the sky, and told the children what the weather would be. One day",
    "The harbour was quiet when Captain Mbeki stepped onto the pier. Three ships had left in the night, and \
     nobody could say who had paid for their coal. She opened her notebook, wrote the hour and the wind, and \
     began to count the crates. There were seventeen of tea, nine of cloth, and one that bore no mark at all. \
     She asked the watchman about it, and he",
    "Here is a list of facts about water. Water boils at 100 degrees Celsius at sea level. Water freezes at 0 \
     degrees. Ice floats because it is less dense than water. Sea water is salty. Rivers flow to the sea.",
    "Once upon a time, in a small village by the sea, there lived an old man who mended nets. Every morning he \
     walked down to the harbour, looked at the sky, and went home again, because",
];

fn body(case: usize, extra: &str) -> String {
    let (prompt, plan) = (PROMPTS[case % PROMPTS.len()], PLANS[case / PROMPTS.len() % PLANS.len()]);
    format!(
        r#"{{"prompt": {prompt:?}, "max_tokens": {TOKENS}, "temperature": 0, "ignore_eos": true, "compression": {plan}{extra}}}"#
    )
}

async fn text(server: &TestServer, case: usize) -> String {
    let body = body(case, "");
    let (status, answer) = request(server.http, "POST", "/v1/completions", body.as_bytes()).await;
    assert_eq!(status, 200, "{body}: {answer}");
    let answer: serde_json::Value = serde_json::from_str(&answer).expect("JSON");
    answer["choices"][0]["text"].as_str().expect("a text").to_owned()
}

/// Goes away after the first bytes of a streamed answer.
async fn cancelled(server: &TestServer, case: usize) {
    let body = body(case, r#", "stream": true"#);
    let mut stream = TcpStream::connect(server.http).await.expect("the server listens");
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(&[head.as_bytes(), body.as_bytes()].concat()).await.expect("written");
    let mut bytes = [0; 64];
    let _ = stream.read(&mut bytes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mixed_plans_cancels_and_preemptions_change_no_text_and_lose_no_page() {
    let cases = PROMPTS.len() * PLANS.len();
    let solo = TestServer::start(&["--prefix-caching", "false"]).await;
    let mut expected = Vec::new();
    for case in 0..cases {
        expected.push(text(&solo, case).await);
    }
    solo.stop().await;
    // Pages of forty blocks of 16 tokens in every layer: for a third of the requests that are sent at once.
    let pool = 40 * 30;
    let kv = (pool * 12_288).to_string();
    let server = TestServer::start(&["--memory-kv", &kv, "--max-num-batched-tokens", "128"]).await;
    let completed = AtomicUsize::new(0);
    let calls = (0..REQUESTS).map(|index| {
        // Neighbours differ in prompt and plan; every case comes about eleven times.
        let case = index * 7 % cases;
        let (server, expected, completed) = (&server, &expected, &completed);
        async move {
            if index % 9 == 4 {
                return cancelled(server, case).await;
            }
            assert_eq!(text(server, case).await, expected[case], "{}", body(case, ""));
            completed.fetch_add(1, Ordering::Relaxed);
        }
    });
    futures_util::stream::iter(calls).buffer_unordered(AT_ONCE).collect::<Vec<_>>().await;
    let count = async |name| metric(server.http, name).await;
    until(async || {
        count("rheostat_sequences_running").await + count("rheostat_sequences_waiting").await == 0.0
    })
    .await;
    assert!(count("rheostat_preemptions_total").await > 0.0, "the pool is too small for all");
    assert_sums_agree(&server, completed.into_inner(), pool).await;
    server.stop().await;
}

/// Pages, sequences and tokens by the metrics, beside what the clients know.
async fn assert_sums_agree(server: &TestServer, completed: usize, pool: usize) {
    let (_, page) = request(server.http, "GET", "/metrics", b"").await;
    let series = |name: &str| -> f64 {
        let line = page.lines().find(|line| line.rsplit_once(' ').is_some_and(|(series, _)| series == name));
        let value = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
        value.unwrap_or_else(|| panic!("no {name} in\n{page}"))
    };
    let pages =
        ["used", "cached", "free"].map(|state| series(&format!("rheostat_kv_pages{{state=\"{state}\"}}")));
    assert_eq!((pages[0], pages.iter().sum::<f64>()), (0.0, pool as f64), "{pages:?}");
    let ended = ["stop", "length", "abort", "error"]
        .map(|reason| series(&format!("rheostat_sequences_finished_total{{reason=\"{reason}\"}}")));
    assert_eq!((ended[0], ended[3], ended.iter().sum::<f64>()), (0.0, 0.0, REQUESTS as f64), "{ended:?}");
    // A client that went away late may have been too late.
    assert!(ended[1] >= completed as f64 && ended[2] > 0.0, "{completed} of {ended:?}");
    let sampled = series("rheostat_generation_tokens_total");
    assert_eq!(sampled, series("rheostat_request_generation_tokens_sum"), "every token is some sequence's");
    let cancelled = sampled - (completed * TOKENS) as f64;
    assert!((0.0..=((REQUESTS - completed) * TOKENS) as f64).contains(&cancelled), "{cancelled} tokens");
    // A prompt counts once, however often it was computed.
    let (prompts, sequences) =
        (series("rheostat_prompt_tokens_total"), series("rheostat_request_prompt_tokens_sum"));
    assert!(prompts <= sequences && prompts > 0.8 * sequences, "{prompts} of {sequences}");
}
