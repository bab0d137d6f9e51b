//! BitStack weights on a running server: budgets move under load, and no request fails, no byte is held over the
//! budget, and every text is that of a solo run with the blocks by which it says that it was made.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use model_zoo::compression::bitstack::Artefact;
use model_zoo::loader::{LoadOptions, load};
use rheostat_proto::rheostat::v1::SetMemoryRequest;
use rheostat_proto::rheostat::v1::admin_service_client::AdminServiceClient;
use rheostat_tests::process::ServerProcess;
use rheostat_tests::stack::{LEVELS, write_artefact};
use rheostat_tests::wire::{request, until};
use serde_json::{Value, json};

const STEPS: usize = 1000;
const STREAMS: usize = 8;
const TOKENS: usize = 24;
/// The KV pool, all of which may become resident.
const KV: u64 = 2 << 20;
/// What the server may hold besides: activations, requests, one block on its way, what the allocator keeps.
const OVERHEAD: u64 = 8 << 20;

fn start(flags: &[&str]) -> ServerProcess {
    ServerProcess::start(Path::new(env!("CARGO_BIN_EXE_rheostat-under-test")), flags)
}

/// An artefact, and the bytes that the server holds with each number of its blocks.
struct Model {
    _folder: tempfile::TempDir,
    path: PathBuf,
    bytes: Vec<u64>,
}

impl Model {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = write_artefact(folder.path());
        let mut model = load(&path, &LoadOptions::default()).expect("it loads").model;
        let elastic = model.elastic().expect("it is elastic");
        let bytes = (0..=elastic.num_blocks()).map(|blocks| elastic.bytes_of(blocks)).collect();
        Self { _folder: folder, path, bytes }
    }

    fn path(&self) -> &str {
        self.path.to_str().expect("UTF-8")
    }

    /// The largest block.
    fn block(&self) -> u64 {
        self.bytes.windows(2).map(|pair| pair[1] - pair[0]).max().expect("blocks")
    }
}

async fn call(server: &ServerProcess, (method, path): (&str, &str), body: &Value) -> (u16, Value) {
    let (status, answer) = request(server.http, method, path, body.to_string().as_bytes()).await;
    let answer = serde_json::from_str(&answer).unwrap_or_else(|_| panic!("no JSON: {answer}"));
    (status, answer)
}

async fn set_weights(server: &ServerProcess, bytes: u64) -> (u16, Value) {
    call(server, ("PUT", "/admin/memory"), &json!({"weights": bytes, "timeout_seconds": 60})).await
}

/// What a request was answered: its tokens, and the parts of them with the blocks by which they were made.
struct Output {
    prompt: Vec<u32>,
    tokens: Vec<u32>,
    /// (blocks, tokens)
    served: Vec<(usize, usize)>,
    /// Parts that go on over KV of other blocks.
    continued: usize,
}

/// A greedy completion of `max_tokens` tokens.
async fn complete(
    server: &ServerProcess,
    prompt: &[u32],
    (max_tokens, compression): (usize, Value),
) -> Output {
    let body = json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
        "return_token_ids": true, "compression": compression});
    let (status, answer) = call(server, ("POST", "/v1/completions"), &body).await;
    assert_eq!(status, 200, "{answer}");
    let ids = |value: &Value| value.as_u64().expect("an id") as u32;
    let tokens = answer["choices"][0]["token_ids"].as_array().expect("ids").iter().map(ids).collect();
    let parts = answer["usage"]["compression"]["weights"]["served"].as_array().expect("parts");
    let count = |part: &Value, key: &str| part[key].as_u64().expect("a count") as usize;
    let served = parts.iter().map(|part| (count(part, "blocks"), count(part, "completion_tokens"))).collect();
    let continued = parts.iter().filter(|part| part["continues"] == true).count();
    Output { prompt: prompt.to_vec(), tokens, served, continued }
}

