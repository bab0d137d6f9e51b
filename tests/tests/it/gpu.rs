//! The server over the GPU's decoder, on the emulated device with a tiny model.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine as _;
use model_zoo::compression::Offer;
use model_zoo::kernels::cuda::emulated::{Emulated, Order};
use model_zoo::loader::{LoadOptions, LoadedModel, Target, load};
use model_zoo::tokenizer::Tokenizer;
use rheostat::run::NamedModel;
use rheostat_tests::server::TestServer;
use rheostat_tests::wire::{metric, request, until};
use serde_json::{Value, json};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model-zoo/tests/fixtures")
}

/// The fixture `name` on an emulated device.
fn on_device(name: &str) -> LoadedModel {
    let device = Target::Device(Arc::new(Emulated::new(Order::Upwards)));
    load(&fixtures().join(name), &LoadOptions { device, ..LoadOptions::default() })
        .expect("the fixture loads")
}

/// The fixture `llama`, whose tokens are bytes.
async fn start() -> TestServer {
    // Without cached prefixes a prompt is computed by the same steps each time.
    let flags = ["--max-num-batched-tokens", "40", "--prefix-caching", "false"];
    TestServer::start_over(&flags, |_| {
        let loaded = on_device("llama");
        NamedModel { name: "tiny".into(), loaded, tokenizer: Tokenizer::toy(), offer: Offer::default() }
    })
    .await
}

async fn complete(server: &TestServer, prompt: usize, more: Value) -> (u16, Value) {
    let tokens: Vec<usize> = (0..20 + 7 * prompt).map(|i| (i * 37 + prompt * 101) % 250).collect();
    let mut body = json!({"prompt": tokens, "max_tokens": 12, "ignore_eos": true, "temperature": 0});
    for (key, value) in more.as_object().expect("fields") {
        body[key] = value.clone();
    }
    let (status, answer) = request(server.http, "POST", "/v1/completions", body.to_string().as_bytes()).await;
    (status, serde_json::from_str(&answer).expect("JSON"))
}

async fn text(server: &TestServer, prompt: usize, more: Value) -> String {
    let (status, answer) = complete(server, prompt, more).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["usage"]["completion_tokens"], 12);
    answer["choices"][0]["text"].as_str().expect("a text").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_drawn_on_the_device_are_those_of_its_logits() {
    let server = start().await;
    for prompt in 0..3 {
        // Asking for log-probabilities brings the logits to the host, which draws then.
        let drawn = text(&server, prompt, json!({})).await;
        assert_eq!(text(&server, prompt, json!({"logprobs": 1})).await, drawn, "prompt {prompt}");
        let seeded = json!({"temperature": 0.8, "seed": 5, "top_k": 1});
        assert_eq!(text(&server, prompt, seeded).await, drawn, "only the likeliest token is kept");
        let sampled = json!({"temperature": 1.5, "seed": 5, "top_p": 0.9});
        let first = text(&server, prompt, sampled.clone()).await;
        assert_eq!(text(&server, prompt, sampled).await, first, "a seed fixes the text");
    }
    // Many at once, with mixed plans, and nothing is left when they have ended.
    let skip = json!({"compression": {"skip_decode": {"min_layers": 1, "horizon": 4}}});
    let calls = (0..6).map(|i| text(&server, i, if i % 2 == 0 { json!({}) } else { skip.clone() }));
    futures_util::future::join_all(calls).await;
    until(|| async { metric(server.http, "rheostat_sequences_running").await == 0.0 }).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_pruned_and_the_pool_shrinks_while_it_lies_on_the_device() {
    let server = start().await;
    let think = json!({"compression": {"think": {"ratio": 0.5, "recent": 4}}});
    let pruned = text(&server, 9, think.clone()).await;
    assert_eq!(text(&server, 9, think.clone()).await, pruned, "the same steps give the same text");
    // Sealed prompts beside dense ones, and nothing is left when they have ended.
    let calls = (0..6).map(|i| text(&server, i + 4, if i % 2 == 0 { json!({}) } else { think.clone() }));
    futures_util::future::join_all(calls).await;
    until(|| async { metric(server.http, "rheostat_sequences_running").await == 0.0 }).await;
    // The pool follows its budget down while it lies on the device.
    let (status, answer) = request(server.http, "PUT", "/admin/memory", br#"{"kv": "64KiB"}"#).await;
    assert_eq!(status, 200, "{answer}");
    text(&server, 1, json!({})).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn image_tokens_are_left_out_on_the_device() {
    // Without cached prefixes a prompt is computed by the same steps each time.
    let server = TestServer::start_over(&["--prefix-caching", "false"], |_| {
        let loaded = on_device("llava");
        let tokenizer = Tokenizer::load(&loaded.tokenizer, None).expect("the fixture's tokenizer");
        NamedModel { name: "tiny".into(), loaded, tokenizer, offer: Offer::default() }
    })
    .await;
    let picture = std::fs::read(fixtures().join("images/rgb.png")).expect("a picture");
    let url = format!("data:image/png;base64,{}", base64::engine::general_purpose::STANDARD.encode(picture));
    let parts =
        json!([{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]);
    let ask = async |vision: Value| {
        let mut body =
            json!({"messages": [{"role": "user", "content": parts}], "max_tokens": 6, "temperature": 0});
        body["compression"] = json!({"vision": vision});
        body["ignore_eos"] = true.into();
        let body = body.to_string();
        let (status, answer) = request(server.http, "POST", "/v1/chat/completions", body.as_bytes()).await;
        assert_eq!(status, 200, "{answer}");
        let answer: Value = serde_json::from_str(&answer).expect("JSON");
        let text = answer["choices"][0]["message"]["content"].as_str().expect("a text").to_owned();
        (text, answer["usage"]["compression"].clone())
    };
    let (_, whole) = ask(json!({"layers": []})).await;
    let plans = [
        json!({"keep": 2}),
        json!({"keep": 2, "baseline": "pool"}),
        json!({"keep": 2, "baseline": "random"}),
    ];
    for vision in &plans {
        let (text, usage) = ask(vision.clone()).await;
        assert_eq!(usage["visual_tokens"]["kept"], 2, "{vision}: {usage}");
        let run = |usage: &Value| usage["attention_layers_run"].as_u64().expect("a number");
        assert!(run(&usage) < run(&whole), "{vision}: {usage} and {whole}");
        assert_eq!(ask(vision.clone()).await.0, text, "{vision}: the same steps give the same text");
    }
    futures_util::future::join_all((0..6).map(|i| ask(plans[i % 3].clone()))).await;
    until(|| async { metric(server.http, "rheostat_sequences_running").await == 0.0 }).await;
    server.stop().await;
}
