use super::options::{DropLayers, SkipDecode};
use super::*;

fn offer() -> Offer {
    let similarity = vec![0.9; 8];
    let ffn_skip = calibration::FfnCalibration {
        first_layer: 2,
        end_layer: 6,
        thresholds: vec![
            calibration::FfnThreshold { target: 0.1, threshold: 0.8, max_skip: 1, reached: 0.1 },
            calibration::FfnThreshold { target: 0.3, threshold: 0.6, max_skip: 1, reached: 0.3 },
        ],
    };
    let eco = CompressionOptions {
        drop: Some(DropLayers { attention: 2, ..DropLayers::default() }),
        skip_decode: Some(SkipDecode::default()),
        ..CompressionOptions::default()
    };
    let calibration = Calibration {
        version: calibration::VERSION,
        attention_similarity: similarity.clone(),
        ffn_similarity: similarity,
        ffn_skip,
        profiles: BTreeMap::from([("eco".to_owned(), eco)]),
        ..Calibration::default()
    };
    let own = CompressionOptions {
        drop: Some(DropLayers { ffn: 1, ..DropLayers::default() }),
        ..CompressionOptions::default()
    };
    let profiles = BTreeMap::from([("night".to_owned(), own)]);
    Offer { calibration: Some(calibration), profiles, levels: Some(6) }
}

fn compile(json: serde_json::Value, offer: &Offer) -> Result<Plan> {
    let options = serde_json::from_value(json).expect("valid options");
    let context =
        Context { num_layers: 8, head_dim: 64, prompt_len: 100, max_tokens: 50, images: &[], offer };
    registry::compile(&options, &context)
}

#[test]
fn what_does_not_fit_is_refused_with_a_sentence_that_names_it() {
    use serde_json::json;
    for (options, says) in [
        (json!({"profile": "fast"}), r#"it has "dense", "eco", "night""#),
        (json!({"skip_decode": {}, "ffn_skip": {}}), "compression.skip_decode and compression.ffn_skip"),
        (json!({"drop": {"attention": 1}, "ffn_skip": {}}), "compression.drop and compression.ffn_skip"),
        (json!({"drop": {"attention": 7}}), "this model can drop 6"),
        (json!({"drop": {"joint": 1, "ffn": 1}}), "joint"),
        (json!({"ffn_skip": {"target": 0.7}}), "from 0 to 0.6"),
        (json!({"ffn_skip": {"target": 0.5}}), "thresholds up to 0.3"),
        (json!({"ffn_skip": {"quorum": 0}}), "quorum"),
        (json!({"skip_decode": {"min_layers": 9}}), "min_layers"),
        (json!({"skip_decode": {"horizon": 0}}), "horizon"),
        (json!({"bitstack": {"levels": 7}}), "1 to 6"),
        (json!({"bitstack": {"levels": 0}}), "1 to 6"),
    ] {
        let error = compile(options.clone(), &offer()).expect_err(&options.to_string()).to_string();
        assert!(error.contains(says), "{options}: {error}");
    }
    let error = compile(json!({"drop": {"attention": 1}}), &Offer::default()).expect_err("no calibration");
    assert!(error.to_string().contains("rheostat calibrate"), "{error}");
    let error = compile(json!({"bitstack": {}}), &Offer::default()).expect_err("whole weights").to_string();
    assert!(error.contains("compression.bitstack") && error.contains("no levels"), "{error}");
    let levels = |json| compile(json, &offer()).expect("compiles").levels();
    assert_eq!(
        [json!({}), json!({"bitstack": {}}), json!({"bitstack": {"levels": 2}})].map(levels),
        [None, Some(6), Some(2)]
    );
}

#[test]
fn what_is_given_wins_over_the_profile() {
    use serde_json::json;
    let offer = offer();
    let same =
        |a, b| assert_eq!(compile(a, &offer).expect("compiles"), compile(b, &offer).expect("compiles"));
    same(json!({"profile": "dense"}), json!({}));
    same(json!({"profile": "night"}), json!({"drop": {"ffn": 1}}));
    same(
        json!({"profile": "eco", "drop": {"attention": 1}}),
        json!({"skip_decode": {}, "drop": {"attention": 1}}),
    );
    // Asked for by name, FFN skipping takes the place of the profile's SkipDecode.
    same(
        json!({"profile": "eco", "ffn_skip": {"threshold": 0.5}}),
        json!({"drop": {"attention": 2}, "ffn_skip": {"threshold": 0.5}}),
    );
}

#[test]
fn an_artefact_comes_back_as_written_and_fits_its_model_alone() {
    let mut calibration = offer().calibration.expect("set above");
    calibration.source.weights_sha256 = "a1b2".into();
    let text = calibration.to_toml().expect("TOML can hold it");
    assert_eq!(Calibration::parse(&text, 8, "a1b2").expect("parses"), calibration);
    for (layers, sha, says) in [(8, "ffff", "another model"), (9, "a1b2", "9 layers")] {
        let error = Calibration::parse(&text, layers, sha).expect_err(says).to_string();
        assert!(error.contains(says), "{error}");
    }
    let old = text.replace("version = 1", "version = 0");
    assert!(Calibration::parse(&old, 8, "a1b2").expect_err("old").to_string().contains("version 0"));
    let (threshold, max_skip) = calibration.ffn_threshold(0.2).expect("within");
    assert!((threshold - 0.7).abs() < 1e-6 && max_skip == 1);
}

#[test]
fn keys_differ_where_the_prompts_kv_differs() {
    use serde_json::json;
    let offer = offer();
    let key = |options| compile(options, &offer).expect("compiles").key();
    let dense = key(json!({}));
    assert_eq!(key(json!({"skip_decode": {}})), dense);
    assert_eq!(key(json!({"ffn_skip": {}})), dense);
    let dropped = key(json!({"drop": {"attention": 2}}));
    assert_ne!(dropped, dense);
    assert_ne!(dropped, key(json!({"drop": {"ffn": 2}})));
    assert_ne!(dropped, key(json!({"drop": {"attention": 3}})));
    // What was generated in another way than the prompt is nobody else's.
    let demand = compile(json!({"skip_decode": {}}), &offer).expect("compiles").kv_demand();
    assert_eq!(demand.shareable_len(), 100);
}
