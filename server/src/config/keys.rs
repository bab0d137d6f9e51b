//! `[[keys]]`: API keys, in the file alone.

use std::collections::BTreeSet;

use crate::auth::{KeyConfig, KeyHash, KeyLimits, Rate};

/// Bytes of a key's name: it is a label of metrics.
const MAX_NAME: usize = 64;

/// A key and its limits. What is not named is not limited.
#[derive(Debug, Clone, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyOptions {
    /// What logs and metrics call its clients.
    pub name: String,
    /// SHA-256 of the key, as `rheostat key` prints it.
    pub sha256: KeyHash,
    /// It may use the operators' endpoints too.
    #[serde(default)]
    pub admin: bool,
    /// Requests that are queued or running at once.
    pub max_concurrent_requests: Option<usize>,
    /// Prompt and sampled tokens that flow into its bucket during a minute.
    pub tokens_per_minute: Option<f64>,
    /// Tokens that the bucket holds; as many as flow in during a minute when it is not set.
    pub tokens_burst: Option<f64>,
    /// Joules that flow into its other bucket during a minute.
    pub joules_per_minute: Option<f64>,
    /// Joules that the bucket holds; as many as flow in during a minute when it is not set.
    pub joules_burst: Option<f64>,
}

/// The keys of a configuration.
///
/// # Errors
/// The first mistake, as a sentence.
pub(super) fn validate(keys: Vec<KeyOptions>) -> Result<Vec<KeyConfig>, String> {
    let mut names = BTreeSet::new();
    let mut hashes = BTreeSet::new();
    for key in &keys {
        let name = &key.name;
        let usual = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(usual) {
            return Err(format!(
                "keys: the name {name:?} must be 1 to {MAX_NAME} letters, digits, dots, dashes or underscores"
            ));
        }
        if !names.insert(name.clone()) {
            return Err(format!("keys: two keys have the name {name:?}; names must differ"));
        }
        if !hashes.insert(key.sha256.to_string()) {
            return Err(format!(
                "keys: {name:?} has the sha256 of another key; make one with `rheostat key`"
            ));
        }
    }
    keys.into_iter().map(key_config).collect()
}

fn key_config(key: KeyOptions) -> Result<KeyConfig, String> {
    let name = key.name;
    if key.max_concurrent_requests == Some(0) {
        return Err(format!("keys: max_concurrent_requests of {name:?} must be at least 1"));
    }
    let limits = KeyLimits {
        max_concurrent_requests: key.max_concurrent_requests,
        tokens: rate(&name, "tokens", (key.tokens_per_minute, key.tokens_burst))?,
        joules: rate(&name, "joules", (key.joules_per_minute, key.joules_burst))?,
    };
    Ok(KeyConfig { name, hash: key.sha256, admin: key.admin, limits })
}

fn rate(name: &str, unit: &str, given: (Option<f64>, Option<f64>)) -> Result<Option<Rate>, String> {
    let positive = |number: f64| number.is_finite() && number > 0.0;
    let rate = match given {
        (None, None) => return Ok(None),
        (None, Some(_)) => {
            return Err(format!("keys: {unit}_burst of {name:?} needs {unit}_per_minute beside it"));
        }
        (Some(per_minute), burst) => Rate { per_minute, burst: burst.unwrap_or(per_minute) },
    };
    if positive(rate.per_minute) && positive(rate.burst) {
        return Ok(Some(rate));
    }
    Err(format!("keys: {unit}_per_minute and {unit}_burst of {name:?} must be above 0"))
}
