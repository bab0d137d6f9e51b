//! From the configured name to a model in memory.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use model_zoo::catalogue::{Catalogue, PullOptions, default_cache, pull};
use model_zoo::compression::Offer;
use model_zoo::loader::{LoadOptions, LoadedModel, base_of, load};
use model_zoo::tokenizer::Tokenizer;

use super::offer;
use crate::config::Config;
use crate::config::device::DeviceChoice;
use crate::run::NamedModel;

/// Which model a command is about.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct ModelFlags {
    /// A name of the catalogue, a GGUF file, or a Hugging Face folder
    #[arg(long, env = "RHEOSTAT_MODEL", default_value = "smollm2-135m")]
    pub(super) model: String,
    /// Folder for pulled models [default: the user's cache folder]
    #[arg(long, env = "RHEOSTAT_CACHE")]
    pub(super) cache: Option<PathBuf>,
    /// TOML file with further catalogue entries
    #[arg(long, env = "RHEOSTAT_CATALOGUE")]
    pub(super) catalogue: Option<PathBuf>,
    /// Compute threads [default: all cores]
    #[arg(long, env = "RHEOSTAT_THREADS")]
    pub(super) threads: Option<NonZeroUsize>,
}

/// A model on disk.
#[derive(Debug, Clone)]
pub(super) struct Found {
    pub(super) name: String,
    pub(super) path: PathBuf,
    template: Option<String>,
}

impl ModelFlags {
    /// Finds the model, pulls it if it is a catalogue's and not there.
    ///
    /// # Errors
    /// A sentence: what is wrong and what to do.
    pub(super) fn find(&self) -> Result<Found, String> {
        let given = Path::new(&self.model);
        if given.exists() {
            return Ok(Found { name: name_of(given), path: given.to_owned(), template: None });
        }
        let catalogue = catalogue(self.catalogue.as_deref())?;
        let entry = catalogue.get(&self.model).map_err(|e| e.to_string())?;
        let path = pull(entry, &pull_options(self.cache.clone())).map_err(|e| e.to_string())?;
        Ok(Found { name: entry.name.clone(), path, template: entry.chat_template.clone() })
    }

    /// The file that the decoder at `path` is based on, pulled if need be.
    fn base(&self, path: &Path) -> Result<Option<PathBuf>, String> {
        let Some(base) = base_of(path).map_err(|e| e.to_string())? else { return Ok(None) };
        let catalogue = catalogue(self.catalogue.as_deref())?;
        let entry = catalogue.get(&base.model).map_err(|e| format!("{}: {e}", path.display()))?;
        if base.sha256.is_some() && base.sha256 != entry.sha256 {
            let name = &base.model;
            return Err(format!("{}: its base is another {name} than the catalogue's", path.display()));
        }
        pull(entry, &pull_options(self.cache.clone())).map(Some).map_err(|e| e.to_string())
    }

    /// Loads what was found onto `device`, in `weight_budget` bytes at most.
    ///
    /// # Errors
    /// As [`ModelFlags::find`].
    pub(super) fn load(
        &self,
        found: &Found,
        (device, weight_budget): (DeviceChoice, Option<u64>),
    ) -> Result<(LoadedModel, Tokenizer), String> {
        let begin = std::time::Instant::now();
        let threads = self.threads.unwrap_or(LoadOptions::default().threads);
        let device = device.open()?;
        let options = LoadOptions { threads, base: self.base(&found.path)?, weight_budget, device };
        let loaded = load(&found.path, &options).map_err(|e| e.to_string())?;
        let tokenizer =
            Tokenizer::load(&loaded.tokenizer, found.template.as_deref()).map_err(|e| e.to_string())?;
        let (weights_mib, seconds) = (loaded.model.dims().weight_bytes >> 20, begin.elapsed().as_secs_f32());
        let device = loaded.model.device();
        tracing::info!(name = found.name, path = %found.path.display(), device, weights_mib, seconds, "model loaded");
        Ok((loaded, tokenizer))
    }
}

/// Finds the configured model and loads it, with its calibration.
///
/// # Errors
/// A sentence: what is wrong and what to do.
pub fn open_model(config: &Config) -> Result<NamedModel, String> {
    let flags = ModelFlags {
        model: config.model.clone(),
        cache: config.cache.clone(),
        catalogue: config.catalogue.clone(),
        threads: Some(config.engine.threads),
    };
    let found = flags.find()?;
    let (mut loaded, tokenizer) = flags.load(&found, (config.engine.device, config.engine.weight_bytes))?;
    let levels = loaded.model.elastic().map(|elastic| elastic.num_levels());
    let calibration = offer::calibration(&found, config.calibration.as_deref(), loaded.model.dims())?;
    let offer = Offer { calibration, profiles: config.profiles.clone(), levels };
    let offer = offer::checked(offer, loaded.model.dims())?;
    Ok(NamedModel { name: found.name, loaded, tokenizer, offer })
}

/// A file's name without its ending, a folder's name.
fn name_of(path: &Path) -> String {
    let full = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = full.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned());
    let stem = [".gguf", ".bitstack"].iter().find_map(|ending| name.strip_suffix(ending));
    stem.map_or(name.clone(), str::to_owned)
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
