//! CLIP's vision transformer (arXiv 2103.00020) and LLaVA's projector (arXiv 2310.03744).
//!
//! Patches → embeddings with a class token in front → pre-norm → layers of full attention and a feed-forward
//! block → the hidden states that the config names, without the class token → two linear layers into the
//! decoder's width. The layers after the named hidden states never run; of the first of them only the class token's
//! attention is computed, which says what of the image matters.

use super::{EncodedImage, Encoding, ImageEncoder, merge};
use crate::config::llava::{EncoderActivation, LlavaConfig, VisionConfig};
use crate::kernels::cpu::dense::{DenseMatrix, Values};
use crate::kernels::cpu::gemm::{Target, View, matmul};
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::pool::Pool;
use crate::kernels::cpu::rows::for_each_row;
use crate::kernels::cpu::vector::{add, add_bias, gelu, layer_norm, quick_gelu, softmax};
use crate::layers::linear::{Cpu, dense, to_f32};
use crate::weights::WeightSource;
use crate::{Result, ZooError};

/// The encoder with its projector.
#[derive(Debug)]
pub struct ClipEncoder {
    config: VisionConfig,
    keeps_class_token: bool,
    projector_activation: EncoderActivation,
    cpu: Cpu,
    weights: Weights,
    scratch: Scratch,
}

#[derive(Debug)]
struct Weights {
    /// `[hidden, 3 · patch · patch]`
    patches: EncoderLinear,
    class: Vec<f32>,
    /// `[1 + patches, hidden]`, the class token's first.
    positions: Vec<f32>,
    pre_norm: Norm,
    layers: Vec<Layer>,
    /// The parts of the layer after `layers` that its class token's attention needs, where the checkpoint has it.
    gaze: Option<Gaze>,
    projector: [EncoderLinear; 2],
}

/// Norm, queries and keys of a layer.
#[derive(Debug)]
struct Gaze {
    norm: Norm,
    q: EncoderLinear,
    k: EncoderLinear,
}

#[derive(Debug)]
struct Layer {
    norms: [Norm; 2],
    q: EncoderLinear,
    k: EncoderLinear,
    v: EncoderLinear,
    out: EncoderLinear,
    up: EncoderLinear,
    down: EncoderLinear,
}

#[derive(Debug)]
struct Norm {
    weight: Vec<f32>,
    bias: Vec<f32>,
}

/// A linear operator held in the precision of its file, and widened for each product.
#[derive(Debug)]
struct EncoderLinear {
    weight: DenseMatrix,
    bias: Option<Vec<f32>>,
}

#[derive(Debug, Default)]
struct Scratch {
    weight: Vec<f32>,
    x: Vec<f32>,
    normed: Vec<f32>,
    qkv: [Vec<f32>; 3],
    scores: Vec<f32>,
    mixed: Vec<f32>,
    wide: Vec<f32>,
}

impl ClipEncoder {
    /// Reads the encoder and the projector, to run on `threads` threads.
    ///
    /// # Errors
    /// A weight that is missing or of another shape than `config` says.
    pub fn load(
        config: &LlavaConfig,
        source: &dyn WeightSource,
        (hidden_size, threads): (usize, usize),
    ) -> Result<Self> {
        let vision = config.vision.clone();
        let reader = Reader { source, width: vision.hidden_size };
        let weights = reader.weights(config, hidden_size)?;
        Ok(Self {
            keeps_class_token: config.keeps_class_token,
            projector_activation: config.projector_activation,
            config: vision,
            cpu: Cpu { pool: Pool::new(threads), isa: Isa::detect() },
            weights,
            scratch: Scratch::default(),
        })
    }

    /// Fills `x` with the embeddings `[1 + patches, hidden]` of an image.
    fn embed(&mut self, pixels: &[f32]) {
        let (side, patch, grid) = (self.config.image_size, self.config.patch_size, self.config.grid());
        let Scratch { x, wide, weight, .. } = &mut self.scratch;
        wide.clear();
        for place in 0..grid * grid {
            let (top, left) = (place / grid * patch, place % grid * patch);
            for line in (0..3).flat_map(|channel| (0..patch).map(move |y| channel * side + top + y)) {
                wide.extend_from_slice(&pixels[line * side + left..][..patch]);
            }
        }
        let width = self.config.hidden_size;
        x.resize((1 + grid * grid) * width, 0.0);
        x[..width].copy_from_slice(&self.weights.class);
        self.weights.patches.forward(&self.cpu, (wide, weight), (&mut x[width..], false));
        add(self.cpu.isa, x, &self.weights.positions);
    }

