//! Reading a decoder's weights.

use super::{CpuDecoder, Layer, Scratch, Weights};
use crate::config::DecoderConfig;
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::pool::Pool;
use crate::layers::linear::{Cpu, Linear, to_f32};
use crate::layers::rotary::Rotary;
use crate::layers::stack::StackMatrix;
use crate::models::ModelDims;
use crate::models::levels::{Matrices, Stack, matrices};
use crate::weights::WeightSource;
use crate::weights::levels::LevelSource;
use crate::{Result, ZooError};

/// A checkpoint being read for a config.
struct Reader<'a> {
    config: &'a DecoderConfig,
    source: &'a dyn WeightSource,
    cpu: &'a Cpu,
    /// The matrices that come in levels.
    matrices: Matrices,
}

impl CpuDecoder {
    /// Reads every weight that `config` names and holds it in its kernel's form, on `threads` threads.
    ///
    /// # Errors
    /// A weight that is missing, of another shape than `config` says, or of a type that is not served.
    pub fn load(config: DecoderConfig, source: &dyn WeightSource, threads: usize) -> Result<Self> {
        Self::load_for(config, source, threads, Isa::detect())
    }

    /// [`CpuDecoder::load`] for a given instruction set.
    ///
    /// # Errors
    /// As [`CpuDecoder::load`].
    pub fn load_for(
        config: DecoderConfig,
        source: &dyn WeightSource,
        threads: usize,
        isa: Isa,
    ) -> Result<Self> {
        Self::read(config, source, (threads, isa), Matrices::new())
    }

    /// Reads the weights that `levels` has in levels, as many as `budget` bytes of weights hold, and all others from
    /// `source`. Memory never holds more than the budget and one level.
    ///
    /// # Errors
    /// As [`CpuDecoder::load`]; [`ZooError::WeightBudget`] when the budget is less than the model can do with.
    pub fn load_in_levels(
        config: DecoderConfig,
        (source, levels): (&dyn WeightSource, Box<dyn LevelSource>),
        (threads, isa): (usize, Isa),
        budget: Option<u64>,
    ) -> Result<Self> {
        let mut decoder = Self::read(config, source, (threads, isa), matrices(&*levels)?)?;
        decoder.stack =
            Some(Stack::new(levels, decoder.weights.bytes() as u64, |entry| entry.shape.held_bytes() as u64));
        decoder.fill_stack(budget)?;
        decoder.dims.weight_bytes = decoder.weights.bytes();
        Ok(decoder)
    }

    fn read(
        config: DecoderConfig,
        source: &dyn WeightSource,
        (threads, isa): (usize, Isa),
        matrices: Matrices,
    ) -> Result<Self> {
        let cpu = Cpu { pool: Pool::new(threads), isa };
        let weights = Reader { config: &config, source, cpu: &cpu, matrices }.weights()?;
        let dims = ModelDims::of(&config, weights.bytes(), weights.of_sublayers());
        Ok(Self { config, dims, cpu, weights, stack: None, scratch: Scratch::default() })
    }
}

impl Weights {
    /// Weights of one attention and one FFN sublayer, those of the first layer.
    fn of_sublayers(&self) -> [usize; 2] {
        let count = |linears: &[&Linear]| linears.iter().map(|l| l.in_features() * l.out_features()).sum();
        self.layers
            .first()
            .map_or([1; 2], |l| [count(&[&l.q, &l.k, &l.v, &l.o]), count(&[&l.gate, &l.up, &l.down])])
    }

    fn bytes(&self) -> usize {
        let norms = |layer: &Layer| {
            let extra = [&layer.qk_norm, &layer.post_norms].into_iter().flatten().flatten();
            layer.attention_norm.len() + layer.ffn_norm.len() + extra.map(Vec::len).sum::<usize>()
        };
        let layer = |l: &Layer| {
            let linears = [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down];
            linears.iter().map(|linear| linear.bytes()).sum::<usize>() + 4 * norms(l)
        };
        self.embedding.bytes()
            + self.lm_head.as_ref().map_or(0, Linear::bytes)
            + self.layers.iter().map(layer).sum::<usize>()
            + 4 * self.norm.len()
    }
}

