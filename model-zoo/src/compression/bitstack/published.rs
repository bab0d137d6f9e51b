//! The published scaling (methods.md §1b, step 1): columns are scaled by their inputs, and the operator before them by
//! the inverse, so that the model computes the same.
//!
//! It is here to compare with: [`super::fit`] needs no other operator, and so can weigh every matrix.

use candle_core::quantized::GgmlDType;

use super::artefact::StoredTensor;
use super::scale::Measured;
use super::source::Source;
use super::{LinearId, Projection};
use crate::config::DecoderConfig;
use crate::step::LinearInput;
use crate::{Result, ZooError};

/// The scales of every layer.
#[derive(Debug, Default)]
pub struct Scaling {
    layers: Vec<LayerScaling>,
}

#[derive(Debug)]
struct LayerScaling {
    qkv: Vec<f32>,
    /// Where values and outputs have equal shapes: with fewer KV heads there is no one row to divide.
    o: Option<Vec<f32>>,
    gate_up: Vec<f32>,
    down: Vec<f32>,
}

impl Scaling {
    /// Adds the scales of the next layer.
    ///
    /// # Errors
    /// [`ZooError::Unsupported`] for models with norms after their sublayers, which the paper does not have.
    pub fn add_layer(&mut self, config: &DecoderConfig, measured: &Measured) -> Result<()> {
        if config.sandwich_norms {
            return Err(ZooError::Unsupported(
                "the published scaling of a model with norms after its sublayers".into(),
            ));
        }
        let layer = self.layers.len();
        let scale = |input| measured.of(layer, input).published_scale();
        let equal = Projection::V.size(config) == Projection::O.size(config);
        self.layers.push(LayerScaling {
            qkv: scale(LinearInput::Qkv),
            o: equal.then(|| scale(LinearInput::O)),
            gate_up: scale(LinearInput::GateUp),
            down: scale(LinearInput::Down),
        });
        Ok(())
    }

    /// What a matrix's rows are divided and its columns multiplied by.
    fn of(&self, linear: LinearId) -> (Option<&[f32]>, Option<&[f32]>) {
        let layer = &self.layers[linear.layer];
        match linear.projection {
            Projection::Q | Projection::K => (None, Some(&layer.qkv)),
            Projection::V => (layer.o.as_deref(), Some(&layer.qkv)),
            Projection::O => (None, layer.o.as_deref()),
            Projection::Gate => (None, Some(&layer.gate_up)),
            Projection::Up => (Some(&layer.down), Some(&layer.gate_up)),
            Projection::Down => (None, Some(&layer.down)),
        }
    }

    /// Scales a matrix's `values`, or, with `back`, undoes it.
    pub fn apply(&self, linear: LinearId, values: &mut [f32], back: bool) {
        let (rows, cols) = self.of(linear);
        let width = cols.map(<[f32]>::len);
        if let (Some(cols), Some(width)) = (cols, width) {
            for row in values.chunks_exact_mut(width) {
                row.iter_mut().zip(cols).for_each(|(value, s)| if back { *value /= s } else { *value *= s });
            }
        }
        if let Some(rows) = rows {
            let width = values.len() / rows.len();
            for (row, s) in values.chunks_exact_mut(width).zip(rows) {
                row.iter_mut().for_each(|value| if back { *value *= s } else { *value /= s });
            }
        }
    }

    /// Divides the norms and biases before scaled matrices.
    pub fn apply_to_tensors(&self, source: &Source, tensors: &mut [StoredTensor]) {
        for layer in 0..self.layers.len() {
            let scales = &self.layers[layer];
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            divide(tensors, &name("input_layernorm.weight"), &scales.qkv);
            divide(tensors, &name("post_attention_layernorm.weight"), &scales.gate_up);
            divide(tensors, &name("mlp.up_proj.bias"), &scales.down);
            if let Some(o) = &scales.o {
                divide(tensors, &name("self_attn.v_proj.bias"), o);
            }
        }
        debug_assert_eq!(self.layers.len(), source.config.num_layers);
    }
}

fn divide(tensors: &mut [StoredTensor], name: &str, scale: &[f32]) {
    let Some(tensor) = tensors.iter_mut().find(|tensor| tensor.name == name) else { return };
    debug_assert_eq!(tensor.dtype, GgmlDType::F32);
    for (bytes, scale) in tensor.data.chunks_exact_mut(4).zip(scale) {
        let value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) / scale;
        bytes.copy_from_slice(&value.to_le_bytes());
    }
}
