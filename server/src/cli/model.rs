//! From the configured name to a model in memory.

use std::path::{Path, PathBuf};

use model_zoo::catalogue::{Catalogue, PullOptions, default_cache, pull};
use model_zoo::compression::Offer;
use model_zoo::loader::{LoadOptions, load};
use model_zoo::tokenizer::Tokenizer;

use crate::config::Config;
use crate::run::NamedModel;

/// Finds the configured model, pulls it if it is a catalogue's and not there, and loads it.
///
/// # Errors
/// A sentence: what is wrong and what to do.
pub fn open_model(config: &Config) -> Result<NamedModel, String> {
    let given = Path::new(&config.model);
    let (name, path, template) = if given.exists() {
        (name_of(given), given.to_owned(), None)
    } else {
        let catalogue = catalogue(config.catalogue.as_deref())?;
        let entry = catalogue.get(&config.model).map_err(|e| e.to_string())?;
        let path = pull(entry, &pull_options(config.cache.clone())).map_err(|e| e.to_string())?;
        (entry.name.clone(), path, entry.chat_template.clone())
    };
    let begin = std::time::Instant::now();
    let options = LoadOptions { threads: config.engine.threads };
    let loaded = load(&path, &options).map_err(|e| e.to_string())?;
    let tokenizer = Tokenizer::load(&loaded.tokenizer, template.as_deref()).map_err(|e| e.to_string())?;
    let (weights_mib, seconds) = (loaded.model.dims().weight_bytes >> 20, begin.elapsed().as_secs_f32());
    tracing::info!(name, path = %path.display(), weights_mib, seconds, "model loaded");
    Ok(NamedModel { name, loaded, tokenizer, offer: Offer::default() })
}

/// A file's name without `.gguf`, a folder's name.
fn name_of(path: &Path) -> String {
    let full = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = full.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned());
    name.strip_suffix(".gguf").map_or(name.clone(), str::to_owned)
}

pub(super) fn catalogue(extra: Option<&Path>) -> Result<Catalogue, String> {
    match extra {
        None => Catalogue::builtin(),
        Some(path) => Catalogue::with_file(path),
    }
    .map_err(|e| e.to_string())
}

pub(super) fn pull_options(cache: Option<PathBuf>) -> PullOptions {
    PullOptions { cache: cache.unwrap_or_else(default_cache), progress: true, ..PullOptions::default() }
}