    fn run_layer(&mut self, index: usize) {
        let (cpu, layer, eps) = (&self.cpu, &self.weights.layers[index], self.config.layer_norm_eps);
        let s = &mut self.scratch;
        let tokens = s.x.len() / self.config.hidden_size;
        layer.norms[0].apply(cpu, &s.x, eps, &mut s.normed);
        for (linear, out) in [&layer.q, &layer.k, &layer.v].into_iter().zip(&mut s.qkv) {
            out.resize(s.normed.len(), 0.0);
            linear.forward(cpu, (&s.normed, &mut s.weight), (out, false));
        }
        self.attend(tokens);
        let (cpu, layer, s) = (&self.cpu, &self.weights.layers[index], &mut self.scratch);
        layer.out.forward(cpu, (&s.mixed, &mut s.weight), (&mut s.x, true));
        layer.norms[1].apply(cpu, &s.x, eps, &mut s.normed);
        s.wide.resize(tokens * self.config.intermediate_size, 0.0);
        layer.up.forward(cpu, (&s.normed, &mut s.weight), (&mut s.wide, false));
        activate(cpu, self.config.activation, (&mut s.wide, self.config.intermediate_size));
        layer.down.forward(cpu, (&s.wide, &mut s.weight), (&mut s.x, true));
    }

    /// Attention of every token to every token, one head after the other.
    fn attend(&mut self, tokens: usize) {
        let (width, isa) = (self.config.hidden_size, self.cpu.isa);
        let head_dim = width / self.config.num_heads;
        let scale = (head_dim as f32).sqrt().recip();
        let Scratch { qkv: [q, k, v], scores, mixed, .. } = &mut self.scratch;
        mixed.resize(tokens * width, 0.0);
        scores.resize(tokens * tokens, 0.0);
        for start in (0..width).step_by(head_dim) {
            let head = |values| View::rows(values, width);
            let keys = head(&k[start..]).transposed();
            let target = Target { values: scores, stride: tokens, add: false };
            matmul(&self.cpu.pool, [tokens, head_dim, tokens], (head(&q[start..]), keys), target);
            for_each_row(&self.cpu.pool, (scores, tokens), 8, |_, row| softmax(isa, row, scale));
            let factors = (View::rows(scores, tokens), head(&v[start..]));
            let target = Target { values: &mut mixed[start..], stride: width, add: false };
            matmul(&self.cpu.pool, [tokens, tokens, head_dim], factors, target);
        }
    }

    /// How much the class token of the layer that comes next looks at each patch: its attention, mean of the heads.
    /// Empty where the checkpoint ends before that layer. (Of features taken after the last layer, it is that layer's
    /// own attention to what went into it that the paper means; there it is asked for before the layer runs.)
    fn salience(&mut self, next: usize) -> Vec<f32> {
        let width = self.config.hidden_size;
        let (cpu, eps) = (&self.cpu, self.config.layer_norm_eps);
        let (norm, q, k) = match (self.weights.layers.get(next), &self.weights.gaze) {
            (Some(layer), _) => (&layer.norms[0], &layer.q, &layer.k),
            (None, Some(gaze)) => (&gaze.norm, &gaze.q, &gaze.k),
            (None, None) => return Vec::new(),
        };
        let Scratch { weight, x, normed, qkv: [query, keys, _], .. } = &mut self.scratch;
        norm.apply(cpu, x, eps, normed);
        let tokens = normed.len() / width;
        query.resize(width, 0.0);
        q.forward(cpu, (&normed[..width], weight), (query, false));
        keys.resize(normed.len(), 0.0);
        k.forward(cpu, (normed, weight), (keys, false));
        let head_dim = width / self.config.num_heads;
        let mut salience = vec![0.0; tokens - 1];
        for start in (0..width).step_by(head_dim) {
            let query = &query[start..start + head_dim];
            let key = |token: usize| &keys[token * width + start..][..head_dim];
            let score = |token| query.iter().zip(key(token)).map(|(q, k)| q * k).sum::<f32>();
            let mut scores: Vec<f32> = (0..tokens).map(score).collect();
            softmax(cpu.isa, &mut scores, (head_dim as f32).sqrt().recip());
            salience
                .iter_mut()
                .zip(&scores[1..])
                .for_each(|(sum, p)| *sum += p / self.config.num_heads as f32);
        }
        salience
    }

