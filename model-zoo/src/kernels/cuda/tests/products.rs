use super::*;
use crate::config::Activation;
use crate::kernels::cuda::device::Output;
use crate::kernels::cuda::ops::{After, Matrix, Norm, Tokens, product, skinny};

/// `x[m, k] · w[n, k]ᵀ`
pub(super) fn multiply(x: &[f64], w: &[f32], k: usize) -> Vec<f64> {
    let dot = |x: &[f64], w: &[f32]| x.iter().zip(w).map(|(x, &w)| x * f64::from(w)).sum::<f64>();
    x.chunks_exact(k).flat_map(|x| w.chunks_exact(k).map(move |w| dot(x, w))).collect()
}

fn normed(x: &[f32], weight: &[f32], eps: f32) -> Vec<f64> {
    let width = weight.len();
    let row = |x: &[f32]| {
        let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / width as f64;
        let scale = 1.0 / (mean + f64::from(eps)).sqrt();
        x.iter().zip(weight).map(|(&x, &w)| f64::from(x) * scale * f64::from(w)).collect::<Vec<_>>()
    };
    x.chunks_exact(width).flat_map(row).collect()
}

/// Tokens of a step of `all`, every second one from the end, as an index list.
fn scattered(count: usize, all: usize) -> Vec<u32> {
    (0..count).map(|i| (all - 1 - 2 * i) as u32).collect()
}

const EPS: f32 = 1e-5;

#[test]
fn products_of_few_rows_equal_f64_loops() {
    for device in devices() {
        let device = &*device;
        for (seed, (tokens, rows, cols)) in
            [(1, 16, 32), (3, 37, 72), (8, 51, 576), (7, 24, 1096), (5, 33, 40), (8, 7, 264)]
                .into_iter()
                .enumerate()
        {
            let seed = seed as u64 * 10;
            let all = 2 * tokens + 3;
            let w = rounded(&noise(seed + 1, rows * cols));
            let bias = noise(seed + 2, rows);
            let x = noise(seed + 3, all * cols);
            let weight: Vec<f32> = noise(seed + 4, cols).iter().map(|w| 1.0 + w / 2.0).collect();
            let index = scattered(tokens, all);
            let chosen: Vec<f32> =
                index.iter().flat_map(|&i| x[i as usize * cols..(i as usize + 1) * cols].to_vec()).collect();
            let (w_buffer, bias_buffer, x_buffer) =
                (halves(device, &w), floats(device, &bias), floats(device, &x));
            let (norm_buffer, index_buffer) = (floats(device, &weight), words(device, &index));
            let matrix = Matrix { weight: Part::all(&w_buffer), bias: Part::all(&bias_buffer), rows, cols };
            let biased = |mut y: Vec<f64>| {
                y.iter_mut().enumerate().for_each(|(i, y)| *y += f64::from(bias[i % rows]));
                y
            };
            let what = format!("{tokens} x {rows} x {cols} {device:?}");
            let norm = Some(Norm { weight: Part::all(&norm_buffer), eps: EPS });
            let tokens_of = Tokens { count: tokens, index: Part::all(&index_buffer), skips: None };
            let expected = biased(multiply(&normed(&chosen, &weight, EPS), &w, cols));

            let out = blank(device, 4 * tokens * rows);
            skinny(device, &matrix, (Part::all(&x_buffer), tokens_of, norm), After::Float(Part::all(&out)))
                .unwrap();
            assert_close(&read_floats(device, &out), &expected, 4e-3, &format!("float {what}"));
            let out = blank(device, 2 * tokens * rows);
            skinny(device, &matrix, (Part::all(&x_buffer), tokens_of, norm), After::Half(Part::all(&out)))
                .unwrap();
            assert_close(&read_halves(device, &out), &expected, 6e-3, &format!("half {what}"));

            // Dense rows in bf16, stored and added to scattered rows.
            let dense = rounded(&chosen);
            let dense_buffer = halves(device, &dense);
            let exact: Vec<f64> = dense.iter().map(|&v| f64::from(v)).collect();
            let expected = biased(multiply(&exact, &w, cols));
            let plain = Tokens { count: tokens, index: Part::NONE, skips: None };
            let out = blank(device, 4 * tokens * rows);
            skinny(device, &matrix, (Part::all(&dense_buffer), plain, None), After::Float(Part::all(&out)))
                .unwrap();
            assert_close(&read_floats(device, &out), &expected, 1e-5, &format!("plain {what}"));
            let residual = noise(seed + 5, all * rows);
            let out = floats(device, &residual);
            skinny(device, &matrix, (Part::all(&dense_buffer), tokens_of, None), After::Add(Part::all(&out)))
                .unwrap();
            let mut sum: Vec<f64> = residual.iter().map(|&v| f64::from(v)).collect();
            for (i, &at) in index.iter().enumerate() {
                for j in 0..rows {
                    sum[at as usize * rows + j] += expected[i * rows + j];
                }
            }
            assert_close(&read_floats(device, &out), &sum, 1e-5, &format!("add {what}"));
        }
    }
}

