//! The weights that a stack is made of: a GGUF file or a Hugging Face folder.

use std::path::Path;

use candle_core::quantized::GgmlDType;

use super::artefact::StoredTensor;
use super::{LinearId, Projection};
use crate::config::DecoderConfig;
use crate::config::llava::LlavaConfig;
use crate::kernels::cpu::quantize::BLOCK;
use crate::layers::linear::to_f32;
use crate::loader::TokenizerSource;
use crate::models::decoder::CpuDecoder;
use crate::weights::gguf::GgufFile;
use crate::weights::merged::{q8_0, to_dense};
use crate::weights::safetensors::SafetensorsCheckpoint;
use crate::weights::{RawTensor, WeightSource};
use crate::{Result, ZooError};

/// An opened source.
pub struct Source {
    /// The decoder. Norms are read with [`DecoderConfig::norm_offset`] added, so that it is 0 here.
    pub config: DecoderConfig,
    /// The tokenizer.
    pub tokenizer: TokenizerSource,
    norm_offset: f32,
    weights: Box<dyn WeightSource + Send + Sync>,
}

impl Source {
    /// Opens the model at `path`.
    ///
    /// # Errors
    /// As [`crate::loader::load`]; [`ZooError::Unsupported`] for models that see.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            let file = GgufFile::open(path)?;
            let tokenizer = TokenizerSource::Gguf(file.metadata().clone());
            return Ok(Self::new(DecoderConfig::from_gguf(&file)?, tokenizer, Box::new(file)));
        }
        let config = path.join("config.json");
        if LlavaConfig::is_llava(&config)? {
            return Err(ZooError::Unsupported(
                "a stack of a model that sees; build one of its decoder".into(),
            ));
        }
        let weights = SafetensorsCheckpoint::open(path)?;
        let tokenizer = TokenizerSource::Folder(path.to_owned());
        Ok(Self::new(DecoderConfig::from_hf(&config)?, tokenizer, Box::new(weights)))
    }

    pub(super) fn new(
        config: DecoderConfig,
        tokenizer: TokenizerSource,
        weights: Box<dyn WeightSource + Send + Sync>,
    ) -> Self {
        let norm_offset = config.norm_offset;
        Self { config: DecoderConfig { norm_offset: 0.0, ..config }, tokenizer, norm_offset, weights }
    }

    /// The model itself, to see what its matrices are applied to.
    ///
    /// # Errors
    /// As [`CpuDecoder::load`].
    pub fn decoder(&self, threads: usize) -> Result<CpuDecoder> {
        let config = DecoderConfig { norm_offset: self.norm_offset, ..self.config.clone() };
        CpuDecoder::load(config, &*self.weights, threads)
    }

    /// A decomposed matrix's values, `[rows, cols]`.
    ///
    /// # Errors
    /// [`ZooError::Format`] when it is missing, [`ZooError::Unsupported`] when it has another shape.
    pub fn matrix(&self, linear: LinearId) -> Result<Vec<f32>> {
        let tensor = self.weights.tensor(&linear.weight_name())?;
        let size = linear.projection.size(&self.config);
        if tensor.shape != size {
            let found = &tensor.shape;
            return Err(ZooError::Unsupported(format!(
                "{linear} has shape {found:?}, the config says {size:?}"
            )));
        }
        to_dense(&tensor)
    }

    /// Bytes of the decomposed matrices as the source holds them.
    ///
    /// # Errors
    /// As [`Source::matrix`].
    pub fn matrix_bytes(&self) -> Result<u64> {
        let linears = LinearId::all(self.config.num_layers);
        linears.map(|linear| Ok(self.weights.tensor(&linear.weight_name())?.data.len() as u64)).sum()
    }

    /// The bias of a decomposed matrix, if it has one.
    ///
    /// # Errors
    /// [`ZooError::Io`] when it cannot be read.
    pub fn bias(&self, linear: LinearId) -> Result<Option<RawTensor<'_>>> {
        let name = linear.weight_name().replace(".weight", ".bias");
        if self.weights.contains(&name) { self.weights.tensor(&name).map(Some) } else { Ok(None) }
    }

    /// Everything that is not decomposed. Embedding and output matrix are as the source holds them, bit for bit, or in
    /// Q8_0 where `eight_bit` and the source has more; norms and biases are f32.
    ///
    /// # Errors
    /// [`ZooError::Format`] when one is missing, [`ZooError::Unsupported`] when it is of a type that is not served.
    pub fn other_tensors(&self, eight_bit: bool) -> Result<Vec<StoredTensor>> {
        let mut tensors = vec![self.whole("model.embed_tokens.weight", eight_bit)?];
        if !self.config.tie_word_embeddings {
            tensors.push(self.whole("lm_head.weight", eight_bit)?);
        }
        tensors.push(self.small("model.norm.weight", self.norm_offset)?);
        for layer in 0..self.config.num_layers {
            for norm in self.norms() {
                tensors.push(self.small(&format!("model.layers.{layer}.{norm}.weight"), self.norm_offset)?);
            }
            for projection in Projection::ALL {
                let name = format!("model.layers.{layer}.{}.bias", projection.module());
                if self.weights.contains(&name) {
                    tensors.push(self.small(&name, 0.0)?);
                }
            }
        }
        Ok(tensors)
    }

    /// The norms of a layer.
    fn norms(&self) -> Vec<&'static str> {
        let mut norms = vec!["input_layernorm", "post_attention_layernorm"];
        if self.config.sandwich_norms {
            norms.extend(["pre_feedforward_layernorm", "post_feedforward_layernorm"]);
        }
        if self.config.qk_norm {
            norms.extend(["self_attn.q_norm", "self_attn.k_norm"]);
        }
        norms
    }

    fn whole(&self, name: &str, eight_bit: bool) -> Result<StoredTensor> {
        let tensor = self.weights.tensor(name)?;
        let is_plain = matches!(tensor.dtype, GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16);
        let width = tensor.shape.last().copied().unwrap_or(0);
        let (dtype, data) = if eight_bit && is_plain && width.is_multiple_of(BLOCK) {
            (GgmlDType::Q8_0, q8_0(&to_f32(&tensor)?))
        } else {
            (tensor.dtype, tensor.data.into_owned())
        };
        Ok(StoredTensor { name: name.to_owned(), dtype, shape: tensor.shape, data })
    }

    fn small(&self, name: &str, offset: f32) -> Result<StoredTensor> {
        let tensor = self.weights.tensor(name)?;
        let data = to_f32(&tensor)?.iter().flat_map(|value| (value + offset).to_le_bytes()).collect();
        Ok(StoredTensor { name: name.to_owned(), dtype: GgmlDType::F32, shape: tensor.shape, data })
    }
}

/// The source's tensors; norms are f32 with the offset added, as [`Source::config`] says.
impl WeightSource for Source {
    fn contains(&self, name: &str) -> bool {
        self.weights.contains(name)
    }

    fn tensor(&self, name: &str) -> Result<RawTensor<'_>> {
        if self.norm_offset == 0.0 || !name.ends_with("norm.weight") {
            return self.weights.tensor(name);
        }
        let StoredTensor { dtype, shape, data, .. } = self.small(name, self.norm_offset)?;
        Ok(RawTensor { dtype, shape, data: std::borrow::Cow::Owned(data) })
    }
}
