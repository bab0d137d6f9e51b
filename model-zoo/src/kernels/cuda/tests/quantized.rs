use candle_core::quantized::QTensor;
use candle_core::{Device as Host, Tensor};

use super::products::multiply;
use super::*;
use crate::config::Activation;
use crate::kernels::cpu::quantize::BLOCK;
use crate::kernels::cuda::ops::{After, Tokens, embed};
use crate::kernels::cuda::quantized::{Format, Operand, Quantized, QuantizedPart, few, whole};
use crate::weights::GgmlDType;
use crate::weights::blocks::BlockFormat;

/// Every type that is served in codes.
const TYPES: [GgmlDType; 8] = [
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];

/// Rows of noise, quantized, as they lie on a device and as values.
fn quantized(seed: u64, dtype: GgmlDType, [rows, cols]: [usize; 2]) -> (Vec<u8>, Vec<f32>) {
    let noise: Vec<f32> = noise(seed, rows * cols).iter().map(|v| v + 0.3).collect();
    let tensor = Tensor::from_vec(noise, (rows, cols), &Host::Cpu).unwrap();
    let stored = QTensor::quantize(&tensor, dtype).unwrap().data().unwrap().into_owned();
    let (format, blocks) = (Format::of(dtype).unwrap(), BlockFormat::of(dtype).unwrap());
    let mut units = vec![0u8; format.bytes(rows, cols)];
    let mut values = Vec::new();
    for (row, stored) in stored.chunks_exact(blocks.stored_len(cols)).enumerate() {
        let tile = &mut units[row / 16 * format.tile_bytes(cols)..];
        for index in 0..cols / BLOCK {
            let block = blocks.block(stored, index);
            format.put(tile, (row % 16, index), &block);
            let value = |(i, &q): (usize, &i8)| f32::from(q) * block.scale[i / 16] + block.min;
            values.extend(block.q.iter().enumerate().map(value));
        }
    }
    (units, values)
}

/// A matrix of parts of these types and rows.
struct Case {
    units: Buffer,
    parts: Vec<QuantizedPart>,
    values: Vec<f32>,
    bias: Vec<f32>,
    bias_buffer: Buffer,
    cols: usize,
}

impl Case {
    fn new(device: &dyn Device, parts: &[(GgmlDType, usize)], cols: usize) -> Self {
        let (mut units, mut values) = (Vec::new(), Vec::new());
        for (seed, &(dtype, rows)) in parts.iter().enumerate() {
            let (own, weights) = quantized(seed as u64 + 7, dtype, [rows, cols]);
            units.extend(own);
            values.extend(weights);
        }
        let part =
            |&(dtype, rows): &(GgmlDType, usize)| QuantizedPart { format: Format::of(dtype).unwrap(), rows };
        let bias = noise(3, values.len() / cols);
        Self {
            units: upload(device, &units),
            parts: parts.iter().map(part).collect(),
            bias_buffer: floats(device, &bias),
            values,
            bias,
            cols,
        }
    }

    fn matrix(&self) -> Quantized<'_> {
        let (units, bias) = (Part::all(&self.units), Part::all(&self.bias_buffer));
        Quantized { units, parts: &self.parts, bias, cols: self.cols }
    }

    /// `x · wᵀ + bias`
    fn expected(&self, x: &[f32]) -> Vec<f64> {
        let x: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
        let mut y = multiply(&x, &self.values, self.cols);
        y.iter_mut().enumerate().for_each(|(i, y)| *y += f64::from(self.bias[i % self.bias.len()]));
        y
    }
}

/// Sums in f32 of exact products; scales of `_K` types are rounded to f16.
const EXACT: f64 = 6e-4;
/// Sums of weights that were rounded to bf16, which more than eight tokens have and weights with a scale for sixteen columns.
const ROUNDED: f64 = 3e-3;

#[test]
fn products_of_codes_equal_f64_loops() {
    let mut cases: Vec<(Vec<(GgmlDType, usize)>, usize)> =
        TYPES.iter().map(|&dtype| (vec![(dtype, 37)], 768)).collect();
    cases.push((vec![(GgmlDType::Q4_1, 5)], 32));
    cases.push((vec![(GgmlDType::Q8_0, 48), (GgmlDType::Q5_1, 16), (GgmlDType::Q4_0, 19)], 96));
    cases.push((vec![(GgmlDType::Q4K, 32), (GgmlDType::Q6K, 16)], 256));
    for device in devices() {
        let device = &*device;
        for (parts, cols) in &cases {
            let case = Case::new(device, parts, *cols);
            let (matrix, rows) = (case.matrix(), case.bias.len());
            for tokens in [1, 7, 9, 35] {
                let what = format!("{tokens} x {parts:?} x {cols} {device:?}");
                let is_fine = parts.iter().any(|&(dtype, _)| dtype == GgmlDType::Q6K);
                let most = if tokens > 8 || is_fine { ROUNDED } else { EXACT };
                let x = rounded(&noise(tokens as u64, tokens * cols));
                let (expected, x) = (case.expected(&x), halves(device, &x));
                let all = 2 * tokens + 3;
                let index: Vec<u32> = (0..tokens).map(|i| (all - 1 - 2 * i) as u32).collect();
                let places = words(device, &index);
                let some = Tokens { count: tokens, index: Part::all(&places), skips: None };
                let run = |after| few(device, &matrix, (Part::all(&x), some), after).unwrap();

                let out = blank(device, 4 * tokens * rows);
                run(After::Float(Part::all(&out)));
                assert_close(&read_floats(device, &out), &expected, most, &format!("float {what}"));
                let out = blank(device, 2 * tokens * rows);
                run(After::Half(Part::all(&out)));
                assert_close(&read_halves(device, &out), &expected, most + 3e-3, &format!("half {what}"));
                let residual = noise(5, all * rows);
                let out = floats(device, &residual);
                run(After::Add(Part::all(&out)));
                let mut sum: Vec<f64> = residual.iter().map(|&v| f64::from(v)).collect();
                for (own, &at) in expected.chunks_exact(rows).zip(&index) {
                    sum[at as usize * rows..].iter_mut().zip(own).for_each(|(sum, y)| *sum += y);
                }
                assert_close(&read_floats(device, &out), &sum, most, &format!("add {what}"));
            }
        }
    }
}

