//! Reading a decoder's weights to a device: tensor by tensor, through one matrix on the host, in codes or in bf16.
//!
//! Where several devices share the model each holds its share of the heads and of the FFN's channels; embeddings and
//! norms are on all of them.

mod quantized;

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use super::graphs::Graphs;
use super::images::Images;
use super::levels::Levels;
use super::pruned::Pruned;
use super::scratch::Scratch;
use super::visual::Visual;
use super::{GpuDecoder, Layer, Linear, Weight, Weights};
use crate::config::{DecoderConfig, RopeConfig, RopeStyle};
use crate::kernels::cpu::quantize::BLOCK;
use crate::kernels::cuda::attention::HEAD_DIMS;
use crate::kernels::cuda::device::{Buffer, Device, Part};
use crate::kernels::cuda::tables::StepTables;
use crate::layers::linear::to_f32;
use crate::layers::rotary::Rotary;
use crate::models::ModelDims;
use crate::weights::blocks::BlockFormat;
use crate::weights::levels::LevelSource;
use crate::weights::{RawTensor, WeightSource};
use crate::{Result, ZooError};

use candle_core::quantized::GgmlDType;

/// Where a row of a joint matrix comes from: which of its tensors, and which row of it.
type Source = (usize, usize);

struct Reader<'a> {
    config: &'a DecoderConfig,
    source: &'a dyn WeightSource,
    device: &'a dyn Device,
    /// Where matrices of layers come in levels.
    levels: Option<Levels>,
    /// Bytes uploaded so far.
    bytes: usize,
}

impl GpuDecoder {
    /// Reads every weight that `config` names to `device`.
    ///
    /// # Errors
    /// [`ZooError::Unsupported`] for sizes that the kernels are not made for; a weight that is missing or of another
    /// shape; [`ZooError::Device`] when there is no room.
    pub fn load(config: DecoderConfig, source: &dyn WeightSource, device: Arc<dyn Device>) -> Result<Self> {
        Self::read(config, source, device, None)
    }

    /// Reads the weights that `levels` has in levels, as many as `budget` bytes of weights hold, and all others from
    /// `source`.
    ///
    /// # Errors
    /// As [`GpuDecoder::load`]; [`ZooError::WeightBudget`] when the budget is less than the model can do with.
    pub fn load_in_levels(
        config: DecoderConfig,
        (source, levels): (&dyn WeightSource, Box<dyn LevelSource>),
        device: Arc<dyn Device>,
        budget: Option<u64>,
    ) -> Result<Self> {
        let levels = Levels::new(levels, &device)?;
        let mut decoder = Self::read(config, source, device, Some(levels))?;
        if let Some(levels) = &mut decoder.levels {
            let linears = decoder.weights.layers.iter().flat_map(|l| [&l.qkv, &l.o, &l.gate_up, &l.down]);
            let joints = linears.filter_map(|linear| match &linear.weight {
                Weight::Levels(joint) => Some(joint),
                Weight::Dense(_) | Weight::Quantized { .. } => None,
            });
            levels.fill(joints, (decoder.dims.weight_bytes, budget))?;
            decoder.dims.weight_bytes = usize::try_from(levels.bytes()).unwrap_or(usize::MAX);
        }
        Ok(decoder)
    }

    fn read(
        config: DecoderConfig,
        source: &dyn WeightSource,
        device: Arc<dyn Device>,
        levels: Option<Levels>,
    ) -> Result<Self> {
        let mut reader = Reader { config: &config, source, device: &*device, levels, bytes: 0 };
        reader.check()?;
        let weights = reader.weights()?;
        let (weight_bytes, levels) = (reader.bytes, reader.levels);
        let count = |linears: [&Linear; 2]| linears.iter().map(|l| l.rows * l.cols).sum();
        let sublayer_weights = weights
            .layers
            .first()
            .map_or([1; 2], |layer| [count([&layer.qkv, &layer.o]), count([&layer.gate_up, &layer.down])]);
        let dims = ModelDims::of(&config, weight_bytes, sublayer_weights);
        let whole = weights.layers.iter().flat_map(|l| [&l.qkv, &l.o, &l.gate_up, &l.down]);
        let whole = whole.filter(|l| l.is_quantized()).map(|l| l.rows * l.cols);
        let whole = device.alloc(2 * whole.max().unwrap_or(0))?;
        Ok(Self {
            scratch: Scratch::new((&*device, whole), &config, (weights.heads, weights.ffn))?,
            tables: StepTables::new(Self::bounds(&config)),
            config,
            dims,
            device,
            weights,
            levels,
            graphs: Graphs::default(),
            pruned: Pruned::default(),
            images: Images::default(),
            visual: Visual::default(),
            ready: 0,
            host_logits: Vec::new(),
        })
    }
}