impl Reader<'_> {
    fn weights(&self) -> Result<Weights> {
        let config = self.config;
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let rotary = Rotary::new(&config.rope, config.head_dim, config.rope_style);
        let local = config.sliding_window.as_ref().and_then(|window| window.rope.as_ref());
        let lm_head =
            if config.tie_word_embeddings { None } else { Some(self.linear("lm_head", [vocab, hidden])?) };
        Ok(Weights {
            embedding: self.linear("model.embed_tokens", [vocab, hidden])?,
            layers: (0..config.num_layers).map(|index| self.layer(index)).collect::<Result<_>>()?,
            norm: self.norm("model.norm", hidden)?,
            lm_head,
            rotary,
            local_rotary: local.map(|rope| Rotary::new(rope, config.head_dim, config.rope_style)),
        })
    }

    fn layer(&self, index: usize) -> Result<Layer> {
        let c = self.config;
        let (hidden, ffn) = (c.hidden_size, c.intermediate_size);
        let (q_width, kv_width) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let linear = |part: &str, shape| self.linear(&name(part), shape);
        let norm = |part: &str, len| self.norm(&name(part), len);
        let qk_norm = if c.qk_norm {
            Some([norm("self_attn.q_norm", c.head_dim)?, norm("self_attn.k_norm", c.head_dim)?])
        } else {
            None
        };
        // Gemma calls the norm after attention what others call the norm before the FFN.
        let (ffn_norm, post_norms) = if c.sandwich_norms {
            let post =
                [norm("post_attention_layernorm", hidden)?, norm("post_feedforward_layernorm", hidden)?];
            (norm("pre_feedforward_layernorm", hidden)?, Some(post))
        } else {
            (norm("post_attention_layernorm", hidden)?, None)
        };
        let window = c.sliding_window.as_ref();
        Ok(Layer {
            attention_norm: norm("input_layernorm", hidden)?,
            q: linear("self_attn.q_proj", [q_width, hidden])?,
            k: linear("self_attn.k_proj", [kv_width, hidden])?,
            v: linear("self_attn.v_proj", [kv_width, hidden])?,
            o: linear("self_attn.o_proj", [hidden, q_width])?,
            qk_norm,
            ffn_norm,
            gate: linear("mlp.gate_proj", [ffn, hidden])?,
            up: linear("mlp.up_proj", [ffn, hidden])?,
            down: linear("mlp.down_proj", [hidden, ffn])?,
            post_norms,
            window: window.filter(|w| w.layers.get(index) == Some(&true)).map(|w| w.window),
        })
    }

    fn linear(&self, name: &str, shape: [usize; 2]) -> Result<Linear> {
        let bias = format!("{name}.bias");
        let bias = if self.source.contains(&bias) { Some(self.source.tensor(&bias)?) } else { None };
        if let Some((levels, places)) = self.matrices.get(name) {
            let found = [levels.rows, levels.cols];
            if found != shape {
                return Err(ZooError::Unsupported(format!(
                    "the levels of {name} have shape {found:?}, the config says {shape:?}"
                )));
            }
            return Linear::in_levels(StackMatrix::new(*levels, places.clone()), bias.as_ref());
        }
        let weight = self.source.tensor(&format!("{name}.weight"))?;
        if weight.shape != shape {
            let found = &weight.shape;
            return Err(ZooError::Unsupported(format!(
                "{name}.weight has shape {found:?}, the config says {shape:?}"
            )));
        }
        Linear::new(self.cpu, &weight, bias.as_ref())
    }

    fn norm(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let mut weight = to_f32(&self.source.tensor(&format!("{name}.weight"))?)?;
        if weight.len() != len {
            let found = weight.len();
            return Err(ZooError::Unsupported(format!(
                "{name}.weight has {found} values, the config says {len}"
            )));
        }
        weight.iter_mut().for_each(|w| *w += self.config.norm_offset);
        Ok(weight)
    }
}
