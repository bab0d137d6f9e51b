//! GGUF files (versions 2 and 3, little-endian): metadata, tensor directory, tensors.
//!
//! The whole header is checked when a file is opened: every length against what is left of the file
//! before memory is taken for it, every tensor's type, shape and place before anything is read. What
//! [`GgufFile`] hands out afterwards can only fail by I/O.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>

mod directory;
mod header;
mod metadata;
mod names;

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use super::file::WeightFile;
use super::{RawTensor, WeightSource};
use crate::Result;
use directory::TensorEntry;
pub use metadata::{Array, FromValue, Metadata, Value};

/// An opened GGUF file.
#[derive(Debug)]
pub struct GgufFile {
    file: WeightFile,
    metadata: Metadata,
    tensors: HashMap<String, TensorEntry>,
    architecture: String,
}

impl GgufFile {
    /// Opens a file and checks its header.
    ///
    /// # Errors
    /// [`crate::ZooError::Io`] when it cannot be read, [`crate::ZooError::Format`] when it is not a GGUF
    /// file that this crate reads: truncated, malformed, split, or with a tensor type that is not among
    /// F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and Q6_K.
    pub fn open(path: &Path) -> Result<Self> {
        let file = WeightFile::open(path)?;
        let mut header = header::HeaderReader::new(&file)?;
        let (num_tensors, num_entries) = header.preamble()?;
        let metadata = metadata::read(&mut header, num_entries)?;
        if metadata.get::<usize>("split.count")?.is_some_and(|count| count > 1) {
            return Err(file.malformed("is one part of a split model; merge the parts into one file first"));
        }
        let tensors = directory::read(&mut header, num_tensors, &metadata)?;
        let architecture = metadata.require::<&str>("general.architecture")?.to_owned();
        Ok(Self { file, metadata, tensors, architecture })
    }

    /// The key-value pairs.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The key-value pairs alone, letting go of the file.
    pub fn into_metadata(self) -> Metadata {
        self.metadata
    }

    /// `general.architecture`: `llama`, `qwen2`, `qwen3`, `gemma3`, ….
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// Shape of the tensor that GGUF calls `name`, outermost dimension first.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|entry| entry.shape.as_slice())
    }

    fn entry(&self, hf_name: &str) -> Option<&TensorEntry> {
        self.tensors.get(&names::gguf_name(hf_name, &self.architecture)?)
    }
}

impl WeightSource for GgufFile {
    fn contains(&self, name: &str) -> bool {
        self.entry(name).is_some()
    }

    fn tensor(&self, name: &str) -> Result<RawTensor<'_>> {
        let entry = self.entry(name).ok_or_else(|| {
            let wanted = names::gguf_name(name, &self.architecture);
            self.file.malformed(format!("has no tensor {:?}", wanted.as_deref().unwrap_or(name)))
        })?;
        let data = self.file.read_at(entry.offset, entry.num_bytes)?;
        Ok(RawTensor { dtype: entry.dtype, shape: entry.shape.clone(), data: Cow::Owned(data) })
    }
}