    /// Merges patches that look alike; the class token stays in front.
    fn merge(&mut self, threshold: f32) -> Vec<usize> {
        let width = self.config.hidden_size;
        let x = &mut self.scratch.x;
        let merged = merge::merge((&x[width..], self.config.grid()), threshold);
        x.truncate(width);
        x.extend_from_slice(&merged.states);
        merged.places
    }

    /// The decoder's rows from the hidden states.
    fn project(&mut self) -> Vec<f32> {
        let Scratch { x, wide, weight, .. } = &mut self.scratch;
        let width = self.config.hidden_size;
        let states = &x[if self.keeps_class_token { 0 } else { width }..];
        let [first, second] = &self.weights.projector;
        let tokens = states.len() / width;
        wide.resize(tokens * first.weight.rows(), 0.0);
        first.forward(&self.cpu, (states, weight), (wide, false));
        activate(&self.cpu, self.projector_activation, (wide, first.weight.rows()));
        let mut rows = vec![0.0; tokens * second.weight.rows()];
        second.forward(&self.cpu, (wide, weight), (&mut rows, false));
        rows
    }
}

impl ImageEncoder for ClipEncoder {
    fn encode(&mut self, pixels: &[f32], encoding: Encoding) -> Result<EncodedImage> {
        let expected = 3 * self.config.image_size * self.config.image_size;
        if pixels.len() != expected {
            let found = pixels.len();
            return Err(ZooError::Image(format!("the encoder takes {expected} values, not {found}")));
        }
        self.embed(pixels);
        let eps = self.config.layer_norm_eps;
        let s = &mut self.scratch;
        self.weights.pre_norm.apply(&self.cpu, &s.x, eps, &mut s.normed);
        std::mem::swap(&mut s.x, &mut s.normed);
        let (used, mut places, mut salience) = (self.weights.layers.len(), None, Vec::new());
        let gazing = used.min(self.config.num_layers - 1);
        for index in 0..used {
            if index == gazing {
                salience = self.salience(index);
            }
            self.run_layer(index);
            // A class token among the decoder's rows has no place in the grid: nothing is merged then.
            if let (0, Some(threshold), false) = (index, encoding.merge, self.keeps_class_token) {
                places = Some(self.merge(threshold));
            }
        }
        if gazing == used {
            salience = self.salience(used);
        }
        // Asked for before anything was merged, or with the class token among the rows, it is of other tokens.
        if self.keeps_class_token || places.as_ref().is_some_and(|places| places.len() != salience.len()) {
            salience.clear();
        }
        Ok(EncodedImage { rows: self.project(), places, salience })
    }

    fn hidden_size(&self) -> usize {
        self.weights.projector[1].weight.rows()
    }

    fn tokens_per_image(&self) -> usize {
        self.config.num_patches() + usize::from(self.keeps_class_token)
    }

    fn weight_bytes(&self) -> usize {
        let w = &self.weights;
        let linears = w.layers.iter().flat_map(|l| [&l.q, &l.k, &l.v, &l.out, &l.up, &l.down]);
        let linears = linears.chain(&w.projector).chain([&w.patches]);
        let linears = linears.chain(w.gaze.iter().flat_map(|gaze| [&gaze.q, &gaze.k]));
        linears.map(EncoderLinear::bytes).sum::<usize>() + 4 * (w.positions.len() + w.class.len())
    }
}

impl Norm {
    fn apply(&self, cpu: &Cpu, x: &[f32], eps: f32, out: &mut Vec<f32>) {
        let (width, isa) = (self.weight.len(), cpu.isa);
        out.resize(x.len(), 0.0);
        for_each_row(&cpu.pool, (out, width), 2, |row, out| {
            layer_norm(isa, &x[row * width..(row + 1) * width], (&self.weight, &self.bias), eps, out);
        });
    }
}

impl EncoderLinear {
    fn bytes(&self) -> usize {
        self.weight.bytes() + 4 * self.bias.as_ref().map_or(0, Vec::len)
    }

    /// `out = x·Wᵀ + b`, or `out += …`, widening the weights into `scratch`.
    fn forward(&self, cpu: &Cpu, (x, scratch): (&[f32], &mut Vec<f32>), (out, add): (&mut [f32], bool)) {
        let (rows, cols) = (self.weight.rows(), self.weight.cols());
        scratch.resize(rows * cols, 0.0);
        let isa = cpu.isa;
        for_each_row(&cpu.pool, (scratch, cols), 1, |row, out| self.weight.dequantize_row(isa, row, out));
        let factors = (View::rows(x, cols), View::rows(scratch, cols).transposed());
        matmul(&cpu.pool, [x.len() / cols, cols, rows], factors, Target { values: out, stride: rows, add });
        if let Some(bias) = &self.bias {
            add_bias(cpu.isa, out, bias);
        }
    }
}

