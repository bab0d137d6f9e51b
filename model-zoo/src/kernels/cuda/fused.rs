//! A decode step of few tokens as one launch (`fused.cuh`): its stages are gathered, described to the device once, and run
//! again and again.

use std::sync::Arc;

use super::attention::{Attention, Items, join_memory};
use super::device::{Buffer, Device, Graph, Launch, Part, TileMap};
use super::ops::{After, Heads, Norm, Tokens, embed_params, need, rotary_params, skinny_params};
use super::params::{FusedParams, StageParams};
use super::quantized::Operand;
use crate::{Result, ZooError};

/// Most tokens of a step.
pub const FUSED_TOKENS: usize = 32;

/// Slots of a page: units of sixteen are copied whole.
pub const FUSED_BLOCK: usize = 16;

/// Channels of heads that it is compiled for: models without quantized weights, and those with; of each steps without
/// packed slots, and those with.
macro_rules! kernels {
    ($($dim:literal),*) => {
        [$((
            $dim,
            [
                [concat!("fused_step_", $dim), concat!("fused_step_packed_", $dim)],
                [concat!("fused_step_quantized_", $dim), concat!("fused_step_packed_quantized_", $dim)],
            ],
        )),*]
    };
}
const KERNELS: [(usize, [[&str; 2]; 2]); 5] = kernels![16, 32, 64, 96, 128];

/// Warps that compute, and threads of a block: one more warp copies.
const WARPS: usize = 8;
const THREADS: u32 = 32 * WARPS as u32 + 32;
/// Bytes of a block's memory that have a fixed place (`FUSED_MEMORY`), and of a piece (`TILE_BYTES`).
const FIXED: usize = 43 << 10;
const PIECE: usize = 16 << 10;
/// Most pieces of a block, and those that are under way at once: about what the memory's latency takes, so that what else
/// is read does not wait behind them.
const MOST_PIECES: usize = 12;
/// Fewer pieces do not bridge the meetings of blocks: launches of their own are faster then.
const LEAST_PIECES: usize = 4;
const AHEAD: usize = 3;
/// Pieces of quantized weights are smaller.
const QUANTIZED_AHEAD: usize = 6;
/// Bytes of activations that are brought to a block's memory because they are read often.
const STAGED: usize = 64 << 10;
/// Flags of a step: more than it has stages.
pub const FLAGS: u32 = 1024;
/// Parts that joining takes at most.
const MOST_SPLITS: usize = 32;

/// What a stage is: `StageKind` in `fused.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(u32)]
enum Kind {
    Embed,
    Float,
    Add,
    Gate,
    Place,
    Attention,
}

/// Stages as they are gathered.
#[derive(Debug)]
pub struct Program<'a> {
    device: &'a Arc<dyn Device>,
    /// Of models without quantized weights, and with.
    kernels: [&'static str; 2],
    quantized: bool,
    stages: Vec<StageParams>,
    maps: Vec<TileMap>,
    /// Bytes of a block's memory for activations or attention.
    room: usize,
}

/// Whether a step of `tokens` tokens of a model with these heads, hidden size and FFN channels can be one launch.
pub fn fuses(device: &dyn Device, tokens: usize, heads: Heads, [hidden, ffn]: [usize; 2]) -> bool {
    let room = normed_bytes(tokens, hidden).max(join_memory(heads, WARPS)).next_multiple_of(1024);
    (1..=FUSED_TOKENS).contains(&tokens)
        && device.copies_tiles()
        && KERNELS.iter().any(|(dim, _)| *dim == heads.dim)
        && heads.block_size == FUSED_BLOCK
        && [hidden, ffn, heads.queries * heads.dim].iter().all(|width| width.is_multiple_of(64))
        && FIXED + room + LEAST_PIECES * PIECE <= device.block_memory()
}

/// Bytes that activations take in a block's memory.
fn normed_bytes(tokens: usize, cols: usize) -> usize {
    2 * tokens * (cols.next_multiple_of(64) + 32)
}

