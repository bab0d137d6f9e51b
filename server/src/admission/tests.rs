use futures_util::FutureExt;
use model_zoo::compression::Offer;
use model_zoo::models::ModelDims;

use super::*;
use crate::energy::Energy;
use crate::images::ImageLimits;
use crate::request::{ChatPrompt, SamplingParams};
use crate::telemetry::{Metrics, MetricsCompat, ServedModel};

fn admission(max_concurrent_requests: usize) -> Admission {
    let dims = ModelDims {
        architecture: "toy".into(),
        num_layers: 2,
        hidden_size: 8,
        num_heads: 1,
        num_kv_heads: 1,
        head_dim: 8,
        vocab_size: 300,
        max_context: 64,
        weight_bytes: 0,
        sublayer_weights: [1; 2],
    };
    let model = ModelInfo {
        name: "toy".into(),
        created: 0,
        dims,
        block_size: 16,
        most_model_len: 64,
        max_model_len: 64.into(),
        offer: Offer::default().into(),
    };
    let limits = Limits { max_concurrent_requests, ..Limits::default() };
    let metrics = Arc::new(Metrics::new(&ServedModel::default(), MetricsCompat::None));
    let images = Images::new(None, ImageLimits::default(), metrics, Arc::new(Energy::off()));
    Admission::new(Arc::new(model), Arc::new(Tokenizer::toy()), images, limits)
}

fn request() -> RawRequest {
    RawRequest { prompt: Prompt::Tokens(vec![1, 2, 3]), n: 1, ..RawRequest::default() }
}

fn with(sampling: SamplingParams) -> RawRequest {
    RawRequest { sampling, ..request() }
}

async fn refused(raw: RawRequest) -> Error {
    match admission(4).admit(raw).await {
        Err(error) => error,
        Ok((request, _)) => panic!("{request:?} was admitted"),
    }
}

#[tokio::test]
async fn what_is_left_out_gets_its_default() {
    let admission = admission(4);
    let (text, _held) = admission.admit(request()).await.expect("admitted");
    assert_eq!((text.max_tokens, text.n, text.prompt.len()), (16, 1, 3));
    assert!(text.sampling.seed.is_some() && !text.id.is_empty());
    let raw = RawRequest { prompt: Prompt::Tokens(vec![1; 60]), ..request() };
    let (long, _held) = admission.admit(raw).await.expect("admitted");
    assert_eq!(long.max_tokens, 4, "no more than the context has room for");
}

#[tokio::test]
async fn every_mistake_names_its_field() {
    let p = SamplingParams::default;
    let many = |n: usize| (0..n).map(|i| format!("s{i}")).collect::<Vec<_>>();
    for (raw, param, says) in [
        (RawRequest { prompt: Prompt::Tokens(vec![]), ..request() }, "prompt", "empty"),
        (
            RawRequest { prompt: Prompt::Text(String::new()), add_special_tokens: Some(false), ..request() },
            "prompt",
            "empty",
        ),
        (RawRequest { prompt: Prompt::Tokens(vec![1; 65]), ..request() }, "prompt", "65 tokens"),
        (RawRequest { prompt: Prompt::Tokens(vec![300]), ..request() }, "prompt", "300"),
        (RawRequest { prompt: Prompt::Text("x".repeat(2 << 20)), ..request() }, "prompt", "bytes"),
        (RawRequest { prompt: Prompt::Chat(Box::default()), ..request() }, "messages", "empty"),
        (RawRequest { max_tokens: Some(-1), ..request() }, "max_tokens", "negative"),
        (RawRequest { max_tokens: Some(62), ..request() }, "max_tokens", "lower max_tokens to 61"),
        (RawRequest { max_tokens: Some(0), ..request() }, "max_tokens", "at least 1"),
        (RawRequest { n: 0, ..request() }, "n", "between 1 and 128"),
        (RawRequest { n: 129, ..request() }, "n", "between 1 and 128"),
        (RawRequest { n: i64::MAX, ..request() }, "n", "between 1 and 128"),
        (with(SamplingParams { temperature: f32::NAN, ..p() }), "temperature", "NaN"),
        (with(SamplingParams { temperature: -0.5, ..p() }), "temperature", "-0.5"),
        (with(SamplingParams { temperature: f32::INFINITY, ..p() }), "temperature", "inf"),
        (with(SamplingParams { top_p: 0.0, ..p() }), "top_p", "top_p"),
        (with(SamplingParams { top_p: 1.1, ..p() }), "top_p", "1.1"),
        (with(SamplingParams { min_p: -1.0, ..p() }), "min_p", "-1"),
        (with(SamplingParams { presence_penalty: 2.5, ..p() }), "presence_penalty", "2.5"),
        (with(SamplingParams { frequency_penalty: f32::NAN, ..p() }), "frequency_penalty", "NaN"),
        (with(SamplingParams { repetition_penalty: 0.0, ..p() }), "repetition_penalty", "0"),
        (with(SamplingParams { logprobs: Some(21), ..p() }), "logprobs", "20"),
        (with(SamplingParams { stop: many(10_000), ..p() }), "stop", "10000"),
        (with(SamplingParams { stop: vec![String::new()], ..p() }), "stop", "empty"),
        (with(SamplingParams { stop: vec!["x".repeat(300)], ..p() }), "stop", "300 bytes"),
        (with(SamplingParams { stop_token_ids: vec![1; 65], ..p() }), "stop_token_ids", "65"),
        (
            with(SamplingParams { logit_bias: (0..1025).map(|i| (i, 0.0)).collect(), ..p() }),
            "logit_bias",
            "1025",
        ),
        (with(SamplingParams { logit_bias: [(300, 0.0)].into(), ..p() }), "logit_bias", "300"),
        (with(SamplingParams { logit_bias: [(1, 101.0)].into(), ..p() }), "logit_bias", "101"),
    ] {
        let error = refused(raw).await;
        assert_eq!(
            (error.kind, error.param.as_deref()),
            (ErrorKind::InvalidArgument, Some(param)),
            "{error}"
        );
        assert!(error.message.contains(says), "{error} does not say {says:?}");
    }
    let chat = ChatPrompt { images: vec![ImageSource::Bytes(vec![1])], ..showing_one() };
    let error = refused(RawRequest { prompt: Prompt::Chat(Box::new(chat)), ..request() }).await;
    assert_eq!((error.kind, error.param.as_deref()), (ErrorKind::InvalidArgument, Some("messages")));
    assert!(error.message.contains("does not see images"), "{error}");
    let error = refused(RawRequest { model: "other".into(), ..request() }).await;
    assert_eq!((error.kind, error.param.as_deref()), (ErrorKind::NotFound, Some("model")));
}

