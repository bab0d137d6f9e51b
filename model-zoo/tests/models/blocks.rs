//! Packed weights against candle's dequantization, on blocks of random bits.

use std::borrow::Cow;

use candle_core::Device;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::ggml_file::qtensor_from_ggml;
use half::f16;
use model_zoo::kernels::cpu::isa::Isa;
use model_zoo::kernels::cpu::pool::Pool;
use model_zoo::layers::linear::{Cpu, Linear};
use model_zoo::weights::RawTensor;
use rand::{Rng, SeedableRng};

const ROWS: usize = 19;
const COLUMNS: usize = 768;

/// Block types, and where in a block their f16 scales stand, which must be numbers.
const TYPES: [(GgmlDType, &[usize]); 8] = [
    (GgmlDType::Q8_0, &[0]),
    (GgmlDType::Q4_0, &[0]),
    (GgmlDType::Q4_1, &[0, 2]),
    (GgmlDType::Q5_0, &[0]),
    (GgmlDType::Q5_1, &[0, 2]),
    (GgmlDType::Q4K, &[0, 2]),
    (GgmlDType::Q5K, &[0, 2]),
    (GgmlDType::Q6K, &[208]),
];

fn random_blocks(dtype: GgmlDType, scales: &[usize], rng: &mut impl Rng) -> Vec<u8> {
    let mut data = vec![0; ROWS * COLUMNS / dtype.block_size() * dtype.type_size()];
    rng.fill(&mut data[..]);
    for block in data.chunks_exact_mut(dtype.type_size()) {
        for &at in scales {
            let scale = f16::from_f32(rng.random_range(-0.1..0.1));
            block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
    }
    data
}

#[test]
fn packed_weights_equal_candles_dequantization() {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(11);
    for (dtype, scales) in TYPES {
        let data = random_blocks(dtype, scales, &mut rng);
        let candle = qtensor_from_ggml(dtype, &data, vec![ROWS, COLUMNS], &Device::Cpu).unwrap();
        let expected = candle.dequantize(&Device::Cpu).unwrap().to_vec2::<f32>().unwrap();
        let tensor = RawTensor { dtype, shape: vec![ROWS, COLUMNS], data: Cow::Owned(data) };
        // K-quants' scales are products of an f16 and a 6- or 8-bit number, rounded to f16 when packed;
        // quant values reach 63 or, in Q6_K, -32, and minima add a rounding of their own.
        let k_quant = dtype.block_size() == 256;
        for isa in Isa::available() {
            let cpu = Cpu { pool: Pool::new(2), isa };
            let linear = Linear::new(&cpu, &tensor, None).unwrap();
            let mut row = vec![f32::NAN; COLUMNS];
            for (index, expected) in expected.iter().enumerate() {
                linear.row(&cpu, index, &mut row);
                let largest = expected.iter().fold(0.0f32, |max, x| max.max(x.abs()));
                let tolerance = if k_quant { largest / 1024.0 } else { 1e-6 };
                for (ours, theirs) in row.iter().zip(expected) {
                    assert!((ours - theirs).abs() <= tolerance, "{dtype:?}: {ours} for {theirs}");
                }
            }
        }
    }
}
