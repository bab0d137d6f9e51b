//! The kernels as functions: sizes are checked here, so that callers need no `unsafe`.
//!
//! What the checks cannot see are indexes that lie in device memory: those of [`Places`] and `index` lists. They come
//! from [`super::tables::StepTables`], which checks each of them against the step and the pool before it is uploaded.

use super::device::{Device, Gemm, Launch, Output, Part};
use super::ffn::Skips;
use super::params::{
    ActivateParams, AddParams, EmbedParams, NormParams, PlaceParams, PlaceRowsParams, PutParams,
    RotaryParams, SkinnyParams,
};
use super::quantized::Operand;
use crate::config::Activation;
use crate::{Result, ZooError};

/// Most tokens that the kernels of few rows take.
pub const SKINNY_TOKENS: usize = 8;

/// A weight matrix `[rows, cols]` in bf16, and its bias in f32.
#[derive(Debug, Clone, Copy)]
pub struct Matrix {
    /// Its values.
    pub weight: Part,
    /// `[rows]`, or [`Part::NONE`].
    pub bias: Part,
    /// Outputs.
    pub rows: usize,
    /// Inputs, a multiple of 8.
    pub cols: usize,
}

/// Which tokens of the step a block of activations is.
#[derive(Debug, Clone, Copy)]
pub struct Tokens {
    /// How many.
    pub count: usize,
    /// Where each lies among the step's, `[count]` u32, or [`Part::NONE`] when they are its first ones.
    pub index: Part,
    /// Which of them the device passes over.
    pub skips: Option<Skips>,
}

/// An RMSNorm.
#[derive(Debug, Clone, Copy)]
pub struct Norm {
    /// `[width]` f32.
    pub weight: Part,
    /// Its epsilon.
    pub eps: f32,
}

/// Where a layer's queries, keys and values of the step's tokens go.
#[derive(Debug, Clone, Copy)]
pub struct Places {
    /// `[tokens, heads, head_dim]` bf16.
    pub q: Part,
    /// The pool.
    pub pages: Part,
    /// cos and sin, `[step tokens, head_dim / 2, 2]` f32.
    pub rotary: Part,
    /// Row of each step token, u32.
    pub rows: Part,
    /// Index of each step token among its row's, u32.
    pub within: Part,
    /// The layer's KV lengths before the step, by row, u32.
    pub kv_len: Part,
    /// Where the layer's pages begin in `tables`, by row, u32.
    pub starts: Part,
    /// Page ids, u32.
    pub tables: Part,
    /// Heads.
    pub heads: Heads,
}

/// Heads and pages of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub queries: usize,
    /// KV heads.
    pub kv: usize,
    /// Channels of a head.
    pub dim: usize,
    /// KV slots of a page.
    pub block_size: usize,
}

impl Heads {
    /// KV heads, times the sixteens of the query heads that share one: what blocks of decode attention share out.
    pub fn groups(self) -> usize {
        self.kv * (self.queries / self.kv).div_ceil(16)
    }
}

/// What comes after a product of few rows.
#[derive(Debug, Clone, Copy)]
pub enum After {
    /// f32 `[tokens, rows]`.
    Float(Part),
    /// bf16 `[tokens, rows]`.
    Half(Part),
    /// f32 `[step tokens, rows]`, added.
    Add(Part),
    /// bf16 `[tokens, rows / 2]`: of every sixteen rows, eight gates and eight values.
    Gate(Part, Activation),
    /// The joint Q, K, V product, turned and placed.
    Place(Places),
}

impl Places {
    fn params(&self) -> PlaceParams {
        PlaceParams {
            q: self.q.pointer(),
            pages: self.pages.pointer(),
            table: self.rotary.pointer(),
            rows: self.rows.pointer(),
            within: self.within.pointer(),
            kv_len: self.kv_len.pointer(),
            starts: self.starts.pointer(),
            tables: self.tables.pointer(),
            heads: self.heads.queries as u32,
            kv_heads: self.heads.kv as u32,
            head_dim: self.heads.dim as u32,
            block_size: self.heads.block_size as u32,
        }
    }

