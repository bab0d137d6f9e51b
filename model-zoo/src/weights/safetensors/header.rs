//! The header of one safetensors file: a length, then JSON.

use candle_core::quantized::GgmlDType;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::Result;
use crate::weights::file::WeightFile;

/// What the format's own library accepts.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The key of free-form metadata among the tensors.
const METADATA: &str = "__metadata__";

/// Where a tensor lies and what it is.
#[derive(Debug)]
pub(super) struct TensorEntry {
    pub(super) dtype: Element,
    pub(super) shape: Vec<usize>,
    /// From the start of the file.
    pub(super) offset: u64,
    pub(super) num_bytes: usize,
}

/// What a tensor is made of.
#[derive(Debug, Clone, Copy)]
pub(super) enum Element {
    /// Floats.
    Float(GgmlDType),
    /// Bytes, whatever they stand for.
    Byte,
}

impl Element {
    fn size(self) -> usize {
        match self {
            Self::Float(dtype) => dtype.type_size(),
            Self::Byte => 1,
        }
    }
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<usize>,
    /// First byte and the byte after the last, in the data section.
    data_offsets: (u64, u64),
}

/// Reads and checks the header of `file`.
pub(super) fn read(file: &WeightFile) -> Result<Vec<(String, TensorEntry)>> {
    const PREFIX: usize = size_of::<u64>();
    let mut prefix = [0; PREFIX];
    prefix.copy_from_slice(&file.read_at(0, PREFIX)?);
    let len = u64::from_le_bytes(prefix);
    if len > MAX_HEADER_BYTES || len > file.len() - PREFIX as u64 {
        return Err(file.malformed(format!(
            "is not a safetensors file or truncated: its header claims {len} of {} bytes",
            file.len()
        )));
    }
    let bytes = file.read_at(PREFIX as u64, len as usize)?;
    let entries = serde_json::from_slice::<Map<String, Value>>(&bytes)
        .map_err(|e| file.malformed(format!("malformed header: {e}")))?;
    let data_start = PREFIX as u64 + len;
    entries
        .into_iter()
        .filter(|(name, _)| name != METADATA)
        .map(|(name, value)| {
            let entry = entry(file, &name, value, data_start)?;
            Ok((name, entry))
        })
        .collect()
}

fn entry(file: &WeightFile, name: &str, value: Value, data_start: u64) -> Result<TensorEntry> {
    let raw = RawEntry::deserialize(value)
        .map_err(|e| file.malformed(format!("malformed header: tensor {name:?}: {e}")))?;
    let dtype = match raw.dtype.as_str() {
        "F32" => Element::Float(GgmlDType::F32),
        "F16" => Element::Float(GgmlDType::F16),
        "BF16" => Element::Float(GgmlDType::BF16),
        "U8" => Element::Byte,
        other => {
            return Err(file.malformed(format!(
                "tensor {name:?} has type {other}, which is not supported; use F32, F16 or BF16"
            )));
        }
    };
    let elements = raw.shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim));
    let num_bytes = elements.and_then(|elements| elements.checked_mul(dtype.size()));
    let (start, end) = raw.data_offsets;
    let claimed = end.checked_sub(start);
    let Some(num_bytes) = num_bytes.filter(|&bytes| bytes > 0 && Some(bytes as u64) == claimed) else {
        return Err(file.malformed(format!(
            "tensor {name:?} of shape {:?} cannot lie at bytes {start} to {end}",
            raw.shape
        )));
    };
    if data_start.checked_add(end).is_none_or(|end| end > file.len()) {
        return Err(file.malformed(format!(
            "truncated: tensor {name:?} ends at byte {end} of the data, but the file has {} bytes",
            file.len()
        )));
    }
    Ok(TensorEntry { dtype, shape: raw.shape, offset: data_start + start, num_bytes })
}