#[test]
fn gates_of_codes_let_their_values_through() {
    let (tokens, width, cols) = (11, 24, 64);
    for device in devices() {
        let device = &*device;
        let case = Case::new(device, &[(GgmlDType::Q4_0, 2 * width)], cols);
        let x = rounded(&noise(9, tokens * cols));
        let y = case.expected(&x);
        let value = |token: usize, row: usize| y[token * 2 * width + row];
        let gated = |i: usize| {
            let (token, channel) = (i / width, i % width);
            let row = channel / 8 * 16 + channel % 8;
            let gate = value(token, row);
            gate / (1.0 + (-gate).exp()) * value(token, row + 8)
        };
        let expected: Vec<f64> = (0..tokens * width).map(gated).collect();
        let (x, out) = (halves(device, &x), blank(device, 2 * tokens * width));
        let some = Tokens { count: tokens, index: Part::NONE, skips: None };
        let after = After::Gate(Part::all(&out), Activation::Silu);
        few(device, &case.matrix(), (Part::all(&x), some), after).unwrap();
        assert_close(&read_halves(device, &out), &expected, 6e-3, &format!("{device:?}"));
    }
}

#[test]
fn matrices_made_whole_and_embeddings_are_their_values() {
    for device in devices() {
        let device = &*device;
        let mixed = vec![(GgmlDType::Q5_0, 32), (GgmlDType::Q8_0, 16), (GgmlDType::Q4_1, 21)];
        let whole_types = TYPES.iter().map(|&dtype| (vec![(dtype, 53)], 512));
        for (parts, cols) in whole_types.chain([(mixed, 96)]) {
            let case = Case::new(device, &parts, cols);
            let (matrix, rows) = (case.matrix(), case.bias.len());
            let what = format!("{parts:?} {device:?}");
            let out = blank(device, 2 * rows * cols);
            whole(device, &matrix, Part::all(&out)).unwrap();
            let expected: Vec<f64> = case.values.iter().map(|&v| f64::from(v)).collect();
            assert_close(&read_halves(device, &out), &expected, 3e-3, &format!("whole {what}"));

            let ids = [rows as u32 - 1, 0, 17, 8, 16];
            let (tokens, x) = (words(device, &ids), blank(device, 4 * ids.len() * cols));
            let table = Operand::Quantized(matrix);
            let embedded = embed(device, (&table, Part::all(&tokens)), (Part::all(&x), ids.len(), cols), 2.0);
            if parts.len() > 1 {
                assert!(embedded.unwrap_err().to_string().contains("several formats"));
                continue;
            }
            embedded.unwrap();
            let row = |&id: &u32| expected[id as usize * cols..][..cols].iter().map(|v| 2.0 * v);
            let expected: Vec<f64> = ids.iter().flat_map(row).collect();
            assert_close(&read_floats(device, &x), &expected, EXACT, &format!("embed {what}"));
        }
    }
}

#[test]
fn a_token_gets_the_same_bits_of_codes_whatever_is_beside_it() {
    let devices = devices();
    let device = &*devices[0];
    let (tokens, cols) = (40, 160);
    let case = Case::new(device, &[(GgmlDType::Q5_1, 21)], cols);
    let x = noise(1, tokens * cols);
    let run = |x: &[f32]| {
        let tokens = Tokens { count: x.len() / cols, index: Part::NONE, skips: None };
        let (x, out) = (halves(device, x), blank(device, 4 * tokens.count * 21));
        few(device, &case.matrix(), (Part::all(&x), tokens), After::Float(Part::all(&out))).unwrap();
        read_floats(device, &out)
    };
    // Few, and many.
    for (few, some) in [(8, 3), (40, 9)] {
        let all = run(&x[..few * cols]);
        for first in [0, 2, few - some] {
            let own = run(&x[first * cols..][..some * cols]);
            assert_eq!(own, all[first * 21..][..some * 21], "{some} tokens from {first} on of {few}");
        }
    }
}