impl<'a> Program<'a> {
    /// No stages yet, for heads of `dim` channels, of rows some of whose slots are packed or not.
    ///
    /// # Errors
    /// [`ZooError::Device`] when no kernel is compiled for them.
    pub fn new(device: &'a Arc<dyn Device>, (dim, packed): (usize, bool)) -> Result<Self> {
        let kernel = KERNELS.iter().find(|(own, _)| *own == dim);
        let unknown = || ZooError::Device(format!("no joint kernel for heads of {dim} channels"));
        let kernels = kernel.ok_or_else(unknown)?.1.map(|kernels| kernels[usize::from(packed)]);
        Ok(Self { device, kernels, quantized: false, stages: Vec::new(), maps: Vec::new(), room: 0 })
    }

    fn push(&mut self, stage: StageParams, map: TileMap) {
        self.stages.push(stage);
        self.maps.push(map);
    }

    /// Embeds `count` tokens, as [`super::ops::embed`] and [`super::ops::rotary`] do.
    ///
    /// # Errors
    /// [`ZooError::Device`]; so for all that follow.
    pub fn embed(
        &mut self,
        ((table, tokens), (x, width), scale): ((&Operand<'_>, Part), (Part, usize), f32),
        (frequencies, positions, turns): ((Part, f32), Part, Part),
        count: usize,
    ) -> Result<()> {
        let stage = StageParams {
            kind: Kind::Embed as u32,
            tokens: count as u32,
            embed: embed_params((table, tokens), (x, count, width), scale)?,
            rotary: rotary_params(frequencies, (positions, count), turns)?,
            ..bytemuck::Zeroable::zeroed()
        };
        self.quantized |= matches!(table, Operand::Quantized(_));
        self.push(stage, [0; 16]);
        Ok(())
    }

    /// As [`super::ops::skinny`].
    ///
    /// # Errors
    /// As [`Program::embed`].
    pub fn product(
        &mut self,
        matrix: &Operand<'_>,
        (x, tokens, norm): (Part, Tokens, Option<Norm>),
        after: After,
    ) -> Result<()> {
        let kind = match after {
            After::Float(_) => Kind::Float as u32,
            After::Add(_) => Kind::Add as u32,
            After::Gate(..) => Kind::Gate as u32,
            After::Place(_) => Kind::Place as u32,
            After::Half(_) => return Err(ZooError::Device("a stage that only stores halves".into())),
        };
        let mut stage = StageParams { kind, ..bytemuck::Zeroable::zeroed() };
        let mut map = [0; 16];
        match matrix {
            Operand::Dense(matrix) => {
                stage.skinny = skinny_params(matrix, (x, tokens, norm), after)?;
                map = self.device.tile_map(matrix.weight, matrix.rows, matrix.cols)?;
            }
            Operand::Quantized(matrix) => {
                stage.skinny = matrix.skinny((x, tokens, norm), after)?;
                stage.quantized = matrix.params()?;
                self.quantized = true;
            }
        }
        let bytes = normed_bytes(tokens.count, stage.skinny.cols as usize);
        if norm.is_some() || bytes <= STAGED {
            self.room = self.room.max(bytes);
        }
        self.push(stage, map);
        Ok(())
    }

    /// As [`Attention::decode`], in as many splits as there are blocks for.
    ///
    /// # Errors
    /// As [`Program::embed`].
    pub fn attention(&mut self, attention: &Attention, items: Items) -> Result<()> {
        let heads = attention.places.heads;
        let groups = heads.groups();
        let blocks = self.device.multiprocessors() as usize;
        let splits = (blocks / (items.count * groups).max(1)).clamp(1, MOST_SPLITS);
        attention.check_decode(items, splits)?;
        self.room = self.room.max(join_memory(heads, WARPS));
        let stage = StageParams {
            kind: Kind::Attention as u32,
            tokens: items.count as u32,
            head_groups: groups as u32,
            splits: splits as u32,
            attention: attention.params(items.items),
            ..bytemuck::Zeroable::zeroed()
        };
        self.push(stage, [0; 16]);
        Ok(())
    }

    /// Has stages that norm what the stage before them has added to read it from `links`, of one token: of more it would be too
    /// much to look at again and again.
    fn link(&mut self, links: Part) -> Result<()> {
        if self.stages.len() >= FLAGS as usize {
            return Ok(());
        }
        for next in 1..self.stages.len() {
            let (before, after) = self.stages.split_at_mut(next);
            let (from, to) = (&mut before[next - 1], &mut after[0]);
            let (added, normed) = (&from.skinny, &to.skinny);
            let same = (added.out, added.index, added.tokens, added.rows)
                == (normed.x, normed.index, normed.tokens, normed.cols);
            if from.kind == Kind::Add as u32 && normed.norm != 0 && same && normed.tokens == 1 {
                // Tokens lie among those of a step, which are no more than a step of this kind has.
                need("links", links, 8 * FUSED_TOKENS * normed.cols as usize)?;
                (from.links, to.links) = (links.pointer(), links.pointer());
            }
        }
        Ok(())
    }

    /// Brings the stages to the device. `arrived` is a word that is zero before each run, and one that is higher by [`FLAGS`]
    /// each time; `links` is memory of pairs of words for the stream of a step, zero before they begin anew.
    ///
    /// # Errors
    /// As [`Program::embed`]; also when a block's memory is too small.
    pub fn finish(mut self, arrived: Part, links: Part) -> Result<FusedStep> {
        need("the counter", arrived, 8)?;
        self.link(links)?;
        let room = self.room.next_multiple_of(1024);
        let left = self.device.block_memory().saturating_sub(FIXED + room);
        let slots = (left / PIECE).min(MOST_PIECES);
        if slots < LEAST_PIECES {
            let room = room >> 10;
            return Err(ZooError::Device(format!(
                "a block's memory is too small for {room} KiB of activations"
            )));
        }
        let stages: &[u8] = bytemuck::cast_slice(&self.stages);
        // Descriptions lie at multiples of 64, and the device's memory begins at one.
        let maps = stages.len().next_multiple_of(64);
        let buffer = self.device.alloc(maps + size_of::<TileMap>() * self.maps.len())?;
        let part = Part::all(&buffer);
        self.device.upload(part, stages)?;
        self.device.upload(part.slice(maps, part.len() - maps)?, bytemuck::cast_slice(&self.maps))?;
        Ok(FusedStep {
            device: Arc::clone(self.device),
            kernel: self.kernels[usize::from(self.quantized)],
            ahead: if self.quantized { QUANTIZED_AHEAD } else { AHEAD }.min(slots),
            count: self.stages.len() as u32,
            maps: part.slice(maps, part.len() - maps)?,
            buffer,
            arrived,
            room,
            slots,
        })
    }
}

/// A step that is one launch.
#[derive(Debug)]
pub struct FusedStep {
    device: Arc<dyn Device>,
    kernel: &'static str,
    count: u32,
    buffer: Buffer,
    maps: Part,
    arrived: Part,
    room: usize,
    slots: usize,
    ahead: usize,
}

impl FusedStep {
    fn launch(&self, (from, to): (u32, u32), together: bool) -> Result<()> {
        let params = FusedParams {
            stages: Part::all(&self.buffer).pointer(),
            maps: self.maps.pointer(),
            arrived: self.arrived.pointer(),
            from,
            to,
            room: self.room as u32,
            slots: self.slots as u32,
            ahead: self.ahead as u32,
            pad: 0,
        };
        let launch = Launch {
            kernel: self.kernel,
            grid: [self.device.multiprocessors(), 1, 1],
            threads: THREADS,
            shared: (FIXED + self.room + self.slots * PIECE) as u32,
            params: bytemuck::bytes_of(&params),
            together,
        };
        // SAFETY: stages were checked as they were gathered; indexes in device memory are checked where they are made
        // (see `ops`). A launch of several stages has blocks that run together.
        unsafe { self.device.launch(&launch) }
    }
}

impl Graph for FusedStep {
    fn replay(&self) -> Result<()> {
        if self.device.runs_together() {
            return self.launch((0, self.count), true);
        }
        (0..self.count).try_for_each(|stage| self.launch((stage, stage + 1), false))
    }
}