    fn check(&self, tokens: usize) -> Result<()> {
        need("queries", self.q, 2 * tokens * self.heads.queries * self.heads.dim)
    }
}

pub(super) fn need(what: &str, part: Part, bytes: usize) -> Result<()> {
    if part.len() >= bytes {
        return Ok(());
    }
    let have = part.len();
    Err(ZooError::Device(format!("{what}: {bytes} bytes are needed, the buffer has {have}")))
}

pub(super) fn run(
    device: &dyn Device,
    (kernel, threads, shared): (&'static str, u32, usize),
    grid: [u32; 3],
    params: &impl bytemuck::Pod,
) -> Result<()> {
    if grid.contains(&0) {
        return Ok(());
    }
    let params = bytemuck::bytes_of(params);
    let launch = Launch { kernel, grid, threads, shared: shared as u32, params, together: false };
    // SAFETY: every caller in this file pairs a kernel with its own parameters and has checked its buffers; indexes in
    // device memory are checked where they are made (see the module).
    unsafe { device.launch(&launch) }
}

fn activation(kind: Activation) -> u32 {
    match kind {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
    }
}

/// `x[token] = scale · table[tokens[token]]`: `[vocab, width]` to `[count, width]` f32.
///
/// # Errors
/// [`ZooError::Device`].
pub fn embed(
    device: &dyn Device,
    (table, tokens): (&Operand<'_>, Part),
    (x, count, width): (Part, usize, usize),
    scale: f32,
) -> Result<()> {
    let params = embed_params((table, tokens), (x, count, width), scale)?;
    run(device, ("embed", 256, 0), [count as u32, 1, 1], &params)
}

pub(super) fn embed_params(
    (table, tokens): (&Operand<'_>, Part),
    (x, count, width): (Part, usize, usize),
    scale: f32,
) -> Result<EmbedParams> {
    need("tokens", tokens, 4 * count)?;
    need("x", x, 4 * count * width)?;
    let (table, format) = table.table()?;
    let (table, tokens, x) = (table.pointer(), tokens.pointer(), x.pointer());
    Ok(EmbedParams { table, tokens, x, width: width as u32, scale, format, pad: 0 })
}

/// `x[tokens[i]] = rows[i]`, f32 `[count, width]` to rows of the step.
///
/// # Errors
/// [`ZooError::Device`].
pub fn put_rows(
    device: &dyn Device,
    (rows, tokens, count): (Part, Part, usize),
    (x, width): (Part, usize),
) -> Result<()> {
    need("rows", rows, 4 * count * width)?;
    need("tokens", tokens, 4 * count)?;
    let (rows, tokens, x) = (rows.pointer(), tokens.pointer(), x.pointer());
    let params = PutParams { rows, tokens, x, width: width as u32, pad: 0 };
    run(device, ("put_rows", 256, 0), [count as u32, 1, 1], &params)
}

/// cos and sin of `count` positions, times `magnitude`, into `table`, `[count, half, 2]` f32.
///
/// # Errors
/// [`ZooError::Device`].
pub fn rotary(
    device: &dyn Device,
    frequencies: (Part, f32),
    (positions, count): (Part, usize),
    table: Part,
) -> Result<()> {
    let params = rotary_params(frequencies, (positions, count), table)?;
    run(device, ("rotary", 128, 0), [count as u32, 1, 1], &params)
}

pub(super) fn rotary_params(
    (frequencies, magnitude): (Part, f32),
    (positions, count): (Part, usize),
    table: Part,
) -> Result<RotaryParams> {
    let half = frequencies.len() / 4;
    need("positions", positions, 4 * count)?;
    need("rotary", table, 8 * count * half)?;
    let (frequencies, positions, table) = (frequencies.pointer(), positions.pointer(), table.pointer());
    Ok(RotaryParams { frequencies, positions, table, half: half as u32, magnitude })
}

/// `out = norm(x)`, f32 rows of the step to dense bf16 rows.
///
/// # Errors
/// [`ZooError::Device`].
pub fn rms_norm(device: &dyn Device, (x, tokens): (Part, Tokens), norm: Norm, out: Part) -> Result<()> {
    let width = norm.weight.len() / 4;
    need("normed", out, 2 * tokens.count * width)?;
    let (x, index, out) = (x.pointer(), tokens.index.pointer(), out.pointer());
    let params =
        NormParams { x, index, weight: norm.weight.pointer(), out, width: width as u32, eps: norm.eps };
    run(device, ("rms_norm", 256, 4 * 32), [tokens.count as u32, 1, 1], &params)
}

/// `x += norm(y + bias)`, where each of `y`, `bias` and `norm` may be missing.
///
/// # Errors
/// [`ZooError::Device`].
pub fn add_rows(
    device: &dyn Device,
    (y, bias, norm): (Part, Part, Option<Norm>),
    (x, tokens): (Part, Tokens),
    width: usize,
) -> Result<()> {
    if !y.is_empty() {
        need("y", y, 4 * tokens.count * width)?;
    }
    let weight = norm.map_or(Part::NONE, |norm| norm.weight);
    let params = AddParams {
        y: y.pointer(),
        bias: bias.pointer(),
        norm: weight.pointer(),
        index: tokens.index.pointer(),
        x: x.pointer(),
        width: width as u32,
        eps: norm.map_or(0.0, |norm| norm.eps),
    };
    run(device, ("add_rows", 256, 4 * 32), [tokens.count as u32, 1, 1], &params)
}

/// `out = act(gate) · up`, from rows of interleaved eights to `[count, width]` bf16; zeros for tokens that are passed over.
///
/// # Errors
/// [`ZooError::Device`].
pub fn activate_rows(
    device: &dyn Device,
    (gate_up, bias): (Part, Part),
    (out, tokens, width): (Part, Tokens, usize),
    kind: Activation,
) -> Result<()> {
    need("gates", gate_up, 4 * tokens.count * width)?;
    need("gated", out, 2 * tokens.count * width)?;
    let params = ActivateParams {
        gate_up: gate_up.pointer(),
        bias: bias.pointer(),
        out: out.pointer(),
        index: tokens.index.pointer(),
        width: width as u32,
        activation: activation(kind),
        skips: Skips::params(tokens.skips.as_ref()),
    };
    run(device, ("activate_rows", 256, 0), [tokens.count as u32, 1, 1], &params)
}

/// Adds biases, norms heads by `norms` where there are any, turns them, and writes them where they belong.
///
/// # Errors
/// [`ZooError::Device`].
pub fn place_rows(
    device: &dyn Device,
    (qkv, bias, tokens): (Part, Part, Tokens),
    norms: Option<[Norm; 2]>,
    places: &Places,
) -> Result<()> {
    let heads = places.heads;
    need("qkv", qkv, 2 * tokens.count * (heads.queries + 2 * heads.kv) * heads.dim)?;
    places.check(tokens.count)?;
    let weight = |which: usize| norms.map_or(0, |norms| norms[which].weight.pointer());
    let params = PlaceRowsParams {
        qkv: qkv.pointer(),
        bias: bias.pointer(),
        q_norm: weight(0),
        k_norm: weight(1),
        index: tokens.index.pointer(),
        eps: norms.map_or(0.0, |[norm, _]| norm.eps),
        pad: 0,
        place: places.params(),
    };
    run(device, ("place_rows", 256, 0), [tokens.count as u32, 1, 1], &params)
}

/// The product of `matrix` with up to [`SKINNY_TOKENS`] tokens: of `x` normed, f32 rows of the step, or of dense bf16
/// rows; then `after`.
///
/// # Errors
/// [`ZooError::Device`], also for a combination that there is no kernel for.
pub fn skinny(
    device: &dyn Device,
    matrix: &Matrix,
    (x, tokens, norm): (Part, Tokens, Option<Norm>),
    after: After,
) -> Result<()> {
    let kernel = match (after, norm.is_some()) {
        (After::Float(_), true) => "skinny_norm_float",
        (After::Float(_), false) => "skinny_float",
        (After::Half(_), true) => "skinny_norm_half",
        (After::Gate(..), true) => "skinny_norm_gate",
        (After::Place(_), true) => "skinny_norm_place",
        (After::Add(_), false) => "skinny_add",
        (after, normed) => {
            return Err(ZooError::Device(format!("no kernel for {after:?} of rows normed: {normed}")));
        }
    };
    if tokens.count > SKINNY_TOKENS {
        return Err(ZooError::Device(format!("{} tokens for a kernel of {SKINNY_TOKENS}", tokens.count)));
    }
    let params = skinny_params(matrix, (x, tokens, norm), after)?;
    let shared = 4 * 8 * SKINNY_TOKENS * (20 + 1);
    let blocks = if tokens.count == 0 { 0 } else { matrix.rows.div_ceil(16) as u32 };
    run(device, (kernel, 256, shared), [blocks, 1, 1], &params)
}

/// What [`skinny`]'s kernels are told, checked.
pub(super) fn skinny_params(
    matrix: &Matrix,
    (x, tokens, norm): (Part, Tokens, Option<Norm>),
    after: After,
) -> Result<SkinnyParams> {
    let Matrix { weight, bias, rows, cols } = *matrix;
    need("weights", weight, 2 * rows * cols)?;
    if !cols.is_multiple_of(8) {
        return Err(ZooError::Device(format!("weight rows of {cols} for a kernel that takes eights")));
    }
    if norm.is_none() {
        need("x", x, 2 * tokens.count * cols)?;
    }
    Ok(SkinnyParams {
        weight: weight.pointer(),
        x: x.pointer(),
        norm: norm.map_or(0, |norm| norm.weight.pointer()),
        cols: cols as u32,
        eps: norm.map_or(0.0, |norm| norm.eps),
        ..after_params((rows, bias), tokens, after)?
    })
}

/// What comes after a product of `rows` outputs a token, checked: of [`SkinnyParams`] all that is not about its inputs.
pub(super) fn after_params(
    (rows, bias): (usize, Part),
    tokens: Tokens,
    after: After,
) -> Result<SkinnyParams> {
    let mut params = SkinnyParams {
        bias: bias.pointer(),
        index: tokens.index.pointer(),
        rows: rows as u32,
        tokens: tokens.count as u32,
        skips: Skips::params(tokens.skips.as_ref()),
        ..bytemuck::Zeroable::zeroed()
    };
    let out = match after {
        After::Float(out) => (out, 4 * tokens.count * rows),
        After::Half(out) => (out, 2 * tokens.count * rows),
        After::Gate(out, kind) => {
            params.activation = activation(kind);
            (out, tokens.count * rows)
        }
        After::Place(places) => {
            places.check(tokens.count)?;
            params.place = places.params();
            (Part::NONE, 0)
        }
        After::Add(out) => (out, 0),
    };
    need("product", out.0, out.1)?;
    params.out = out.0.pointer();
    Ok(params)
}

/// The product of dense bf16 rows with `matrix`, without its bias.
///
/// # Errors
/// [`ZooError::Device`].
pub fn product(
    device: &dyn Device,
    matrix: &Matrix,
    (x, count): (Part, usize),
    (y, output): (Part, Output),
) -> Result<()> {
    if count == 0 {
        return Ok(());
    }
    device.gemm(&Gemm { size: [count, matrix.rows, matrix.cols], x, w: matrix.weight, y, output })
}
