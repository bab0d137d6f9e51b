//! A base checkpoint with a low-rank adapter (LoRA, arXiv 2106.09685) in PEFT's layout merged in as it is read.
//!
//! `W = base + (lora_alpha / r) · B·A`, in f32. Merged matrices are handed on as Q8_0: at four bits, rounding
//! would be as large as the adapter. What the adapter leaves alone passes through as it is stored.

use std::borrow::Cow;
use std::path::Path;

use candle_core::quantized::GgmlDType;
use half::f16;

use super::blocks::BlockFormat;
use super::safetensors::SafetensorsCheckpoint;
use super::{RawTensor, WeightSource};
use crate::config::json::JsonObject;
use crate::config::{DecoderConfig, RopeStyle};
use crate::kernels::cpu::gemm::{Target, View, matmul};
use crate::kernels::cpu::pool::Pool;
use crate::kernels::cpu::quantize::BLOCK;
use crate::layers::linear::to_f32;
use crate::{Result, ZooError};

const CONFIG: &str = "adapter_config.json";
const STEM: &str = "adapter_model";

/// A base and its adapter.
pub struct Merged<'a> {
    base: &'a dyn WeightSource,
    adapter: SafetensorsCheckpoint,
    scale: f32,
    config: &'a DecoderConfig,
}

impl<'a> Merged<'a> {
    /// The adapter in `folder` over `base`, a decoder of `config`.
    ///
    /// # Errors
    /// [`ZooError::Format`] when a file of the adapter is missing or malformed, [`ZooError::Unsupported`] when
    /// it is of a kind that is not merged.
    pub fn open(folder: &Path, base: &'a dyn WeightSource, config: &'a DecoderConfig) -> Result<Self> {
        let json = JsonObject::read(&folder.join(CONFIG))?;
        if json.get::<String>("peft_type")?.as_deref() != Some("LORA") {
            return Err(json.unsupported("peft_type", "another adapter than LORA"));
        }
        for key in ["use_rslora", "use_dora", "fan_in_fan_out"] {
            if json.get::<bool>(key)?.unwrap_or(false) {
                return Err(json.unsupported(key, "a variant of LoRA"));
            }
        }
        let rank = json.require::<usize>("r")?;
        if rank == 0 || rank > 4096 {
            return Err(json.malformed(&format!("r is {rank}; it must be from 1 to 4096")));
        }
        let scale = json.get::<f32>("lora_alpha")?.unwrap_or(8.0) / rank as f32;
        Ok(Self { base, adapter: SafetensorsCheckpoint::open_named(folder, STEM)?, scale, config })
    }

    /// The two factors' names, if the adapter changes the matrix `name`.
    fn factors(&self, name: &str) -> Option<[String; 2]> {
        let module = name.strip_suffix(".weight")?;
        let names = ["A", "B"].map(|which| format!("base_model.model.{module}.lora_{which}.weight"));
        self.adapter.contains(&names[0]).then_some(names)
    }

    fn merge(&self, name: &str, [a, b]: [String; 2]) -> Result<RawTensor<'static>> {
        let base = self.base.tensor(name)?;
        let &[rows, cols] = base.shape.as_slice() else {
            return Err(ZooError::Unsupported(format!("{name}: an adapter of a tensor that is no matrix")));
        };
        let (a_shape, b_shape) = (self.adapter.tensor(&a)?.shape, self.adapter.tensor(&b)?.shape);
        let rank = a_shape.first().copied().unwrap_or(0);
        if a_shape != [rank, cols] || b_shape != [rows, rank] || !cols.is_multiple_of(BLOCK) {
            return Err(ZooError::Unsupported(format!(
                "{name} of shape [{rows}, {cols}] cannot take an adapter of {b_shape:?} by {a_shape:?}"
            )));
        }
        let mut weight = to_dense(&base)?;
        let a = to_f32(&self.adapter.tensor(&a)?)?;
        let b = to_f32(&self.adapter.tensor(&b)?)?;
        let b = self.in_row_order(name, (&b, rank));
        let b: Vec<f32> = b.iter().map(|value| value * self.scale).collect();
        let factors = (View::rows(&b, rank), View::rows(&a, cols));
        let target = Target { values: &mut weight, stride: cols, add: true };
        matmul(&Pool::new(1), [rows, rank, cols], factors, target);
        Ok(RawTensor { dtype: GgmlDType::Q8_0, shape: vec![rows, cols], data: Cow::Owned(q8_0(&weight)) })
    }

    /// The rows of `b` in the base's order. Adapters are in Hugging Face's, where RoPE turns a head's halves; of
    /// queries and keys whose neighbours it turns, row `2·i + j` is row `j·d/2 + i`.
    fn in_row_order<'b>(&self, name: &str, (b, rank): (&'b [f32], usize)) -> Cow<'b, [f32]> {
        let rotated = name.ends_with("q_proj.weight") || name.ends_with("k_proj.weight");
        if !rotated || self.config.rope_style == RopeStyle::Half {
            return Cow::Borrowed(b);
        }
        let head_dim = self.config.head_dim;
        let source = |row: usize| row / head_dim * head_dim + row % 2 * (head_dim / 2) + row % head_dim / 2;
        let rows = (0..b.len() / rank).map(source);
        Cow::Owned(rows.flat_map(|row| &b[row * rank..(row + 1) * rank]).copied().collect())
    }
}

