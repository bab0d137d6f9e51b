//! Quantized weights on the GPU's decoder, on the emulated device, against the CPU's over the values that they stand for.

use std::borrow::Cow;

use candle_core::quantized::QTensor;
use candle_core::{Device as Host, Tensor};
use half::bf16;
use model_zoo::Result;
use model_zoo::compression::Plan;
use model_zoo::config::DecoderConfig;
use model_zoo::loader::{Target, build_on};
use model_zoo::weights::{GgmlDType, RandomWeights, RawTensor, WeightSource};

use crate::gpu::{device, error, llama, run};

/// Noise in quantized types: as it is stored, or as the values that it stands for.
struct Quantized {
    noise: RandomWeights,
    types: fn(&str) -> GgmlDType,
    as_values: bool,
}

impl WeightSource for Quantized {
    fn contains(&self, name: &str) -> bool {
        self.noise.contains(name)
    }

    fn tensor(&self, name: &str) -> Result<RawTensor<'_>> {
        let RawTensor { dtype, shape, data } = self.noise.tensor(name)?;
        let to = (self.types)(name);
        if shape.len() == 1 || to == dtype {
            return Ok(RawTensor { dtype, shape, data });
        }
        let value = |bytes: &[u8]| bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
        let values: Vec<f32> = data.chunks_exact(2).map(value).collect();
        let tensor = Tensor::from_vec(values, shape.as_slice(), &Host::Cpu)?;
        let quantized = QTensor::quantize(&tensor, to)?;
        if !self.as_values {
            return Ok(RawTensor { dtype: to, shape, data: Cow::Owned(quantized.data()?.into_owned()) });
        }
        let values: Vec<f32> = quantized.dequantize(&Host::Cpu)?.flatten_all()?.to_vec1()?;
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Ok(RawTensor { dtype: GgmlDType::F32, shape, data: Cow::Owned(data) })
    }
}

/// A mixture as files have them: some tensors of more bits, values among them.
fn k_types(name: &str) -> GgmlDType {
    match name {
        _ if name.contains("embed_tokens") => GgmlDType::Q6K,
        _ if name.contains("v_proj") => GgmlDType::Q6K,
        _ if name.contains("layers.1.mlp.down") => GgmlDType::Q6K,
        _ if name.contains("o_proj") => GgmlDType::Q5K,
        _ => GgmlDType::Q4K,
    }
}

/// Older types, a norm between two tensors of one matrix, and one in bf16.
fn old_types(name: &str) -> GgmlDType {
    match name {
        _ if name.contains("embed_tokens") => GgmlDType::Q8_0,
        _ if name.contains("layers.1.mlp.gate") => GgmlDType::Q5_0,
        _ if name.contains("layers.0.self_attn.o_proj") => GgmlDType::BF16,
        _ if name.contains("k_proj") => GgmlDType::Q5_1,
        _ if name.contains("down") => GgmlDType::Q4_0,
        _ => GgmlDType::Q4_1,
    }
}

/// The type of a matrix's codes, by its name.
type TypeOf = fn(&str) -> GgmlDType;

#[test]
fn codes_equal_the_values_that_they_stand_for() {
    let cases: [(_, TypeOf); 5] = [
        (llama((256, 512, 3), [4, 2], 64), k_types),
        (llama((768, 256, 2), [6, 2], 128), k_types),
        (llama((192, 320, 3), [12, 3], 16), old_types),
        // Steps that are not one launch: heads are normed, sublayers' outputs are.
        (DecoderConfig { qk_norm: true, ..llama((256, 512, 2), [4, 2], 64) }, k_types),
        (DecoderConfig { sandwich_norms: true, ..llama((96, 160, 2), [2, 1], 32) }, old_types),
    ];
    for (i, (config, types)) in cases.into_iter().enumerate() {
        let source = |as_values| Quantized { noise: RandomWeights::of(&config, 0.1), types, as_values };
        // One row, some, more than eight, a chunk that is still few, and one that is not.
        let rows = 11;
        let only = |some: usize| (0..rows).map(|row| usize::from(row < some)).collect::<Vec<_>>();
        let mut chunks = only(rows);
        chunks[4] = 40;
        chunks[7] = 150;
        let schedule = [vec![5; rows], only(1), only(rows), only(4), chunks, only(rows), only(2), only(rows)];
        let schedule: Vec<&[usize]> = schedule.iter().map(Vec::as_slice).collect();
        let plans = vec![Plan::dense(config.num_layers); rows];
        let cpu = build_on(config.clone(), &source(true), &Target::Cpu).unwrap();
        let gpu = build_on(config.clone(), &source(false), &Target::Device(device(i))).unwrap();
        // Codes stay codes: less than half of what bf16 takes.
        let dense = build_on(config.clone(), &source(true), &Target::Device(device(i))).unwrap();
        assert!(2 * gpu.dims().weight_bytes < dense.dims().weight_bytes + 100_000, "case {i}");
        let [cpu, gpu] = [cpu, gpu].map(|model| run(model, &plans, &schedule).0);
        let found = error(&gpu, &cpu);
        assert!(found < 2e-2, "case {i}: relative error {found:.2e}");
    }
}
