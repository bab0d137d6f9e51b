//! What a config may say. A decoder relies on it: it allocates and indexes by these numbers.

use std::path::Path;

use super::{DecoderConfig, RopeConfig, RopeScaling};
use crate::{Result, ZooError};

impl DecoderConfig {
    /// Checks every number against the others and against what any model of these families could have.
    ///
    /// # Errors
    /// [`ZooError::Format`] at `path` with the first contradiction.
    pub(crate) fn validate(&self, path: &Path) -> Result<()> {
        self.check().map_err(|reason| ZooError::format(path, reason))
    }

    fn check(&self) -> Result<(), String> {
        let sizes = [
            ("hidden size", self.hidden_size, 1 << 16),
            ("intermediate size", self.intermediate_size, 1 << 18),
            ("number of layers", self.num_layers, 1 << 10),
            ("number of heads", self.num_heads, 1 << 10),
            ("number of KV heads", self.num_kv_heads, 1 << 10),
            ("head dimension", self.head_dim, 1 << 10),
            ("vocabulary size", self.vocab_size, 1 << 22),
            ("context length", self.max_context, 1 << 24),
        ];
        for (name, size, max) in sizes {
            if size == 0 || size > max {
                return Err(format!("the {name} is {size}; 1 to {max} is possible"));
            }
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return Err(format!("{} heads cannot share {} KV heads", self.num_heads, self.num_kv_heads));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(format!("the head dimension {} is odd, which RoPE cannot rotate", self.head_dim));
        }
        if !(0.0..1.0).contains(&self.rms_norm_eps) {
            return Err(format!("the RMSNorm epsilon is {}", self.rms_norm_eps));
        }
        if !positive(self.attention_scale) {
            return Err(format!("the attention scale is {}", self.attention_scale));
        }
        check_rope(&self.rope, self.head_dim)?;
        self.check_window()
    }

    fn check_window(&self) -> Result<(), String> {
        let Some(sliding) = &self.sliding_window else { return Ok(()) };
        if sliding.window == 0 {
            return Err("the sliding window is 0".to_owned());
        }
        if sliding.layers.len() != self.num_layers {
            let given = sliding.layers.len();
            return Err(format!("the window pattern has {given} entries for {} layers", self.num_layers));
        }
        sliding.rope.as_ref().map_or(Ok(()), |rope| check_rope(rope, self.head_dim))
    }
}

fn check_rope(rope: &RopeConfig, head_dim: usize) -> Result<(), String> {
    if !(rope.theta.is_finite() && rope.theta > 1.0) {
        return Err(format!("the RoPE base is {}", rope.theta));
    }
    let plausible = match &rope.scaling {
        RopeScaling::None => true,
        RopeScaling::Linear { factor } => stretches(*factor),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
            stretches(*factor)
                && positive(*low_freq_factor)
                && high_freq_factor.is_finite()
                && high_freq_factor > low_freq_factor
                && positive(*original_max_position)
        }
        RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, attention_factor } => {
            stretches(*factor)
                && positive(*original_max_position)
                && positive(*beta_slow)
                && beta_fast.is_finite()
                && beta_fast >= beta_slow
                && attention_factor.is_none_or(positive)
        }
        RopeScaling::Factors(factors) => {
            factors.len() == head_dim / 2 && factors.iter().all(|&factor| positive(factor))
        }
    };
    if plausible { Ok(()) } else { Err(format!("the RoPE scaling is impossible: {:?}", rope.scaling)) }
}

fn positive(x: f32) -> bool {
    x.is_finite() && x > 0.0
}

fn stretches(factor: f32) -> bool {
    (1.0..=1e6).contains(&factor)
}