impl WeightSource for Merged<'_> {
    fn contains(&self, name: &str) -> bool {
        self.base.contains(name)
    }

    fn tensor(&self, name: &str) -> Result<RawTensor<'_>> {
        match self.factors(name) {
            Some(factors) => self.merge(name, factors),
            None => self.base.tensor(name),
        }
    }
}

/// A matrix's values, whatever its type.
pub(crate) fn to_dense(tensor: &RawTensor<'_>) -> Result<Vec<f32>> {
    let Some(format) = BlockFormat::of(tensor.dtype) else { return to_f32(tensor) };
    let (rows, cols) = (tensor.shape[0], tensor.shape[1]);
    let row_len = format.stored_len(cols);
    if !cols.is_multiple_of(format.stored_columns()) || tensor.data.len() != rows * row_len {
        return Err(ZooError::Unsupported(format!("a matrix of shape {:?} has other bytes", tensor.shape)));
    }
    let mut values = Vec::with_capacity(rows * cols);
    for row in tensor.data.chunks_exact(row_len) {
        for index in 0..cols / BLOCK {
            let block = format.block(row, index);
            let value = |(i, q): (usize, i8)| f32::from(q) * block.scale[i / (BLOCK / 2)] + block.min;
            values.extend(block.q.into_iter().enumerate().map(value));
        }
    }
    Ok(values)
}

/// ggml's Q8_0: blocks of 32 with a scale in f16.
pub(crate) fn q8_0(values: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(values.len() / BLOCK * (BLOCK + 2));
    for block in values.chunks_exact(BLOCK) {
        let most = block.iter().fold(0f32, |most, value| most.max(value.abs()));
        let scale = most / 127.0;
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        bytes.extend(f16::from_f32(scale).to_le_bytes());
        bytes.extend(block.iter().map(|value| (value * inverse).round() as i8 as u8));
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::{Device, Tensor};

    use super::*;

    struct One(Vec<f32>);

    impl WeightSource for One {
        fn contains(&self, _: &str) -> bool {
            true
        }

        fn tensor(&self, _: &str) -> Result<RawTensor<'_>> {
            Ok(RawTensor { dtype: GgmlDType::Q8_0, shape: vec![64, 64], data: Cow::Owned(q8_0(&self.0)) })
        }
    }

    fn noise(seed: u64, len: usize) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn merged_matrices_equal_the_formula_in_the_bases_row_order() {
        let folder = tempfile::tempdir().unwrap();
        let config = r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 8}"#;
        std::fs::write(folder.path().join(CONFIG), config).unwrap();
        let (a, b) = (noise(1, 4 * 64), noise(2, 64 * 4));
        let mut tensors = HashMap::new();
        for module in ["self_attn.q_proj", "self_attn.v_proj"] {
            let name = |which: &str| format!("base_model.model.model.layers.0.{module}.lora_{which}.weight");
            tensors.insert(name("A"), Tensor::from_slice(&a, (4, 64), &Device::Cpu).unwrap());
            tensors.insert(name("B"), Tensor::from_slice(&b, (64, 4), &Device::Cpu).unwrap());
        }
        candle_core::safetensors::save(&tensors, folder.path().join("adapter_model.safetensors")).unwrap();
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama/config.json");
        let base = One(noise(3, 64 * 64));
        for (style, module, row_of) in [
            (
                RopeStyle::Interleaved,
                "self_attn.q_proj",
                (|r| r / 16 * 16 + r % 2 * 8 + r % 16 / 2) as fn(usize) -> usize,
            ),
            (RopeStyle::Interleaved, "self_attn.v_proj", |r| r),
            (RopeStyle::Half, "self_attn.q_proj", |r| r),
        ] {
            let mut config = DecoderConfig::from_hf(&fixture).unwrap();
            config.rope_style = style;
            let merged = Merged::open(folder.path(), &base, &config).unwrap();
            let found =
                to_dense(&merged.tensor(&format!("model.layers.0.{module}.weight")).unwrap()).unwrap();
            for (i, (&found, &base)) in found.iter().zip(&base.0).enumerate() {
                let (row, col) = (row_of(i / 64), i % 64);
                let delta: f32 = (0..4).map(|k| 2.0 * b[row * 4 + k] * a[k * 64 + col]).sum();
                assert!(
                    (found - base - delta).abs() < 0.05,
                    "{style:?} {module} {i}: {found} {}",
                    base + delta
                );
            }
            // What it has no factors for passes through.
            let other = merged.tensor("model.layers.0.mlp.up_proj.weight").unwrap();
            assert_eq!(other.data, base.tensor("").unwrap().data);
        }
    }
}
