//! From a path to a model that runs: a GGUF file, a BitStack artefact, or a folder with a Hugging Face checkpoint.
//!
//! The file's bytes are read tensor by tensor, repacked by the layers and dropped; nothing of the file
//! stays mapped or held when [`load`] returns. A new architecture is one file in [`crate::models`] and
//! one arm here.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::compression::bitstack::Artefact;
use crate::compression::bitstack::serve::ArtefactLevels;
use crate::config::DecoderConfig;
use crate::config::json::JsonObject;
use crate::config::llava::LlavaConfig;
use crate::kernels::cpu::isa::Isa;
use crate::models::CausalLm;
use crate::models::decoder::CpuDecoder;
use crate::vision::Vision;
use crate::vision::clip::ClipEncoder;
use crate::vision::processor::ImageProcessor;
use crate::weights::WeightSource;
use crate::weights::gguf::{GgufFile, Metadata};
use crate::weights::levels::LevelSource;
use crate::weights::merged::Merged;
use crate::weights::renamed::Renamed;
use crate::weights::safetensors::SafetensorsCheckpoint;
use crate::{Result, ZooError};

/// How a model is to be run.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Threads that share each matrix product.
    pub threads: NonZeroUsize,
    /// The file of the model that the decoder of a folder is based on, where [`base_of`] names one.
    pub base: Option<PathBuf>,
    /// Bytes that the weights may take; `None` for all of them.
    pub weight_budget: Option<u64>,
    /// What the decoder runs on.
    pub device: Target,
}

/// What a decoder runs on.
#[derive(Debug, Clone, Default)]
pub enum Target {
    /// The CPU.
    #[default]
    Cpu,
    /// A GPU, or what takes its place in tests.
    #[cfg(any(feature = "cuda", feature = "cuda-emulated"))]
    Device(std::sync::Arc<dyn crate::kernels::cuda::device::Device>),
}

impl Target {
    /// The NVIDIA GPU of this index.
    ///
    /// # Errors
    /// [`ZooError::Device`] when there is none, or when this build has no kernels for it: what to do.
    pub fn gpu(index: usize) -> Result<Self> {
        #[cfg(feature = "cuda")]
        {
            Ok(Self::Device(std::sync::Arc::new(crate::kernels::cuda::driver::Gpu::open(index)?)))
        }
        #[cfg(not(feature = "cuda"))]
        {
            Err(ZooError::Device(format!(
                "GPU {index} cannot be used: this rheostat was built without the feature `cuda`; build it with deploy/cuda/build, or use device = \"cpu\""
            )))
        }
    }

    /// Joules that the device has used since its driver was loaded, where it has a meter.
    pub fn joules(&self) -> Option<f64> {
        match self {
            Self::Cpu => None,
            #[cfg(any(feature = "cuda", feature = "cuda-emulated"))]
            Self::Device(device) => device.joules(),
        }
    }
}

impl Default for LoadOptions {
    /// As many threads as the machine runs at once.
    fn default() -> Self {
        Self {
            threads: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
            base: None,
            weight_budget: None,
            device: Target::Cpu,
        }
    }
}

/// A model ready to run, and where its tokenizer is to be found.
pub struct LoadedModel {
    /// The decoder.
    pub model: Box<dyn CausalLm>,
    /// The tokenizer's source.
    pub tokenizer: TokenizerSource,
    /// What it needs to see images, if it can.
    pub vision: Option<Vision>,
}

/// Where a model's tokenizer and chat template are.
#[derive(Debug, Clone)]
pub enum TokenizerSource {
    /// In the metadata of the GGUF file.
    Gguf(Metadata),
    /// In `tokenizer.json` and `tokenizer_config.json` of this folder.
    Folder(PathBuf),
    /// The same files in memory.
    Files(TokenizerFiles),
}

/// A tokenizer's files, read from elsewhere than a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizerFiles {
    /// What error messages name.
    pub origin: PathBuf,
    /// The files' texts by name.
    pub files: BTreeMap<String, String>,
}

/// Loads the model at `path`: a GGUF file, a BitStack artefact, or a folder with `config.json` and safetensors.
///
/// # Errors
/// [`ZooError::Io`] when a file cannot be read, [`ZooError::Format`] when one is malformed or lacks a
/// tensor, [`ZooError::Unsupported`] when the model needs what is not implemented, [`ZooError::WeightBudget`] when
/// it does not fit the budget.
pub fn load(path: &Path, options: &LoadOptions) -> Result<LoadedModel> {
    let metadata = std::fs::metadata(path).map_err(|e| ZooError::io(path, e))?;
    if metadata.is_dir() {
        return load_folder(path, options);
    }
    if Artefact::is_artefact(path) { load_artefact(path, options) } else { load_gguf(path, options) }
}

/// A model whose weights come in levels: of these as many as the budget holds.
fn load_artefact(path: &Path, options: &LoadOptions) -> Result<LoadedModel> {
    let artefact = Artefact::open(path)?;
    let (config, tokenizer) = (artefact.config().clone(), artefact.tokenizer()?);
    // A second handle: the blocks are read when they are wanted, long after everything else.
    let levels = Box::new(ArtefactLevels::new(Artefact::open(path)?));
    let model = build_in_levels(config, (&artefact.tensors(), levels), options)?;
    Ok(LoadedModel { model, tokenizer, vision: None })
}

