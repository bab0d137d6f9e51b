//! BitStack (arXiv 2410.23918, ICLR 2025): weights as a stack of residual blocks, of which any prefix serves.
//!
//! What it changes: each of a layer's seven matrices is `W ≈ Σ S_i ⊙ (A_i B_i)`: a level is a matrix of signs and a
//! low-rank matrix of magnitudes, and lessens the residual of the levels before it. The first level of every matrix
//! is the base, which is always held; the other blocks lie in one stack, the most useful first, and whatever prefix
//! of it fits the memory is the model.
//!
//! What it saves: weight bytes, for the whole server; a request that is served with fewer levels than are held saves
//! work, but no memory. Knobs: `memory.weights`, and a request's levels.
//!
//! A stack is made once, by [`build`], into one file, the [`artefact`]. [`avd`] is the published decomposition,
//! [`fit`] one that sees what the matrix's [`inputs`] are, [`scale`] measures those, [`order`] sorts the stack.
//! [`import`] reads checkpoints in the layout that the paper's authors publish.

pub mod artefact;
pub mod avd;
pub mod build;
pub mod dense;
pub mod fit;
pub mod import;
pub mod inputs;
pub mod journal;
pub mod linalg;
pub mod order;
pub mod published;
pub mod quantized;
pub mod random;
pub mod scale;
pub mod serve;
pub mod signs;
pub mod source;

use serde::{Deserialize, Serialize};

pub use artefact::{Artefact, BlockEntry};

use crate::config::DecoderConfig;

/// The matrices of a decoder layer, in the order in which a forward pass needs them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Projection {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Attention's output.
    O,
    /// The feed-forward block's gate.
    Gate,
    /// What the gate multiplies.
    Up,
    /// The feed-forward block's output.
    Down,
}

impl Projection {
    /// All of them, in order.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Its module below `model.layers.N` in Hugging Face's names.
    pub fn module(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// Rows and columns in a decoder of `config`: width of the output and of the input.
    pub fn size(self, config: &DecoderConfig) -> [usize; 2] {
        let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
        let (heads, kv_heads) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        match self {
            Self::Q => [heads, hidden],
            Self::K | Self::V => [kv_heads, hidden],
            Self::O => [hidden, heads],
            Self::Gate | Self::Up => [ffn, hidden],
            Self::Down => [hidden, ffn],
        }
    }
}

/// One decomposed matrix of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LinearId {
    /// Its layer.
    pub layer: usize,
    /// Its place there.
    pub projection: Projection,
}

impl LinearId {
    /// Every matrix of a model, layer by layer.
    pub fn all(num_layers: usize) -> impl Iterator<Item = Self> {
        (0..num_layers).flat_map(|layer| Projection::ALL.map(|projection| Self { layer, projection }))
    }

    /// Its place in [`LinearId::all`].
    pub fn index(self) -> usize {
        self.layer * Projection::ALL.len() + self.projection as usize
    }

    /// Its weight's name in Hugging Face's spelling.
    pub fn weight_name(self) -> String {
        format!("model.layers.{}.{}.weight", self.layer, self.projection.module())
    }

    /// The matrix whose weight has this name, if it is one that is decomposed.
    pub fn of_weight(name: &str) -> Option<Self> {
        let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let module = rest.strip_suffix(".weight")?;
        let projection = Projection::ALL.into_iter().find(|projection| projection.module() == module)?;
        Some(Self { layer: layer.parse().ok()?, projection })
    }
}

impl std::fmt::Display for LinearId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "layer {} {}", self.layer, self.projection.module())
    }
}

/// A matrix's sizes, and the rank of its magnitudes, the same at every level.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Width of the output.
    pub rows: usize,
    /// Width of the input.
    pub cols: usize,
    /// Rank of a level's magnitudes.
    pub rank: usize,
}

impl Shape {
    /// Bytes of the signs of one level.
    pub fn sign_bytes(self) -> usize {
        self.rows * self.cols / 8
    }

    /// Bytes of one level: `m·n/8 + 2k(m+n)`.
    pub fn block_bytes(self) -> usize {
        self.sign_bytes() + 2 * self.rank * (self.rows + self.cols)
    }
}

/// One level of one matrix: it adds `S ⊙ (A·B)` to the levels before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// The matrix.
    pub linear: LinearId,
    /// From 0.
    pub level: usize,
    /// The signs of `S` `[rows, cols]`, row after row, the first in the highest bit of a byte; 1 is +1.
    pub signs: Vec<u8>,
    /// `A` `[rows, rank]`, bits of f16.
    pub u: Vec<u16>,
    /// `B` `[rank, cols]`, bits of f16.
    pub vt: Vec<u16>,
}

impl Block {
    /// The bytes of an artefact: signs, `A`, `B`, little-endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.signs.len() + 2 * (self.u.len() + self.vt.len()));
        bytes.extend_from_slice(&self.signs);
        bytes.extend(self.u.iter().chain(&self.vt).flat_map(|half| half.to_le_bytes()));
        bytes
    }

    /// The block that [`Block::to_bytes`] wrote, or `None` when the bytes are not as many as `shape` says.
    pub fn from_bytes((linear, level): (LinearId, usize), shape: Shape, bytes: &[u8]) -> Option<Self> {
        if bytes.len() != shape.block_bytes() {
            return None;
        }
        let (signs, factors) = bytes.split_at(shape.sign_bytes());
        let (u, vt) = factors.split_at(2 * shape.rank * shape.rows);
        let halves = |bytes: &[u8]| bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
        Some(Self { linear, level, signs: signs.to_vec(), u: halves(u), vt: halves(vt) })
    }
}
