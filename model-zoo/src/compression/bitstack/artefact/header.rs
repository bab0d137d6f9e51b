//! What the header of an artefact says, as it is written.

use candle_core::quantized::GgmlDType;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::super::{LinearId, Projection};
use crate::config::DecoderConfig;

/// Where a stack comes from.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// The source's name.
    pub model: String,
    /// SHA-256 over the source's weight files.
    pub weights_sha256: String,
    /// Name of the text that its inputs were measured on; empty where none were.
    pub text: String,
    /// SHA-256 of the text.
    pub text_sha256: String,
    /// Tokens that were measured.
    pub tokens: usize,
    /// The settings of the build, in words.
    pub settings: String,
}

/// The header.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Header {
    pub(super) config: DecoderConfig,
    pub(super) provenance: Provenance,
    /// Rank of each matrix's magnitudes, in the order of [`LinearId::all`].
    pub(super) ranks: Vec<usize>,
    pub(super) tokenizer: TokenizerSection,
    pub(super) tensors: Vec<TensorEntry>,
    pub(super) base: Vec<Entry>,
    pub(super) stack: Vec<Entry>,
}

/// The tokenizer's section: JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum TokenizerKind {
    /// The metadata of a GGUF file: an object of its values.
    Gguf,
    /// The files of a Hugging Face folder: an object of their texts.
    Files,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct TokenizerSection {
    pub(super) kind: TokenizerKind,
    #[serde(flatten)]
    pub(super) place: Place,
}

/// Where something lies.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Place {
    /// From the first multiple of 4 KiB after the header: the header's own length is not known when it is written.
    pub(super) offset: u64,
    pub(super) len: u64,
    #[serde(with = "hex")]
    pub(super) sha256: [u8; 32],
}

/// A tensor that is not decomposed.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct TensorEntry {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    #[serde(flatten)]
    pub(super) place: Place,
}

/// A block.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Entry {
    pub(super) layer: usize,
    pub(super) projection: Projection,
    pub(super) level: usize,
    #[serde(flatten)]
    pub(super) place: Place,
}

impl Entry {
    pub(super) fn linear(&self) -> LinearId {
        LinearId { layer: self.layer, projection: self.projection }
    }
}

/// A tensor's type by ggml's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Dtype(pub(super) GgmlDType);

const DTYPES: [(&str, GgmlDType); 11] = [
    ("F32", GgmlDType::F32),
    ("F16", GgmlDType::F16),
    ("BF16", GgmlDType::BF16),
    ("Q4_0", GgmlDType::Q4_0),
    ("Q4_1", GgmlDType::Q4_1),
    ("Q5_0", GgmlDType::Q5_0),
    ("Q5_1", GgmlDType::Q5_1),
    ("Q8_0", GgmlDType::Q8_0),
    ("Q4_K", GgmlDType::Q4K),
    ("Q5_K", GgmlDType::Q5K),
    ("Q6_K", GgmlDType::Q6K),
];

impl Serialize for Dtype {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match DTYPES.iter().find(|(_, dtype)| *dtype == self.0) {
            Some((name, _)) => serializer.serialize_str(name),
            None => Err(serde::ser::Error::custom(format!("tensors of type {:?} are not stored", self.0))),
        }
    }
}

impl<'de> Deserialize<'de> for Dtype {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        let known = DTYPES.iter().find(|(known, _)| *known == name);
        known
            .map(|(_, dtype)| Self(*dtype))
            .ok_or_else(|| serde::de::Error::custom(format!("tensors of type {name:?} are not known")))
    }
}

/// SHA-256 of some bytes.
pub(super) fn digest(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// Digests as text.
mod hex {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(digest: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 32], D::Error> {
        let text = String::deserialize(deserializer)?;
        let mut digest = [0; 32];
        let is_hex = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        for (byte, at) in digest.iter_mut().zip((0..64).step_by(2)) {
            let parsed = text.get(at..at + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok());
            *byte =
                parsed.filter(|_| is_hex).ok_or_else(|| serde::de::Error::custom("a malformed SHA-256"))?;
        }
        Ok(digest)
    }
}