/// A decoder of `config` over weights of which those of `levels` come in levels: for weights that come from no file.
///
/// # Errors
/// As [`load`].
pub fn build_in_levels(
    config: DecoderConfig,
    (weights, levels): (&dyn WeightSource, Box<dyn LevelSource>),
    options: &LoadOptions,
) -> Result<Box<dyn CausalLm>> {
    let (weights, budget) = ((weights, levels), options.weight_budget);
    match &options.device {
        Target::Cpu => {
            let machine = (options.threads.get(), Isa::detect());
            Ok(Box::new(CpuDecoder::load_in_levels(config, weights, machine, budget)?))
        }
        #[cfg(any(feature = "cuda", feature = "cuda-emulated"))]
        Target::Device(device) => {
            let device = std::sync::Arc::clone(device);
            Ok(Box::new(crate::models::gpu::GpuDecoder::load_in_levels(config, weights, device, budget)?))
        }
    }
}

fn load_gguf(path: &Path, options: &LoadOptions) -> Result<LoadedModel> {
    let file = GgufFile::open(path)?;
    let config = DecoderConfig::from_gguf(&file)?;
    let model = build(config, &file, options)?;
    Ok(LoadedModel { model, tokenizer: TokenizerSource::Gguf(file.into_metadata()), vision: None })
}

fn load_folder(folder: &Path, options: &LoadOptions) -> Result<LoadedModel> {
    let config_path = folder.join("config.json");
    if LlavaConfig::is_llava(&config_path)? {
        return load_llava(folder, options);
    }
    let config = DecoderConfig::from_hf(&config_path)?;
    let checkpoint = SafetensorsCheckpoint::open(folder)?;
    let model = build(config, &checkpoint, options)?;
    Ok(LoadedModel { model, tokenizer: TokenizerSource::Folder(folder.to_owned()), vision: None })
}

/// A model whose decoder is another one of the catalogue with an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    /// The other one's name.
    pub model: String,
    /// SHA-256 of its file, in hex.
    pub sha256: Option<String>,
}

/// What the decoder of the model at `path` is based on, if it is.
///
/// # Errors
/// [`ZooError::Io`] and [`ZooError::Format`] about a folder's `config.json`.
pub fn base_of(path: &Path) -> Result<Option<Base>> {
    let config = path.join("config.json");
    if !path.is_dir() || !config.exists() {
        return Ok(None);
    }
    let Some(base) = JsonObject::read(&config)?.object("base")? else { return Ok(None) };
    Ok(Some(Base { model: base.require("model")?, sha256: base.get("sha256")? }))
}

fn load_llava(folder: &Path, options: &LoadOptions) -> Result<LoadedModel> {
    if let Some(base) = base_of(folder)? {
        let Some(path) = &options.base else {
            let model = base.model;
            return Err(ZooError::format(folder, format!("is based on {model:?}, whose file was not given")));
        };
        return load_llava_over(folder, path, options);
    }
    let config = LlavaConfig::from_hf(&folder.join("config.json"), true)?;
    let checkpoint = SafetensorsCheckpoint::open(folder)?;
    let weights = Renamed::llava(&checkpoint);
    let Some(text) = config.text.clone() else {
        return Err(ZooError::format(folder, "config.json has no text_config"));
    };
    let vision = vision(folder, (&config, text.hidden_size), &weights, options)?;
    let model = build(text, &weights, options)?;
    Ok(LoadedModel { model, tokenizer: TokenizerSource::Folder(folder.to_owned()), vision: Some(vision) })
}

/// A LLaVA model whose decoder is the GGUF file at `base` with the folder's adapter.
fn load_llava_over(folder: &Path, base: &Path, options: &LoadOptions) -> Result<LoadedModel> {
    let config = LlavaConfig::from_hf(&folder.join("config.json"), false)?;
    let file = GgufFile::open(base)?;
    let text = DecoderConfig::from_gguf(&file)?;
    let checkpoint = SafetensorsCheckpoint::open(folder)?;
    let vision = vision(folder, (&config, text.hidden_size), &Renamed::llava(&checkpoint), options)?;
    let model = build(text.clone(), &Merged::open(folder, &file, &text)?, options)?;
    let tokenizer = TokenizerSource::Gguf(file.into_metadata());
    Ok(LoadedModel { model, tokenizer, vision: Some(vision) })
}

/// The image side of a LLaVA model. It runs beside the decoder, so it gets half of the threads.
fn vision(
    folder: &Path,
    (config, hidden_size): (&LlavaConfig, usize),
    weights: &dyn WeightSource,
    options: &LoadOptions,
) -> Result<Vision> {
    let threads = options.threads.get().div_ceil(2);
    let encoder = ClipEncoder::load(config, weights, (hidden_size, threads))?;
    Ok(Vision {
        processor: ImageProcessor::from_folder(folder, config.vision.image_size)?,
        encoder: Box::new(encoder),
        image_token: config.image_token,
    })
}

/// A decoder of `config` over `weights` on `target`: for weights that come from no file.
///
/// # Errors
/// As [`load`].
pub fn build_on(
    config: DecoderConfig,
    weights: &dyn WeightSource,
    target: &Target,
) -> Result<Box<dyn CausalLm>> {
    build(config, weights, &LoadOptions { device: target.clone(), ..LoadOptions::default() })
}

fn build(
    config: DecoderConfig,
    weights: &dyn WeightSource,
    options: &LoadOptions,
) -> Result<Box<dyn CausalLm>> {
    let model: Box<dyn CausalLm> = match &options.device {
        Target::Cpu => Box::new(CpuDecoder::load(config, weights, options.threads.get())?),
        #[cfg(any(feature = "cuda", feature = "cuda-emulated"))]
        Target::Device(device) => {
            Box::new(crate::models::gpu::GpuDecoder::load(config, weights, std::sync::Arc::clone(device))?)
        }
    };
    let least = model.dims().weight_bytes as u64;
    match options.weight_budget {
        Some(budget) if budget < least => Err(ZooError::WeightBudget { budget, least }),
        _ => Ok(model),
    }
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