/// A chat whose only message shows an image.
fn showing_one() -> ChatPrompt {
    let parts = serde_json::json!([{"type": "image"}, {"type": "text", "text": "what is it?"}]);
    ChatPrompt {
        messages: vec![serde_json::json!({"role": "user", "content": parts})],
        add_generation_prompt: true,
        ..ChatPrompt::default()
    }
}

#[tokio::test]
async fn ids_and_permits_are_held_as_long_as_the_guard() {
    let admission = admission(2);
    let named = |id: &str| RawRequest { id: id.into(), ..request() };
    let (_, first) = admission.admit(named("a")).await.expect("admitted");
    let duplicate = admission.admit(named("a")).await.err().expect("refused");
    assert_eq!(duplicate.kind, ErrorKind::InvalidArgument);
    let (_, second) = admission.admit(named("b")).await.expect("admitted");
    let full = admission.admit(named("c")).await.err().expect("refused");
    assert_eq!(full.kind, ErrorKind::Overloaded);
    assert!(admission.check_live("a", &Caller::default()).is_ok());
    drop(first);
    assert_eq!(
        admission.check_live("a", &Caller::default()).err().map(|e| e.kind),
        Some(ErrorKind::NotFound)
    );
    assert!(admission.admit(named("a")).await.is_ok());
    drop(second);
    admission.live().drained().await;
}

#[tokio::test]
async fn the_queue_has_a_limit_of_its_own_until_requests_run() {
    let admission = admission(9);
    admission.set_limits(Limits { max_queued_requests: 2, ..Limits::default() });
    let (first, _one) = admission.admit(request()).await.expect("room");
    let (second, two) = admission.admit(request()).await.expect("room");
    let Err(refused) = admission.admit(request()).await else { panic!("two wait") };
    assert_eq!((refused.kind, refused.kind.retry_after_s()), (ErrorKind::Overloaded, Some(1)));
    assert!(refused.message.contains("2 requests wait"), "{}", refused.message);
    // One runs, and a second time after a preemption: one place is free, and no more.
    let place = first.queued.as_ref().expect("a place");
    place.leave();
    place.leave();
    let (_third, _three) = admission.admit(request()).await.expect("room again");
    assert!(admission.admit(request()).await.is_err());
    // One goes away while it waits.
    drop((second, two));
    assert!(admission.admit(request()).await.is_ok());
    assert!(admission.live().drained().now_or_never().is_none(), "the first and the third still live");
}

#[tokio::test]
async fn auto_is_the_governors_choice_and_refused_where_there_is_none() {
    use crate::governor::{Front, Policy};
    use crate::telemetry::{Metrics, MetricsCompat, ServedModel};
    let compression = CompressionOptions { profile: Some("auto".into()), ..CompressionOptions::default() };
    let auto = RawRequest { compression, ..request() };
    let error = refused(auto.clone()).await;
    assert!(error.message.contains("rheostat calibrate"), "{error:?}");
    let policy = Policy { ttft_ms: 1.0, tpot_ms: 1.0, cap_watts: None, hold_s: 1.0, calm_s: 1.0 };
    let metrics = Arc::new(Metrics::new(&ServedModel::default(), MetricsCompat::None));
    let governor = Governor::new(Front::new(Vec::new(), 1.0), policy, None, Arc::clone(&metrics));
    let admission = admission(4).governed_by(Some(Arc::new(governor)));
    let (admitted, _held) = admission.admit(auto).await.expect("admitted");
    assert_eq!((&*admitted.profile, admitted.plan.runs_all()), ("dense", true));
    assert!(metrics.render().contains("rheostat_governor_requests_total{profile=\"dense\"} 1"));
}
