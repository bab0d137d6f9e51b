//! Hugging Face checkpoints: `model.safetensors`, or shards that `model.safetensors.index.json` lists. An
//! adapter's are called `adapter_model…`.
//!
//! As with GGUF, every length and place is checked when a checkpoint is opened, before memory is taken.
//!
//! Format: <https://github.com/huggingface/safetensors#format>

mod header;

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::file::WeightFile;
use super::{RawTensor, WeightSource};
use crate::{Result, ZooError};
use header::{Element, TensorEntry};

/// What the names of a model's files begin with.
const STEM: &str = "model";

/// A table of contents of a model with a million tensors is smaller.
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// Most files of a checkpoint: each holds a descriptor while it is open.
const MAX_SHARDS: usize = 512;

/// An opened checkpoint.
#[derive(Debug)]
pub struct SafetensorsCheckpoint {
    folder: PathBuf,
    shards: Vec<WeightFile>,
    /// For each tensor, its shard and its place there.
    tensors: HashMap<String, (usize, TensorEntry)>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl SafetensorsCheckpoint {
    /// Opens the checkpoint in `folder` and checks the headers of all its files.
    ///
    /// # Errors
    /// [`ZooError::Io`] when a file cannot be read, [`ZooError::Format`] when one is truncated or
    /// malformed, when the index names a file outside the folder or a tensor that its file has not, or
    /// when a tensor's type is not F32, F16 or BF16.
    pub fn open(folder: &Path) -> Result<Self> {
        Self::open_named(folder, STEM)
    }

    /// [`SafetensorsCheckpoint::open`] of files whose names begin with `stem`.
    ///
    /// # Errors
    /// As [`SafetensorsCheckpoint::open`].
    pub fn open_named(folder: &Path, stem: &str) -> Result<Self> {
        let mut checkpoint = Self { folder: folder.to_owned(), shards: Vec::new(), tensors: HashMap::new() };
        let single = folder.join(format!("{stem}.safetensors"));
        let index_path = folder.join(format!("{stem}.safetensors.index.json"));
        if single.exists() || !index_path.exists() {
            checkpoint.add(&single, |_| true)?;
            return Ok(checkpoint);
        }
        let index = read_index(&index_path)?;
        let names = index.weight_map.values().collect::<BTreeSet<_>>();
        if names.len() > MAX_SHARDS {
            let count = names.len();
            return Err(ZooError::format(
                index_path,
                format!("lists {count} files; {MAX_SHARDS} are possible"),
            ));
        }
        for name in names {
            check_shard_name(&index_path, name)?;
            checkpoint.add(&folder.join(name), |tensor| index.weight_map.get(tensor) == Some(name))?;
        }
        match index.weight_map.keys().find(|&tensor| !checkpoint.tensors.contains_key(tensor)) {
            Some(missing) => {
                let shard = &index.weight_map[missing];
                Err(ZooError::format(
                    index_path,
                    format!("places tensor {missing:?} in {shard}, which lacks it"),
                ))
            }
            None => Ok(checkpoint),
        }
    }

    /// Adds the tensors of a file that `wanted` accepts.
    fn add(&mut self, path: &Path, wanted: impl Fn(&str) -> bool) -> Result<()> {
        let file = WeightFile::open(path)?;
        let shard = self.shards.len();
        for (name, entry) in header::read(&file)? {
            if wanted(&name) {
                self.tensors.insert(name, (shard, entry));
            }
        }
        self.shards.push(file);
        Ok(())
    }
}

impl SafetensorsCheckpoint {
    /// The names of all tensors, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The bytes of a tensor of type U8.
    ///
    /// # Errors
    /// [`ZooError::Format`] when there is none.
    pub fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        match self.tensors.get(name) {
            Some((shard, TensorEntry { dtype: Element::Byte, offset, num_bytes, .. })) => {
                self.shards[*shard].read_at(*offset, *num_bytes)
            }
            _ => Err(ZooError::format(&self.folder, format!("the checkpoint has no bytes {name:?}"))),
        }
    }
}

fn read_index(path: &Path) -> Result<Index> {
    let file = WeightFile::open(path)?;
    if file.len() > MAX_INDEX_BYTES {
        return Err(file.malformed(format!("is larger than {MAX_INDEX_BYTES} bytes")));
    }
    let bytes = file.read_at(0, file.len() as usize)?;
    serde_json::from_slice(&bytes).map_err(|e| file.malformed(e.to_string()))
}

/// A shard is a plain name beside the index: a downloaded index must not reach other files.
fn check_shard_name(index_path: &Path, name: &str) -> Result<()> {
    let mut components = Path::new(name).components();
    match (components.next(), components.next()) {
        (Some(Component::Normal(only)), None) if only == name => Ok(()),
        _ => Err(ZooError::format(index_path, format!("names {name:?}, which is not a file beside it"))),
    }
}

impl WeightSource for SafetensorsCheckpoint {
    fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn tensor(&self, name: &str) -> Result<RawTensor<'_>> {
        let Some((shard, entry)) = self.tensors.get(name) else {
            return Err(ZooError::format(&self.folder, format!("the checkpoint has no tensor {name:?}")));
        };
        let file = &self.shards[*shard];
        let Element::Float(dtype) = entry.dtype else {
            return Err(file.malformed(format!(
                "tensor {name:?} has type U8, which is not supported; use F32, F16 or BF16"
            )));
        };
        let data = file.read_at(entry.offset, entry.num_bytes)?;
        Ok(RawTensor { dtype, shape: entry.shape.clone(), data: Cow::Owned(data) })
    }
}
