use super::filter::Gaze;
use super::*;
use crate::compression::{CompressionOptions, Offer, registry};
use crate::vision::{EncodedImage, PromptImage};

const LAYERS_OF_MODEL: usize = 30;

/// An image of `num_tokens` tokens at `start`; the class token looks at later ones more.
fn image(start: usize, num_tokens: usize) -> PromptImage {
    let salience = (0..num_tokens).map(|i| i as f32).collect();
    let encoded = EncodedImage { rows: vec![0.0; 2 * num_tokens], places: None, salience };
    let embeddings = Arc::new(ImageEmbeddings::of((2, num_tokens), encoded, [start as u8; 32]));
    PromptImage { start, embeddings }
}

fn compile(options: Vision, images: &[PromptImage], prompt_len: usize) -> Result<Plan> {
    let options = CompressionOptions { vision: Some(options), ..CompressionOptions::default() };
    let offer = Offer::default();
    let context = Context {
        num_layers: LAYERS_OF_MODEL,
        head_dim: 64,
        prompt_len,
        max_tokens: 8,
        images,
        offer: &offer,
    };
    registry::compile(&options, &context)
}

fn thresholds(alpha: f32, beta: f32) -> Vision {
    Vision { alpha: Some(alpha), beta: Some(beta), ..Vision::default() }
}

/// Tokens that go on after the first filter, given by their index in the image.
fn selected(options: Vision, sums: &[f32], maxima: &[f32]) -> Vec<usize> {
    let images = [image(3, sums.len())];
    let plan = compile(options, &images, sums.len() + 9).expect("a valid plan");
    let filter = plan.filter().expect("a filter");
    let alive: Vec<usize> = images[0].range().collect();
    let kept = filter.select(0, (&filter.images[0], &alive), Gaze { sums, maxima });
    (0..kept.len()).filter(|&j| kept[j]).collect()
}

#[test]
fn published_defaults_are_filled_in_and_layers_scale_with_the_depth() {
    let plan = compile(Vision::default(), &[image(5, 576)], 600).expect("a valid plan");
    let expected = Vision {
        merge: Some(0.8),
        key_rate: Some(0.08),
        alpha: Some(0.001),
        beta: Some(0.001),
        layers: Some(vec![2, 6, 9, 13]),
        ..Vision::default()
    };
    assert_eq!(plan.options().vision, Some(expected));
    assert_eq!(default_layers(32), [2, 6, 10, 14]);
    assert_eq!(default_layers(2), [0]);
    let keys = |num_tokens| {
        let plan = compile(Vision::default(), &[image(0, num_tokens)], num_tokens + 9).expect("a valid plan");
        plan.filter().map(|filter| filter.images[0].keys.iter().flatten().count())
    };
    assert_eq!([576, 320, 64].map(keys), [Some(47), Some(26), Some(6)]);
}

#[test]
fn alpha_1_and_a_large_beta_leave_the_key_tokens_and_alpha_0_or_beta_0_leave_all() {
    let (sums, maxima) = (vec![0.01; 100], vec![0.002; 100]);
    // ⌈0.08 · 100⌉ tokens that the class token looks at most.
    assert_eq!(selected(thresholds(1.0, 1e9), &sums, &maxima), (92..100).collect::<Vec<_>>());
    for options in [thresholds(0.0, 1e9), thresholds(1.0, 0.0)] {
        assert_eq!(selected(options, &sums, &maxima).len(), 100);
    }
}

#[test]
fn a_token_goes_on_by_its_share_by_one_look_or_as_a_key_token() {
    let mut sums = vec![0.001; 50];
    let mut maxima = vec![0.0001; 50];
    (sums[7], maxima[20]) = (1.0, 0.01);
    let options = Vision { key_rate: Some(0.02), ..thresholds(0.01, 0.005) };
    assert_eq!(selected(options, &sums, &maxima), [7, 20, 49]);
}

#[test]
fn the_cap_is_hard_and_narrows_from_filter_to_filter() {
    let sums: Vec<f32> = (0..100).map(|i| ((i * 37) % 100) as f32).collect();
    let keep = |layers: Vec<usize>| Vision { keep: Some(10), layers: Some(layers), ..thresholds(0.0, 0.0) };
    // With one filter all of the cap counts there: of the eight key tokens five have reserved places.
    let kept = selected(keep(vec![4]), &sums, &sums);
    assert_eq!(kept.len(), 10);
    assert!((95..100).all(|key| kept.contains(&key)));
    let most: Vec<usize> =
        (95..100).map(|sum| (0..100).find(|i| i * 37 % 100 == sum).expect("a token")).collect();
    assert!(most.iter().all(|token| kept.contains(token)), "{kept:?}");

    let plan = compile(keep(vec![2, 6, 9]), &[image(4, 100), image(110, 8)], 130).expect("a valid plan");
    let filter = plan.filter().expect("a filter");
    assert_eq!([0, 1, 2].map(|point| filter.cap(point, 100)), [30, 15, 10]);
    assert_eq!([0, 1, 2].map(|point| filter.cap(point, 8)), [8; 3]);
    let demand = plan.kv_demand();
    let slots = |layer| demand.kv_len(layer, 130);
    assert_eq!([0, 2, 3, 6, 7, 9, 10].map(slots), [130, 130, 60, 60, 45, 45, 40]);
    // When the prompt is computed the cap holds in every layer.
    assert_eq!(demand.num_pages(1, 131), LAYERS_OF_MODEL * 41);
    assert_eq!(demand.filter().map(|filter| filter.whole()), Some(4..130));
    assert_eq!(demand.shareable_len(), 4);
}

#[test]
fn what_makes_no_sense_is_refused_with_a_sentence() {
    let json = |text: &str| serde_json::from_str::<Vision>(text).expect("options");
    for (options, says) in [
        (r#"{"keep": 0}"#, "at least 1"),
        (r#"{"baseline": "pool"}"#, "needs compression.vision.keep"),
        (r#"{"baseline": "pool", "keep": 4, "alpha": 0.1}"#, "`keep` and `seed` only"),
        (r#"{"seed": 4}"#, "baseline `random`"),
        (r#"{"alpha": 1.5}"#, "from 0 to 1"),
        (r#"{"merge": -0.1}"#, "0 or more"),
        (r#"{"layers": [3, 3]}"#, "must ascend"),
        (r#"{"layers": [30]}"#, "layers of the model, 0 to 29"),
    ] {
        let error = compile(json(options), &[image(0, 4)], 9).expect_err(says).to_string();
        assert!(error.starts_with("compression.vision") && error.contains(says), "{error}");
    }
    let error = compile(Vision::default(), &[image(0, MAX_WHOLE)], MAX_WHOLE + 9).expect_err("too long");
    assert!(error.to_string().contains("show fewer images"), "{error}");
    let blind =
        PromptImage { start: 0, embeddings: Arc::new(ImageEmbeddings::new(2, vec![0.0; 8], [0; 32])) };
    let error = compile(Vision::default(), &[blind], 9).expect_err("no salience");
    assert!(error.to_string().contains("send key_rate 0"), "{error}");
    let both = serde_json::from_str(r#"{"vision": {}, "think": {}}"#).expect("options");
    let offer = Offer::default();
    let context =
        Context { num_layers: 4, head_dim: 64, prompt_len: 9, max_tokens: 1, images: &[], offer: &offer };
    let error = registry::compile(&both, &context).expect_err("both").to_string();
    assert!(error.contains("compression.think and compression.vision exclude each other"), "{error}");
}
