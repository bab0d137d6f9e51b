//! Calibration of a tiny model, and of what the shipped artefact says.

use model_zoo::calibrate::{Settings, Text, calibrate};
use model_zoo::compression::Calibration;
use model_zoo::compression::calibration::{Source, shipped};
use model_zoo::loader::{LoadOptions, load, weights_sha256};

use crate::download::smollm2;
use crate::tiny::{LAYERS, write};

fn tiny(folder: &std::path::Path) -> Calibration {
    let mut model = load(folder, &LoadOptions::default()).unwrap().model;
    let tokens: Vec<u32> = (0..800).map(|i| (i * i * 31 + i * 7) % 256).collect();
    let settings =
        Settings { window: 64, prompt: 16, similarity_windows: 4, threshold_windows: 2, preset_windows: 3 };
    let source = Source { weights_sha256: weights_sha256(folder).unwrap(), ..Source::default() };
    let mut stages = Vec::new();
    let text = Text { tokens: &tokens, bos: None };
    let calibration = calibrate(model.as_mut(), text, (&settings, source), &mut |progress| {
        assert!(progress.done <= progress.total);
        stages.push(progress.stage);
    });
    stages.dedup();
    assert_eq!(stages, ["similarity", "thresholds", "presets"]);
    calibration.unwrap()
}

#[test]
fn a_block_that_does_nothing_is_the_least_important_and_results_repeat() {
    let is_idle =
        |name: &str| name.contains("layers.3.self_attn.o_proj") || name.contains("layers.3.mlp.down_proj");
    let model = write(is_idle);
    let calibration = tiny(model.path());
    assert_eq!(calibration.attention_similarity[3], 1.0);
    assert_eq!((calibration.attention_order()[0], calibration.ffn_order()[0]), (3, 3));
    // The best preset of any limit drops at least what costs nothing.
    let free = calibration.tried.iter().find(|t| t.plan.drop.is_some_and(|d| (d.attention, d.ffn) == (1, 1)));
    assert_eq!(free.unwrap().perplexity_increase, 0.0);
    assert_ne!(calibration.profiles["balanced"], Default::default());
    assert_eq!(calibration, tiny(model.path()));
    let text = calibration.to_toml().unwrap();
    let digest = weights_sha256(model.path()).unwrap();
    assert_eq!(Calibration::parse(&text, LAYERS, &digest).unwrap(), calibration);
    let other = weights_sha256(write(|_| false).path()).unwrap();
    assert!(Calibration::parse(&text, LAYERS, &other).is_err());
}

#[test]
fn the_shipped_artefact_is_of_the_model_that_the_catalogue_pulls() {
    let digest = weights_sha256(&smollm2()).unwrap();
    let calibration = Calibration::parse(shipped("smollm2-135m").unwrap(), 30, &digest).unwrap();
    assert!(calibration.profiles.contains_key("balanced") && calibration.profiles.contains_key("eco"));
}