impl Reader<'_> {
    /// Refuses what the kernels are not made for.
    fn check(&self) -> Result<()> {
        let c = self.config;
        let ranks = self.device.shard().size;
        let rules = [
            (
                !HEAD_DIMS.contains(&c.head_dim),
                format!("heads of {} channels; on a GPU they have {HEAD_DIMS:?}", c.head_dim),
            ),
            (
                !c.hidden_size.is_multiple_of(8),
                format!("a hidden size of {}; on a GPU it is a multiple of 8", c.hidden_size),
            ),
            (
                !c.intermediate_size.is_multiple_of(8 * ranks),
                format!(
                    "{} FFN channels; on {ranks} GPU they are a multiple of {}",
                    c.intermediate_size,
                    8 * ranks
                ),
            ),
            (!c.num_kv_heads.is_multiple_of(ranks), format!("{} KV heads for {ranks} GPUs", c.num_kv_heads)),
        ];
        match rules.into_iter().find(|(broken, _)| *broken) {
            Some((_, sentence)) => Err(ZooError::Unsupported(sentence)),
            None => Ok(()),
        }
    }

    fn weights(&mut self) -> Result<Weights> {
        let c = self.config;
        let (hidden, vocab) = (c.hidden_size, c.vocab_size);
        let shard = self.device.shard();
        let kv_heads = shard.range(c.num_kv_heads).len();
        let plain = |name: &str| vec![(name.to_owned(), [vocab, hidden])];
        let all: Vec<Source> = (0..vocab).map(|row| (0, row)).collect();
        let embedding = self.matrix(&plain("model.embed_tokens"), &all, 0..hidden)?;
        let lm_head = if c.tie_word_embeddings {
            None
        } else {
            Some(self.matrix(&plain("lm_head"), &all, 0..hidden)?)
        };
        let layers = (0..c.num_layers).map(|index| self.layer(index)).collect::<Result<_>>()?;
        let local = c.sliding_window.as_ref().and_then(|window| window.rope.as_ref());
        Ok(Weights {
            embedding,
            lm_head,
            layers,
            norm: self.norm("model.norm", &(0..hidden).collect::<Vec<_>>())?,
            rotary: [Some(self.rotary(&c.rope)?), local.map(|rope| self.rotary(rope)).transpose()?],
            heads: [kv_heads * (c.num_heads / c.num_kv_heads), kv_heads],
            ffn: shard.range(c.intermediate_size / 8).len() * 8,
        })
    }

    fn rotary(&mut self, rope: &RopeConfig) -> Result<(Buffer, f32)> {
        let rotary = Rotary::new(rope, self.config.head_dim, self.config.rope_style);
        let (frequencies, magnitude) = rotary.frequencies();
        Ok((self.upload(bytemuck::cast_slice(frequencies))?, magnitude))
    }

    fn layer(&mut self, index: usize) -> Result<Layer> {
        let c = self.config;
        let (d, hidden, ffn) = (c.head_dim, c.hidden_size, c.intermediate_size);
        let (q_width, kv_width) = (c.num_heads * d, c.num_kv_heads * d);
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let shard = self.device.shard();
        let kv_heads = shard.range(c.num_kv_heads);
        let group = c.num_heads / c.num_kv_heads;
        let heads = kv_heads.start * group..kv_heads.end * group;
        let channels = shard.range(ffn / 8);
        let tiles = tile_order(d, c.rope_style);
        let width: Vec<usize> = (0..hidden).collect();

        let order = &tiles;
        let turned = |tensor: usize, heads: Range<usize>| {
            heads.flat_map(move |head| order.iter().map(move |row| (tensor, head * d + row)))
        };
        let values = (kv_heads.start * d..kv_heads.end * d).map(|row| (2, row));
        let qkv_rows: Vec<Source> =
            turned(0, heads.clone()).chain(turned(1, kv_heads.clone())).chain(values).collect();
        let qkv =
            [("self_attn.q_proj", q_width), ("self_attn.k_proj", kv_width), ("self_attn.v_proj", kv_width)];
        let qkv = qkv.map(|(part, rows)| (name(part), [rows, hidden]));
        let eights = |tensor: usize, eight: usize| (8 * eight..8 * eight + 8).map(move |row| (tensor, row));
        let gate_up_rows: Vec<Source> =
            channels.clone().flat_map(|eight| eights(0, eight).chain(eights(1, eight))).collect();
        let gate_up = ["mlp.gate_proj", "mlp.up_proj"].map(|part| (name(part), [ffn, hidden]));
        let out_rows: Vec<Source> = (0..hidden).map(|row| (0, row)).collect();
        let o = [(name("self_attn.o_proj"), [hidden, q_width])];
        let down = [(name("mlp.down_proj"), [hidden, ffn])];

        let qk_norm = if c.qk_norm {
            Some([
                self.norm(&name("self_attn.q_norm"), &tiles)?,
                self.norm(&name("self_attn.k_norm"), &tiles)?,
            ])
        } else {
            None
        };
        // Gemma calls the norm after attention what others call the norm before the FFN.
        let (ffn_norm, post_norms) = if c.sandwich_norms {
            let post = [
                self.norm(&name("post_attention_layernorm"), &width)?,
                self.norm(&name("post_feedforward_layernorm"), &width)?,
            ];
            (self.norm(&name("pre_feedforward_layernorm"), &width)?, Some(post))
        } else {
            (self.norm(&name("post_attention_layernorm"), &width)?, None)
        };
        let window = c.sliding_window.as_ref();
        Ok(Layer {
            attention_norm: self.norm(&name("input_layernorm"), &width)?,
            qkv: self.linear(&qkv, (&qkv_rows, false), 0..hidden)?,
            o: self.linear(&o, (&out_rows, false), heads.start * d..heads.end * d)?,
            qk_norm,
            ffn_norm,
            gate_up: self.linear(&gate_up, (&gate_up_rows, true), 0..hidden)?,
            down: self.linear(&down, (&out_rows, false), channels.start * 8..channels.end * 8)?,
            post_norms,
            window: window.filter(|w| w.layers.get(index) == Some(&true)).map(|w| w.window),
        })
    }

    fn upload(&mut self, bytes: &[u8]) -> Result<Buffer> {
        let buffer = self.device.alloc(bytes.len())?;
        self.device.upload(Part::all(&buffer), bytes)?;
        self.bytes += bytes.len();
        Ok(buffer)
    }

    /// A norm's weights, in the given order.
    fn norm(&mut self, name: &str, order: &[usize]) -> Result<Buffer> {
        let weight = to_f32(&self.source.tensor(&format!("{name}.weight"))?)?;
        if weight.len() != order.len() {
            let (found, expected) = (weight.len(), order.len());
            return Err(ZooError::Unsupported(format!(
                "{name}.weight has {found} values, the config says {expected}"
            )));
        }
        let weight: Vec<f32> = order.iter().map(|&i| weight[i] + self.config.norm_offset).collect();
        self.upload(bytemuck::cast_slice(&weight))
    }

    /// [`Reader::matrix`], in levels where it comes in them; `eights` says that rows of two tensors alternate in eights.
    fn linear(
        &mut self,
        tensors: &[(String, [usize; 2])],
        (rows, eights): (&[Source], bool),
        columns: Range<usize>,
    ) -> Result<Linear> {
        let joint = self.levels.as_mut().map(|levels| levels.joint(tensors, rows, eights)).transpose()?;
        let Some(joint) = joint.flatten() else { return self.matrix(tensors, rows, columns) };
        let bias = self.biases(tensors, rows)?;
        Ok(Linear { weight: Weight::Levels(joint), bias, rows: rows.len(), cols: columns.len() })
    }

    /// The matrix whose rows are `rows` of `tensors` (names and shapes), its columns `columns` of theirs: quantized where
    /// they are, else in bf16.
    fn matrix(
        &mut self,
        tensors: &[(String, [usize; 2])],
        rows: &[Source],
        columns: Range<usize>,
    ) -> Result<Linear> {
        if let Some(linear) = self.quantized(tensors, rows, &columns)? {
            return Ok(linear);
        }
        let cols = columns.len();
        let mut values = vec![0u16; rows.len() * cols];
        for (tensor, (name, shape)) in tensors.iter().enumerate() {
            let weight = self.source.tensor(&format!("{name}.weight"))?;
            if weight.shape != shape {
                let found = &weight.shape;
                return Err(ZooError::Unsupported(format!(
                    "{name}.weight has shape {found:?}, the config says {shape:?}"
                )));
            }
            let decode = RowDecoder::new(&weight, shape[1])?;
            let own = rows.iter().zip(values.chunks_exact_mut(cols)).filter(|((of, _), _)| *of == tensor);
            own.for_each(|(&(_, row), out)| decode.row(row, columns.start, out));
        }
        let bias = self.biases(tensors, rows)?;
        let weight = Weight::Dense(self.upload(bytemuck::cast_slice(&values))?);
        Ok(Linear { weight, bias, rows: rows.len(), cols })
    }

    /// The bias of the matrix whose rows are `rows` of `tensors`, where one of them has one.
    fn biases(&mut self, tensors: &[(String, [usize; 2])], rows: &[Source]) -> Result<Option<Buffer>> {
        let biases = tensors.iter().map(|(name, shape)| self.bias(name, shape[0]));
        let biases = biases.collect::<Result<Vec<_>>>()?;
        if !biases.iter().any(Option::is_some) {
            return Ok(None);
        }
        let value =
            |&(tensor, row): &Source| biases[tensor].as_ref().map_or(0.0, |bias: &Vec<f32>| bias[row]);
        let values: Vec<f32> = rows.iter().map(value).collect();
        self.upload(bytemuck::cast_slice(&values)).map(Some)
    }

    fn bias(&self, name: &str, rows: usize) -> Result<Option<Vec<f32>>> {
        let name = format!("{name}.bias");
        if !self.source.contains(&name) {
            return Ok(None);
        }
        let bias = to_f32(&self.source.tensor(&name)?)?;
        if bias.len() != rows {
            return Err(ZooError::Unsupported(format!("{name} has {} values, not {rows}", bias.len())));
        }
        Ok(Some(bias))
    }
}