#[test]
fn gates_let_their_values_through() {
    let (tokens, width, cols) = (5, 24, 88);
    for device in devices() {
        let device = &*device;
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let w = rounded(&noise(1, 2 * width * cols));
            let (x, weight, bias) = (noise(2, tokens * cols), noise(3, cols), noise(4, 2 * width));
            let y = multiply(&normed(&x, &weight, EPS), &w, cols);
            let gate = |gate: f64| match activation {
                Activation::Silu => gate / (1.0 + (-gate).exp()),
                Activation::GeluTanh => {
                    0.5 * gate
                        * (1.0
                            + ((2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044715 * gate.powi(3))).tanh())
                }
            };
            let value = |token: usize, row: usize| y[token * 2 * width + row] + f64::from(bias[row]);
            let expected: Vec<f64> = (0..tokens * width)
                .map(|i| {
                    let (token, channel) = (i / width, i % width);
                    let row = channel / 8 * 16 + channel % 8;
                    gate(value(token, row)) * value(token, row + 8)
                })
                .collect();
            let (w, x, weight, bias) =
                (halves(device, &w), floats(device, &x), floats(device, &weight), floats(device, &bias));
            let matrix = Matrix { weight: Part::all(&w), bias: Part::all(&bias), rows: 2 * width, cols };
            let norm = Some(Norm { weight: Part::all(&weight), eps: EPS });
            let out = blank(device, 2 * tokens * width);
            let tokens_of = Tokens { count: tokens, index: Part::NONE, skips: None };
            let after = After::Gate(Part::all(&out), activation);
            skinny(device, &matrix, (Part::all(&x), tokens_of, norm), after).unwrap();
            assert_close(&read_halves(device, &out), &expected, 8e-3, &format!("{activation:?} {device:?}"));
        }
    }
}

#[test]
fn a_token_gets_the_same_bits_whatever_is_beside_it() {
    let (rows, cols) = (40, 136);
    let devices = devices();
    let device = &*devices[0];
    let (w, weight, x) =
        (halves(device, &noise(1, rows * cols)), floats(device, &noise(2, cols)), noise(3, 20 * cols));
    let matrix = Matrix { weight: Part::all(&w), bias: Part::NONE, rows, cols };
    let norm = Some(Norm { weight: Part::all(&weight), eps: EPS });
    let x = floats(device, &x);
    let run = |count: usize, index: &[u32]| {
        let index = words(device, index);
        let out = blank(device, 4 * count * rows);
        let tokens = Tokens { count, index: Part::all(&index), skips: None };
        skinny(device, &matrix, (Part::all(&x), tokens, norm), After::Float(Part::all(&out))).unwrap();
        read_floats(device, &out)
    };
    let index = [0, 3, 19, 7, 8, 2, 11, 5];
    let all = run(8, &index);
    for (i, token) in index.into_iter().enumerate() {
        assert_eq!(run(1, &[token]), all[i * rows..][..rows], "token {token}");
    }
}

#[test]
fn the_emulated_product_of_many_rows_is_one() {
    let (m, n, k) = (5, 7, 24);
    let devices = devices();
    let device = &*devices[0];
    let (x, w) = (rounded(&noise(1, m * k)), rounded(&noise(2, n * k)));
    let exact: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
    let expected = multiply(&exact, &w, k);
    let (x, w) = (halves(device, &x), halves(device, &w));
    let matrix = Matrix { weight: Part::all(&w), bias: Part::NONE, rows: n, cols: k };
    let y = blank(device, 4 * m * n);
    for output in [Output::Float, Output::Add] {
        product(device, &matrix, (Part::all(&x), m), (Part::all(&y), output)).unwrap();
        let times = if output == Output::Add { 2.0 } else { 1.0 };
        let expected: Vec<f64> = expected.iter().map(|v| v * times).collect();
        assert_close(&read_floats(device, &y), &expected, 1e-6, "product");
    }
}
