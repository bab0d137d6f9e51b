//! What requests can ask of a model: its calibration artefact, and the operator's profiles.

use std::path::{Path, PathBuf};

use model_zoo::compression::{Calibration, CompressionOptions, Context, Offer, calibration, registry};
use model_zoo::loader::weights_sha256;
use model_zoo::models::ModelDims;

use super::model::Found;

/// Where `rheostat calibrate` puts the artefact of the model at `path`, and the server looks for it.
pub(super) fn artefact_path(path: &Path) -> PathBuf {
    if path.is_dir() {
        return path.join("calibration.toml");
    }
    path.with_extension("calibration.toml")
}

/// The artefact that the operator names, else the one beside the weights, else the shipped one.
///
/// # Errors
/// A sentence, when it cannot be read or is of another model.
pub(super) fn calibration(
    found: &Found,
    given: Option<&Path>,
    dims: &ModelDims,
) -> Result<Option<Calibration>, String> {
    let beside = artefact_path(&found.path);
    let path = given.or(beside.exists().then_some(beside.as_path()));
    let (text, origin) = match path {
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
            (text, path.display().to_string())
        }
        None => match calibration::shipped(&found.name) {
            Some(text) => (text.to_owned(), "shipped".to_owned()),
            None => return Ok(None),
        },
    };
    let digest = weights_sha256(&found.path).map_err(|e| e.to_string())?;
    match Calibration::parse(&text, dims.num_layers, &digest) {
        Ok(calibration) => {
            tracing::info!(origin, "calibration loaded");
            Ok(Some(calibration))
        }
        // A model of one's own may have the name of a shipped one.
        Err(error) if path.is_none() => {
            tracing::warn!(%error, "the shipped calibration is not used");
            Ok(None)
        }
        Err(error) => Err(format!("{origin}: {error}")),
    }
}

/// An offer whose every profile compiles.
///
/// # Errors
/// The profile that does not, and why.
pub(crate) fn checked(offer: Offer, dims: &ModelDims) -> Result<Offer, String> {
    for name in offer.profile_names() {
        let context = Context {
            num_layers: dims.num_layers,
            head_dim: dims.head_dim,
            prompt_len: 1,
            max_tokens: 1,
            images: &[],
            offer: &offer,
        };
        let options = CompressionOptions { profile: Some(name.clone()), ..CompressionOptions::default() };
        registry::compile(&options, &context).map_err(|e| format!("profiles.{name}: {e}"))?;
    }
    Ok(offer)
}