/// Prompts of 4 to 33 tokens, of which some begin alike.
fn prompt(index: usize) -> Vec<u32> {
    let shared = index % 3 * 8;
    (0..4 + index * 5 % 30)
        .map(|i| 4 + ((if i < shared { i } else { index + i }) * 37 % 240) as u32)
        .collect()
}

/// Sends requests one after the other until `stop`.
async fn stream(server: &ServerProcess, (first, stop): (usize, &AtomicBool)) -> Vec<Output> {
    let mut outputs = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let prompt = prompt(first + STREAMS * outputs.len());
        outputs.push(complete(server, &prompt, (TOKENS, json!({}))).await);
    }
    outputs
}

/// Moves the budget at random `steps` times, mostly by a few blocks, and looks at what is held after each, beside the
/// bytes that were resident before.
async fn walk((server, model): (&ServerProcess, &Model), (steps, resident): (usize, u64), stop: &AtomicBool) {
    let (most, mut blocks, mut state) = (model.bytes.len() - 1, 0, 9u64);
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for step in 0..steps {
        blocks = match step % 40 {
            39 => random(most + 1),
            _ => (blocks + random(13)).saturating_sub(6).min(most),
        };
        let budget = model.bytes[blocks] + random(2000) as u64;
        let (status, answer) = set_weights(server, budget).await;
        assert_eq!((status, &answer["reached"]), (200, &json!(true)), "{answer}");
        let held = answer["weights"]["held"].as_u64().expect("bytes");
        assert!(held <= budget && budget - held < model.block(), "{held} of {budget}");
        let now = server.resident_bytes();
        let allowed = resident + (budget - model.bytes[0]) + model.block() + KV + OVERHEAD;
        assert!(now <= allowed, "step {step}: {now} bytes are resident, {allowed} allowed");
    }
    stop.store(true, Ordering::Relaxed);
}

