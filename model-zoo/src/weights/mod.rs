//! Weight files: named tensors as the bytes that the file holds, before any repacking.

pub mod blocks;
pub(crate) mod file;
pub mod gguf;
pub mod levels;
pub mod merged;
mod random;
pub mod renamed;
pub mod safetensors;

use std::borrow::Cow;

pub use candle_core::quantized::GgmlDType;

use crate::Result;
pub use random::{LlamaShape, RandomWeights};

/// A tensor as stored: element type, shape, little-endian bytes.
#[derive(Debug, Clone)]
pub struct RawTensor<'a> {
    /// Element or block type. safetensors' types are the unquantized ones of these.
    pub dtype: GgmlDType,
    /// Dimensions, outermost first: a linear weight is `[out_features, in_features]`, rows contiguous.
    pub shape: Vec<usize>,
    /// The bytes, borrowed where the source holds them in memory.
    pub data: Cow<'a, [u8]>,
}

impl RawTensor<'_> {
    /// The same with bytes of its own.
    pub fn owned(self) -> RawTensor<'static> {
        RawTensor { dtype: self.dtype, shape: self.shape, data: Cow::Owned(self.data.into_owned()) }
    }
}

/// A checkpoint that tensors are read from by Hugging Face name (`model.layers.0.self_attn.q_proj.weight`,
/// `model.embed_tokens.weight`, `model.norm.weight`, `lm_head.weight`, …). GGUF names are translated.
pub trait WeightSource {
    /// Whether the checkpoint has this tensor.
    fn contains(&self, name: &str) -> bool;

    /// The tensor.
    ///
    /// # Errors
    /// [`crate::ZooError::Format`] when it is missing or its bytes lie outside the file.
    fn tensor(&self, name: &str) -> Result<RawTensor<'_>>;
}
