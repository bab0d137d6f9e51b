use super::*;
use crate::config::Activation;
use crate::kernels::cuda::ops::{Matrix, Norm, Tokens, activate_rows, add_rows, embed, rms_norm, rotary};
use crate::kernels::cuda::quantized::Operand;

fn double(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

#[test]
fn rows_are_embedded_normed_and_added() {
    let (count, all, width) = (5, 11, 72);
    for device in devices() {
        let device = &*device;
        let table = rounded(&noise(1, 13 * width));
        let ids = [12u32, 0, 7, 7, 3];
        let (table_buffer, ids_buffer) = (halves(device, &table), words(device, &ids));
        let x = blank(device, 4 * count * width);
        let weight = Part::all(&table_buffer);
        let table_operand = Operand::Dense(Matrix { weight, bias: Part::NONE, rows: 13, cols: width });
        let sources = (&table_operand, Part::all(&ids_buffer));
        embed(device, sources, (Part::all(&x), count, width), 3.5).unwrap();
        let rows = ids.iter().flat_map(|&id| &table[id as usize * width..(id as usize + 1) * width]);
        let expected: Vec<f64> = rows.map(|&v| f64::from(v) * 3.5).collect();
        assert_close(&read_floats(device, &x), &expected, 1e-7, "embed");

        let index = [9u32, 2, 5, 0, 10];
        let (x, weight, y, bias) =
            (noise(2, all * width), noise(3, width), noise(4, count * width), noise(5, width));
        let norm_of = |values: &[f64]| {
            let mean = values.iter().map(|v| v * v).sum::<f64>() / width as f64;
            let scale = 1.0 / (mean + 1e-5).sqrt();
            values.iter().zip(&weight).map(|(v, &w)| v * scale * f64::from(w)).collect::<Vec<_>>()
        };
        let (x_buffer, weight_buffer) = (floats(device, &x), floats(device, &weight));
        let index_buffer = words(device, &index);
        let tokens = Tokens { count, index: Part::all(&index_buffer), skips: None };
        let norm = Norm { weight: Part::all(&weight_buffer), eps: 1e-5 };
        let out = blank(device, 2 * count * width);
        rms_norm(device, (Part::all(&x_buffer), tokens), norm, Part::all(&out)).unwrap();
        let row = |i: usize| double(&x[i * width..(i + 1) * width]);
        let expected: Vec<f64> = index.iter().flat_map(|&i| norm_of(&row(i as usize))).collect();
        assert_close(&read_halves(device, &out), &expected, 4e-3, "rms_norm");

        let (y_buffer, bias_buffer) = (floats(device, &y), floats(device, &bias));
        for (y_part, bias_part, with) in [
            (Part::all(&y_buffer), Part::all(&bias_buffer), Some(norm)),
            (Part::all(&y_buffer), Part::NONE, None),
            (Part::NONE, Part::all(&bias_buffer), None),
        ] {
            let x_buffer = floats(device, &x);
            add_rows(device, (y_part, bias_part, with), (Part::all(&x_buffer), tokens), width).unwrap();
            let mut expected = double(&x);
            for (i, &at) in index.iter().enumerate() {
                let value = |j: usize| {
                    let y = if y_part.is_empty() { 0.0 } else { f64::from(y[i * width + j]) };
                    y + if bias_part.is_empty() { 0.0 } else { f64::from(bias[j]) }
                };
                let values: Vec<f64> = (0..width).map(value).collect();
                let values = if with.is_some() { norm_of(&values) } else { values };
                for (j, value) in values.into_iter().enumerate() {
                    expected[at as usize * width + j] += value;
                }
            }
            assert_close(&read_floats(device, &x_buffer), &expected, 1e-6, "add_rows");
        }
    }
}

#[test]
fn angles_and_activations_equal_their_formulas() {
    for device in devices() {
        let device = &*device;
        let (frequencies, positions) = (noise(1, 12), [0u32, 1, 77, 4000]);
        let buffers = (floats(device, &frequencies), words(device, &positions));
        let table = blank(device, 8 * 4 * 12);
        let parts = ((Part::all(&buffers.0), 1.5), (Part::all(&buffers.1), 4));
        rotary(device, parts.0, parts.1, Part::all(&table)).unwrap();
        let angles =
            positions.iter().flat_map(|&p| frequencies.iter().map(move |&f| f64::from(p as f32 * f)));
        let expected: Vec<f64> = angles.flat_map(|a| [1.5 * a.cos(), 1.5 * a.sin()]).collect();
        assert_close(&read_floats(device, &table), &expected, 1e-6, "rotary");

        let (count, width) = (3, 40);
        let (gate_up, bias) = (rounded(&noise(2, count * 2 * width)), noise(3, 2 * width));
        let buffers = (halves(device, &gate_up), floats(device, &bias));
        let out = blank(device, 2 * count * width);
        let inputs = (Part::all(&buffers.0), Part::all(&buffers.1));
        let tokens = Tokens { count, index: Part::NONE, skips: None };
        activate_rows(device, inputs, (Part::all(&out), tokens, width), Activation::Silu).unwrap();
        let value =
            |token: usize, row: usize| f64::from(gate_up[token * 2 * width + row]) + f64::from(bias[row]);
        let expected: Vec<f64> = (0..count * width)
            .map(|i| {
                let (token, row) = (i / width, i % width / 8 * 16 + i % 8);
                let gate = value(token, row);
                gate / (1.0 + (-gate).exp()) * value(token, row + 8)
            })
            .collect();
        assert_close(&read_halves(device, &out), &expected, 4e-3, "activate");
    }
}
