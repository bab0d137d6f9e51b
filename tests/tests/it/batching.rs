//! The real model gives the same text whatever else runs, however the prompt is cut, and after preemption.

use rheostat_tests::server::TestServer;
use rheostat_tests::wire::{metric, request};

const PROMPTS: [&str; 6] = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):",
    "Water boils at",
    "A list of fruits: apple, banana,",
    "The three primary colours are",
];

async fn complete(server: &TestServer, prompt: &str, sampling: &str) -> String {
    let body = format!(r#"{{"prompt": {prompt:?}, "max_tokens": 40, "ignore_eos": true, {sampling}}}"#);
    let (status, answer) = request(server.http, "POST", "/v1/completions", body.as_bytes()).await;
    assert_eq!(status, 200, "{answer}");
    let start = answer.find("\"text\":").expect("a text");
    let end = answer.find(",\"logprobs\"").expect("fields after the text");
    answer[start..end].to_owned()
}

async fn texts(flags: &[&str], together: bool) -> (Vec<String>, f64) {
    let server = TestServer::start(flags).await;
    let mut texts = Vec::new();
    for sampling in [r#""temperature": 0"#, r#""temperature": 0.9, "seed": 7, "top_p": 0.95"#] {
        let calls = PROMPTS.map(|prompt| complete(&server, prompt, sampling));
        if together {
            texts.extend(futures_util::future::join_all(calls).await);
        } else {
            for call in calls {
                texts.push(call.await);
            }
        }
    }
    let preemptions = metric(server.http, "rheostat_preemptions_total").await;
    server.stop().await;
    (texts, preemptions)
}

#[tokio::test(flavor = "multi_thread")]
async fn text_is_the_same_alone_together_chunked_and_preempted() {
    let (alone, _) = texts(&["--prefix-caching", "false"], false).await;
    let (together, _) = texts(&[], true).await;
    assert_eq!(together, alone, "in one batch");
    let (chunked, _) = texts(&["--max-num-batched-tokens", "7"], true).await;
    assert_eq!(chunked, alone, "with prompts cut into chunks");
    // Nine blocks of 16 tokens in every layer: six sequences of four blocks cannot run to the end together.
    let kv = (9 * 30 * 12_288).to_string();
    let (preempted, preemptions) = texts(&["--memory-kv", &kv], true).await;
    assert!(preemptions > 0.0, "the pool is too small for all");
    assert_eq!(preempted, alone, "after preemption");
}