/// The channels of a head in the order that the kernels have them in: of every sixteen, eight first ones and eight
/// second ones of the pairs that RoPE turns.
fn tile_order(head_dim: usize, style: RopeStyle) -> Vec<usize> {
    let pair = |i: usize| match style {
        RopeStyle::Half => [i, i + head_dim / 2],
        RopeStyle::Interleaved => [2 * i, 2 * i + 1],
    };
    (0..head_dim).map(|at| pair(at / 16 * 8 + at % 8)[at % 16 / 8]).collect()
}

/// Reads rows of a stored tensor as bf16.
struct RowDecoder<'a> {
    data: &'a [u8],
    row_bytes: usize,
    cols: usize,
    dtype: GgmlDType,
    format: Option<BlockFormat>,
}

impl<'a> RowDecoder<'a> {
    fn new(tensor: &'a RawTensor<'_>, cols: usize) -> Result<Self> {
        let format = BlockFormat::of(tensor.dtype);
        let row_bytes = match (format, tensor.dtype) {
            (Some(format), _) if cols.is_multiple_of(format.stored_columns()) => format.stored_len(cols),
            (None, GgmlDType::F32) => 4 * cols,
            (None, GgmlDType::F16 | GgmlDType::BF16) => 2 * cols,
            (_, dtype) => return Err(ZooError::Unsupported(format!("{dtype:?} weights of width {cols}"))),
        };
        let rows = tensor.shape.first().copied().unwrap_or(0);
        if tensor.data.len() != rows * row_bytes {
            let (shape, len) = (&tensor.shape, tensor.data.len());
            return Err(ZooError::Unsupported(format!("a tensor of shape {shape:?} has {len} bytes")));
        }
        Ok(Self { data: &tensor.data, row_bytes, cols, dtype: tensor.dtype, format })
    }