fn activate(cpu: &Cpu, activation: EncoderActivation, (x, width): (&mut [f32], usize)) {
    let isa = cpu.isa;
    for_each_row(&cpu.pool, (x, width), 8, |_, row| match activation {
        EncoderActivation::QuickGelu => quick_gelu(isa, row),
        EncoderActivation::Gelu => gelu(isa, row),
    });
}

/// An encoder's checkpoint being read.
struct Reader<'a> {
    source: &'a dyn WeightSource,
    width: usize,
}

impl Reader<'_> {
    fn weights(&self, config: &LlavaConfig, hidden_size: usize) -> Result<Weights> {
        let vision = &config.vision;
        let width = self.width;
        let patch_len = 3 * vision.patch_size * vision.patch_size;
        let of_patches = self.tensor("vision_tower.embeddings.patch_embedding.weight", patch_len * width)?;
        Ok(Weights {
            patches: EncoderLinear { weight: DenseMatrix::new([width, patch_len], of_patches), bias: None },
            class: self.vector("vision_tower.embeddings.class_embedding", width)?,
            positions: self.vector(
                "vision_tower.embeddings.position_embedding.weight",
                (1 + vision.num_patches()) * width,
            )?,
            // The name is spelled so.
            pre_norm: self.norm("vision_tower.pre_layrnorm")?,
            layers: (0..config.layers_used).map(|index| self.layer(index, vision)).collect::<Result<_>>()?,
            gaze: self.gaze(config.layers_used, vision)?,
            projector: [
                self.linear("multi_modal_projector.linear_1", [hidden_size, width])?,
                self.linear("multi_modal_projector.linear_2", [hidden_size, hidden_size])?,
            ],
        })
    }

    fn gaze(&self, index: usize, config: &VisionConfig) -> Result<Option<Gaze>> {
        let name = |part: &str| format!("vision_tower.encoder.layers.{index}.{part}");
        if index >= config.num_layers || !self.source.contains(&name("self_attn.q_proj.weight")) {
            return Ok(None);
        }
        let linear = |part: &str| self.linear(&name(part), [self.width; 2]);
        let (q, k) = (linear("self_attn.q_proj")?, linear("self_attn.k_proj")?);
        Ok(Some(Gaze { norm: self.norm(&name("layer_norm1"))?, q, k }))
    }

    fn layer(&self, index: usize, config: &VisionConfig) -> Result<Layer> {
        let (width, wide) = (self.width, config.intermediate_size);
        let name = |part: &str| format!("vision_tower.encoder.layers.{index}.{part}");
        let linear = |part: &str, shape| self.linear(&name(part), shape);
        Ok(Layer {
            norms: [self.norm(&name("layer_norm1"))?, self.norm(&name("layer_norm2"))?],
            q: linear("self_attn.q_proj", [width, width])?,
            k: linear("self_attn.k_proj", [width, width])?,
            v: linear("self_attn.v_proj", [width, width])?,
            out: linear("self_attn.out_proj", [width, width])?,
            up: linear("mlp.fc1", [wide, width])?,
            down: linear("mlp.fc2", [width, wide])?,
        })
    }

    fn linear(&self, name: &str, [rows, cols]: [usize; 2]) -> Result<EncoderLinear> {
        let weight = self.tensor(&format!("{name}.weight"), rows * cols)?;
        let bias = format!("{name}.bias");
        let bias = if self.source.contains(&bias) { Some(self.vector(&bias, rows)?) } else { None };
        Ok(EncoderLinear { weight: DenseMatrix::new([rows, cols], weight), bias })
    }

    fn norm(&self, name: &str) -> Result<Norm> {
        Ok(Norm {
            weight: self.vector(&format!("{name}.weight"), self.width)?,
            bias: self.vector(&format!("{name}.bias"), self.width)?,
        })
    }

    fn tensor(&self, name: &str, len: usize) -> Result<Values> {
        let tensor = self.source.tensor(name)?;
        self.check_len(name, (tensor.shape.iter().product(), len))?;
        dense(&tensor)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let values = to_f32(&self.source.tensor(name)?)?;
        self.check_len(name, (values.len(), len))?;
        Ok(values)
    }

    fn check_len(&self, name: &str, (found, expected): (usize, usize)) -> Result<()> {
        if found == expected {
            return Ok(());
        }
        Err(ZooError::Unsupported(format!("{name} has {found} values, the config says {expected}")))
    }
}
