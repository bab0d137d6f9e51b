//! The tensor directory of a GGUF file, checked as it is read.

use std::collections::HashMap;

use candle_core::quantized::GgmlDType;

use super::header::HeaderReader;
use super::metadata::Metadata;
use crate::Result;
use crate::weights::file::WeightFile;

/// Where a tensor lies and what it is.
#[derive(Debug)]
pub(super) struct TensorEntry {
    pub(super) dtype: GgmlDType,
    /// Outermost dimension first; GGUF itself stores the innermost first.
    pub(super) shape: Vec<usize>,
    /// From the start of the file.
    pub(super) offset: u64,
    pub(super) num_bytes: usize,
}

/// Most dimensions of a tensor in ggml.
const MAX_DIMS: u32 = 4;

/// Where tensor data starts, and is padded to, unless `general.alignment` says otherwise.
const DEFAULT_ALIGNMENT: usize = 32;

/// Reads `count` entries, the last part of the header.
pub(super) fn read(
    header: &mut HeaderReader<'_>,
    count: usize,
    metadata: &Metadata,
) -> Result<HashMap<String, TensorEntry>> {
    let file = header.file();
    let alignment = metadata.get::<usize>("general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT) as u64;
    if !alignment.is_power_of_two() || alignment > 1 << 20 {
        return Err(
            file.malformed(format!("general.alignment is {alignment}, not a power of two up to 2^20"))
        );
    }
    let mut tensors = HashMap::new();
    for _ in 0..count {
        let (name, entry) = entry(header)?;
        if tensors.insert(name.clone(), entry).is_some() {
            return Err(file.malformed(format!("has tensor {name:?} twice")));
        }
    }
    let data_start = header.position().next_multiple_of(alignment);
    for (name, entry) in &mut tensors {
        place(file, name, entry, data_start)?;
    }
    Ok(tensors)
}

/// Reads one entry; its offset is still relative to the data section.
fn entry(header: &mut HeaderReader<'_>) -> Result<(String, TensorEntry)> {
    let file = header.file();
    let name = header.string()?;
    let num_dims = header.u32()?;
    if num_dims == 0 || num_dims > MAX_DIMS {
        return Err(file.malformed(format!("tensor {name:?} has {num_dims} dimensions")));
    }
    let mut shape = Vec::with_capacity(num_dims as usize);
    for _ in 0..num_dims {
        shape.push(header.u64()?);
    }
    shape.reverse();
    let dtype = dtype(file, &name, header.u32()?)?;
    let offset = header.u64()?;
    let (shape, num_bytes) = size(&shape, dtype).ok_or_else(|| {
        let blocks = dtype.block_size();
        file.malformed(format!("tensor {name:?} has shape {shape:?}, impossible in blocks of {blocks}"))
    })?;
    Ok((name, TensorEntry { dtype, shape, offset, num_bytes }))
}

/// Shape and bytes of a tensor; `None` when it is empty, overflows or is not made of whole blocks.
fn size(shape: &[u64], dtype: GgmlDType) -> Option<(Vec<usize>, usize)> {
    let shape = shape.iter().map(|&dim| usize::try_from(dim).ok()).collect::<Option<Vec<_>>>()?;
    let elements = shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim))?;
    let blocks_fit = shape.last()?.is_multiple_of(dtype.block_size());
    if elements == 0 || !blocks_fit {
        return None;
    }
    Some((shape, (elements / dtype.block_size()).checked_mul(dtype.type_size())?))
}

/// Makes the offset absolute and checks that the tensor lies inside the file.
fn place(file: &WeightFile, name: &str, entry: &mut TensorEntry, data_start: u64) -> Result<()> {
    let start = data_start.checked_add(entry.offset);
    let end = start.and_then(|start| start.checked_add(entry.num_bytes as u64));
    match (start, end) {
        (Some(start), Some(end)) if end <= file.len() => {
            entry.offset = start;
            Ok(())
        }
        _ => Err(file.malformed(format!(
            "truncated or corrupt: tensor {name:?} needs {} bytes at offset {} of the data, but the file has {} bytes",
            entry.num_bytes,
            entry.offset,
            file.len()
        ))),
    }
}

fn dtype(file: &WeightFile, tensor: &str, number: u32) -> Result<GgmlDType> {
    Ok(match number {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        other => {
            let name = unsupported_name(other);
            return Err(file.malformed(format!(
                "tensor {tensor:?} has type {name}, which is not supported; use F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K or Q6_K"
            )));
        }
    })
}

/// ggml's name of a type that this crate does not read.
fn unsupported_name(number: u32) -> String {
    let name = match number {
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return format!("number {number}"),
    };
    name.to_owned()
}