    /// Columns of `row` from `first` on.
    fn row(&self, row: usize, first: usize, out: &mut [u16]) {
        let bytes = &self.data[row * self.row_bytes..(row + 1) * self.row_bytes];
        let nearest = |value: f32| bf16::from_f32(value).to_bits();
        let halves = || bytes[2 * first..].chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        match (self.format, self.dtype) {
            (Some(format), _) => {
                let mut values = Vec::with_capacity(self.cols);
                for index in 0..self.cols / BLOCK {
                    let block = format.block(bytes, index);
                    let value = |(i, q): (usize, i8)| f32::from(q) * block.scale[i / (BLOCK / 2)] + block.min;
                    values.extend(block.q.into_iter().enumerate().map(value));
                }
                out.iter_mut().zip(&values[first..]).for_each(|(out, &value)| *out = nearest(value));
            }
            (None, GgmlDType::BF16) => out.iter_mut().zip(halves()).for_each(|(out, bits)| *out = bits),
            (None, GgmlDType::F16) => {
                out.iter_mut()
                    .zip(halves())
                    .for_each(|(out, bits)| *out = nearest(f16::from_bits(bits).to_f32()));
            }
            (None, _) => {
                let values =
                    bytes[4 * first..].chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
                out.iter_mut().zip(values).for_each(|(out, value)| *out = nearest(value));
            }
        }
    }
}