/// What the streams were answered while the budget of `server`, which begins with the base, walked `steps` times.
async fn walk_under_load(server: &ServerProcess, model: &Model, steps: usize) -> Vec<Output> {
    let (stop, resident) = (AtomicBool::new(false), server.resident_bytes());
    let streams = (0..STREAMS).map(|first| stream(server, (first, &stop)));
    let streams = futures_util::future::join_all(streams);
    let (outputs, ()) =
        futures_util::future::join(streams, walk((server, model), (steps, resident), &stop)).await;
    outputs.into_iter().flatten().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_budgets_under_load_fail_nobody_and_change_no_text() {
    let model = Model::new();
    let base = model.bytes[0].to_string();
    let kv = KV.to_string();
    let memory = ["--memory-weights", &base, "--memory-kv", &kv, "--max-num-batched-tokens", "64"];
    let memory = [&memory[..], &["--memory-on-shrink", "recompute"]].concat();
    let server = start(&[&["--model", model.path()], &memory[..]].concat());
    let resident = server.resident_bytes();
    let outputs = walk_under_load(&server, &model, STEPS).await;
    let moved = outputs.iter().filter(|output| output.served.len() > 1).count();
    assert!(outputs.len() > 50 && moved > 20, "{moved} of {} requests moved down", outputs.len());
    for output in outputs.iter().step_by(outputs.len() / 24) {
        let mut done = 0;
        for &(blocks, tokens) in &output.served {
            set_weights(&server, model.bytes[blocks]).await;
            let so_far: Vec<u32> = output.prompt.iter().chain(&output.tokens[..done]).copied().collect();
            let solo = complete(&server, &so_far, (tokens, json!({}))).await;
            assert_eq!(solo.served, [(blocks, tokens)]);
            assert_eq!(solo.tokens, output.tokens[done..done + tokens], "{:?}", output.served);
            done += tokens;
        }
        assert_eq!(done, TOKENS);
    }
    set_weights(&server, model.bytes[0]).await;
    let left = server.resident_bytes();
    assert!(left <= resident + KV + OVERHEAD, "{left} bytes are left of {resident}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shrink_lets_streams_go_on_unless_it_is_told_to_recompute() {
    let model = Model::new();
    let base = model.bytes[0].to_string();
    let server = start(&["--model", model.path(), "--memory-weights", &base]);
    let outputs = walk_under_load(&server, &model, STEPS / 10).await;
    let continued: usize = outputs.iter().map(|output| output.continued).sum();
    let parts: usize = outputs.iter().map(|output| output.served.len()).sum();
    assert!(continued > 10, "{continued} of {parts} parts");
    // What comes before the first change is that of its blocks alone; the rest needs the same changes at the same tokens.
    for output in outputs.iter().filter(|output| output.continued > 0).take(6) {
        assert_eq!(output.tokens.len(), TOKENS);
        let (blocks, tokens) = output.served[0];
        set_weights(&server, model.bytes[blocks]).await;
        let solo = complete(&server, &output.prompt, (tokens, json!({}))).await;
        assert_eq!(solo.tokens, output.tokens[..tokens], "{:?}", output.served);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_resize_by_http_grpc_and_a_signal_and_damage_stops_growing_only() {
    let model = Model::new();
    let most = model.bytes.len() - 1;
    let damaged = most - 40;
    let mut bytes = std::fs::read(&model.path).expect("the artefact");
    let artefact = Artefact::open(&model.path).expect("the artefact");
    bytes[artefact.stack()[damaged].offset as usize] ^= 1;
    std::fs::write(&model.path, bytes).expect("a writable folder");
    let config = model.path.with_file_name("rheostat.toml");
    let configure = |blocks: usize| {
        let text = format!(
            "[server]\nmodel = {:?}\n[memory]\nkv = \"2MiB\"\nweights = {}\n",
            model.path(),
            model.bytes[blocks]
        );
        std::fs::write(&config, text).expect("a writable folder");
    };
    configure(50);
    let server = start(&["--config", config.to_str().expect("UTF-8")]);
    let held = async |blocks: usize| {
        let (_, answer) = call(&server, ("GET", "/admin/memory"), &json!({})).await;
        answer["weights"]["held"] == json!(model.bytes[blocks])
    };
    assert!(held(50).await);
    let full = complete(&server, &prompt(1), (TOKENS, json!({}))).await;
    assert_eq!(full.served, [(50, TOKENS)]);

    let least = complete(&server, &prompt(1), (TOKENS, json!({"bitstack": {"levels": 1}}))).await;
    assert_eq!(least.served, [(0, TOKENS)]);
    assert_ne!(least.tokens, full.tokens, "other weights say something else");
    let body = json!({"prompt": "a", "compression": {"bitstack": {"levels": LEVELS + 1}}});
    let (status, answer) = call(&server, ("POST", "/v1/completions"), &body).await;
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("compression.bitstack.levels")), "{answer}");

    let (status, answer) = set_weights(&server, model.bytes[0] - 1).await;
    let message = answer["error"]["message"].as_str().expect("a message");
    assert!(status == 400 && message.contains(&model.bytes[0].to_string()), "{message}");

    let mut admin = AdminServiceClient::connect(format!("http://{}", server.grpc)).await.expect("it serves");
    let more = SetMemoryRequest { weights_bytes: Some(model.bytes[90]), ..SetMemoryRequest::default() };
    let answer = admin.set_memory(more).await.expect("a budget that fits").into_inner();
    let weights = answer.weights.expect("weights");
    assert_eq!((answer.reached, weights.blocks, weights.held_bytes), (true, 90, model.bytes[90]));

    configure(20);
    server.signal("HUP");
    until(async || held(20).await).await;
    configure(50);
    server.signal("HUP");
    until(async || held(50).await).await;
    assert_eq!(complete(&server, &prompt(1), (TOKENS, json!({}))).await.tokens, full.tokens);

    let (status, answer) = set_weights(&server, model.bytes[most]).await;
    let message = answer["error"]["message"].as_str().expect("a message");
    assert!(status == 500 && message.contains("checksum"), "{message}");
    assert!(held(damaged).await, "what came before the damaged block is held");
    let after = complete(&server, &prompt(1), (TOKENS, json!({}))).await;
    assert_eq!(after.served, [(damaged, TOKENS)]);
}
