//! From a path to a model that runs: a GGUF file, or a folder with a Hugging Face checkpoint.
//!
//! The file's bytes are read tensor by tensor, repacked by the layers and dropped; nothing of the file
//! stays mapped or held when [`load`] returns. A new architecture is one file in [`crate::models`] and
//! one arm here.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::config::DecoderConfig;
use crate::models::CausalLm;
use crate::models::decoder::CpuDecoder;
use crate::weights::WeightSource;
use crate::weights::gguf::{GgufFile, Metadata};
use crate::weights::safetensors::SafetensorsCheckpoint;
use crate::{Result, ZooError};

/// How a model is to be run.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Threads that share each matrix product.
    pub threads: NonZeroUsize,
}

impl Default for LoadOptions {
    /// As many threads as the machine runs at once.
    fn default() -> Self {
        Self { threads: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN) }
    }
}

/// A model ready to run, and where its tokenizer is to be found.
pub struct LoadedModel {
    /// The decoder.
    pub model: Box<dyn CausalLm>,
    /// The tokenizer's source.
    pub tokenizer: TokenizerSource,
}

/// Where a model's tokenizer and chat template are.
#[derive(Debug, Clone)]
pub enum TokenizerSource {
    /// In the metadata of the GGUF file.
    Gguf(Metadata),
    /// In `tokenizer.json` and `tokenizer_config.json` of this folder.
    Folder(PathBuf),
}

/// Loads the model at `path`: a GGUF file, or a folder with `config.json` and safetensors.
///
/// # Errors
/// [`ZooError::Io`] when a file cannot be read, [`ZooError::Format`] when one is malformed or lacks a
/// tensor, [`ZooError::Unsupported`] when the model needs what is not implemented.
pub fn load(path: &Path, options: &LoadOptions) -> Result<LoadedModel> {
    let metadata = std::fs::metadata(path).map_err(|e| ZooError::io(path, e))?;
    if metadata.is_dir() { load_folder(path, options) } else { load_gguf(path, options) }
}

fn load_gguf(path: &Path, options: &LoadOptions) -> Result<LoadedModel> {
    let file = GgufFile::open(path)?;
    let config = DecoderConfig::from_gguf(&file)?;
    let model = build(config, &file, options)?;
    Ok(LoadedModel { model, tokenizer: TokenizerSource::Gguf(file.into_metadata()) })
}

fn load_folder(folder: &Path, options: &LoadOptions) -> Result<LoadedModel> {
    let config = DecoderConfig::from_hf(&folder.join("config.json"))?;
    let checkpoint = SafetensorsCheckpoint::open(folder)?;
    let model = build(config, &checkpoint, options)?;
    Ok(LoadedModel { model, tokenizer: TokenizerSource::Folder(folder.to_owned()) })
}

fn build(
    config: DecoderConfig,
    weights: &dyn WeightSource,
    options: &LoadOptions,
) -> Result<Box<dyn CausalLm>> {
    Ok(Box::new(CpuDecoder::load(config, weights, options.threads.get())?))
}

/// SHA-256, in hex, over the bytes of the weight files at `path`, in the order of their names: the
/// identity of a model, whatever it is called.
///
/// # Errors
/// [`ZooError::Io`] when a file cannot be read.
pub fn weights_sha256(path: &Path) -> Result<String> {
    let mut files = vec![path.to_owned()];
    if path.is_dir() {
        let entries = std::fs::read_dir(path).map_err(|e| ZooError::io(path, e))?;
        files = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        files.retain(|file| file.extension().is_some_and(|extension| extension == "safetensors"));
        files.sort();
    }
    let mut hasher = Sha256::new();
    for file in files {
        let mut reader = std::fs::File::open(&file).map_err(|e| ZooError::io(&file, e))?;
        std::io::copy(&mut reader, &mut hasher).map_err(|e| ZooError::io(&file, e))?;
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
