//! What the tests of models share.

use std::path::{Path, PathBuf};

use model_zoo::config::DecoderConfig;

/// The folder of tiny models and their expected logits.
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// The config of a fixture as transformers wrote it, with some keys replaced.
pub fn config_with(fixture: &str, changes: serde_json::Value) -> model_zoo::Result<DecoderConfig> {
    let text = std::fs::read_to_string(fixtures().join(fixture).join("config.json")).unwrap();
    let mut config = serde_json::from_str::<serde_json::Value>(&text).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    DecoderConfig::from_hf(&path)
}
