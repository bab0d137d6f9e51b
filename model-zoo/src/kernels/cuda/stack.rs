//! Products with weights in levels (BitStack, arXiv 2410.23918): see `stack.cuh` for how, and for a level's layout.
//!
//! What the checks here cannot see are the levels behind [`Entry::level`] and the counts in [`Input::blocks`], which lie
//! in device memory: who makes them sees to it that no token's count reaches a level that is not there.

use super::device::{Device, Part};
use super::ffn::Skips;
use super::ops::{After, Tokens, after_params, need, run};
use super::params::{StackJoinParams, StackParams, StackPartParams, StackWholeParams};
use crate::kernels::cpu::bitstack::{LevelParts, LevelShape};
use crate::{Result, ZooError};

/// Most tokens that [`few`] takes.
pub const STACK_TOKENS: usize = 32;

/// Parts of a joint matrix, at most: Q, K and V.
const PARTS: usize = 3;
/// Warps of a block, the groups of 64 columns that it takes at once, and the bytes of a unit.
const WARPS: usize = 8;
const THREADS: u32 = 32 * WARPS as u32;
const CHUNK: usize = 4;
const UNIT: usize = 512;
/// Bytes of a token's activations in a block's memory.
const ROW: usize = 16 * (CHUNK * 8 + 1);

/// A level in device memory, as kernels look it up.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Where it lies.
    pub level: u64,
    /// The blocks of the model's stack that a token uses if it uses this level: 0 for the base.
    pub from: u32,
    /// 0.
    pub pad: u32,
}

/// Bytes of an [`Entry`].
pub const ENTRY_BYTES: usize = size_of::<Entry>();

impl Entry {
    /// As kernels read it.
    pub fn bytes(self) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        bytes[..8].copy_from_slice(&self.level.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.from.to_ne_bytes());
        bytes
    }
}

/// Sizes of a level on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceLevel {
    /// Output rows.
    pub rows: usize,
    /// Input columns, a multiple of 32.
    pub cols: usize,
    /// Sixteens of the rank: 1 or 2.
    pub units: usize,
}

impl DeviceLevel {
    /// Those of a level of `shape`.
    pub fn of(shape: LevelShape) -> Self {
        Self { rows: shape.rows, cols: shape.cols, units: shape.rank.div_ceil(16) }
    }

    /// Groups of 64 rows and of 64 columns.
    fn groups(self) -> [usize; 2] {
        [self.rows.div_ceil(64), self.cols.div_ceil(64)]
    }

    /// Units of the signs, of `A` and of `B`.
    fn lens(self) -> [usize; 3] {
        let [groups, columns] = self.groups();
        [groups * columns, groups * 4 * self.units, columns * 4 * self.units]
    }

    /// Bytes of device memory.
    pub fn bytes(self) -> usize {
        UNIT * self.lens().iter().sum::<usize>()
    }

    /// Lays out a level of `shape` whose row `i` is row `order[i]` of `parts`; in `units` sixteens of its rank or more.
    ///
    /// # Errors
    /// [`ZooError::Unsupported`] when the sizes are not served, do not agree or `order` leads outside the rows.
    pub fn pack(self, shape: LevelShape, parts: &LevelParts<'_>, order: &[usize]) -> Result<Vec<u8>> {
        shape.check()?;
        let LevelShape { rows, cols, rank } = shape;
        let lens = [parts.signs.len(), parts.left.len(), parts.right.len()];
        let agree = lens == [rows * cols / 8, rows * rank, rank * cols]
            && (self.rows, self.cols) == (order.len(), cols)
            && self.units <= 2
            && rank <= 16 * self.units;
        if !agree || order.iter().any(|&row| row >= rows) {
            return Err(ZooError::Unsupported(format!(
                "a level of shape [{rows}, {cols}] and rank {rank} with {lens:?} signs and factors as {self:?}"
            )));
        }
        let mut words = vec![0u32; self.bytes() / 4];
        let [signs, left, _] = self.lens().map(|units| units * UNIT / 4);
        let (sign_words, rest) = words.split_at_mut(signs);
        let (left_words, right_words) = rest.split_at_mut(left);
        self.pack_signs(parts.signs, order, sign_words);
        self.pack_left((parts.left, rank), order, left_words);
        self.pack_right((parts.right, rank), right_words);
        Ok(bytemuck::cast_slice(&words).to_vec())
    }

    fn pack_signs(self, signs: &[u8], order: &[usize], words: &mut [u32]) {
        let [_, columns] = self.groups();
        let row_bytes = self.cols / 8;
        // The sixteen columns from `16 · run` on, the first in the highest bit; set where negative.
        let minus = |row: usize, run: usize| -> u32 {
            let Some(&row) = order.get(row).filter(|_| 16 * run < self.cols) else { return 0 };
            let at = row * row_bytes + 2 * run;
            u32::from(!u16::from_be_bytes([signs[at], signs[at + 1]]))
        };
        for (unit, words) in words.chunks_exact_mut(UNIT / 4).enumerate() {
            let (group, column) = (unit / columns, unit % columns);
            for (i, word) in words.iter_mut().enumerate() {
                let (lane, tile) = (i / 4, i % 4);
                let (row, run) = (64 * group + 16 * tile + lane / 4, 4 * column + lane % 4);
                let (upper, lower) = (minus(row, run), minus(row + 8, run));
                let even = (upper & 0xAAAA) | (lower & 0xAAAA) >> 1;
                let odd = (upper & 0x5555) << 1 | (lower & 0x5555);
                *word = even | odd << 16;
            }
        }
    }

    fn pack_left(self, (left, rank): (&[u16], usize), order: &[usize], words: &mut [u32]) {
        let value = |row: usize, c: usize| match order.get(row) {
            Some(&row) if c < rank => u32::from(left[row * rank + c]),
            _ => 0,
        };
        for (unit, words) in words.chunks_exact_mut(UNIT / 4).enumerate() {
            let (tile, unit) = (unit / self.units, unit % self.units);
            for (i, word) in words.iter_mut().enumerate() {
                let (lane, operand) = (i / 4, i % 4);
                let row = 16 * tile + lane / 4 + 8 * (operand % 2);
                let c = 16 * unit + 2 * (lane % 4) + 8 * (operand / 2);
                *word = value(row, c) | value(row, c + 1) << 16;
            }
        }
    }

    fn pack_right(self, (right, rank): (&[u16], usize), words: &mut [u32]) {
        let value = |c: usize, column: usize| {
            if c < rank && column < self.cols { u32::from(right[c * self.cols + column]) } else { 0 }
        };
        for (unit, words) in words.chunks_exact_mut(UNIT / 4).enumerate() {
            let (step, unit) = (unit / self.units, unit % self.units);
            let (column, k) = (64 * (step / 4), step % 4);
            for (i, word) in words.iter_mut().enumerate() {
                let (g, t, tile, operand) = (i / 16, i / 4 % 4, i % 4 / 2, i % 2);
                let column = column + 16 * (g / 2) + 4 * k + 2 * tile + g % 2;
                let c = 16 * unit + 2 * t + 8 * operand;
                *word = value(c, column) | value(c + 1, column) << 16;
            }
        }
    }
}

/// One matrix of a joint one.
#[derive(Debug, Clone, Copy)]
pub struct StackPart {
    /// `[levels]`, as [`Entry::bytes`], `from` rising from 0.
    pub entries: Part,
    /// All levels that it may ever have.
    pub levels: usize,
    /// Outputs.
    pub rows: usize,
}

/// A joint matrix in levels, `[rows, cols]`: up to three matrices of the same inputs.
#[derive(Debug, Clone, Copy)]
pub struct Stack<'a> {
    /// The matrices.
    pub parts: &'a [StackPart],
    /// Rows of the first and of the second part alternate in eights, as gates and values do; else one part follows the
    /// other.
    pub eights: bool,
    /// `[rows]` f32 in joint order, or [`Part::NONE`].
    pub bias: Part,
    /// Inputs, a multiple of 32.
    pub cols: usize,
    /// Sixteens of the rank of every level.
    pub units: usize,
}

/// What a product is of.
#[derive(Debug, Clone, Copy)]
pub struct Input {
    /// `[tokens, cols]` bf16.
    pub x: Part,
    /// Which tokens of the step they are.
    pub tokens: Tokens,
    /// Blocks of the model's stack that each token of the step uses, `[step tokens]` u32.
    pub blocks: Part,
}

impl Stack<'_> {
    /// Outputs of all parts.
    pub fn rows(&self) -> usize {
        self.parts.iter().map(|part| part.rows).sum()
    }

    /// Sums of a token: the rows of every part, padded.
    fn width(&self) -> usize {
        self.parts.iter().map(|part| part.rows.next_multiple_of(64)).sum()
    }

    /// Blocks of `rows` rows.
    fn blocks(&self, rows: usize) -> usize {
        self.parts.iter().map(|part| part.rows.div_ceil(rows)).sum()
    }

    /// Blocks that share the columns of a matrix: as many as fill the device best. Not a matter of the tokens, whose
    /// sums they order.
    fn splits(&self, device: &dyn Device) -> usize {
        let blocks = self.blocks(64 * WARPS);
        let chunks = self.cols.div_ceil(64 * CHUNK);
        let slots = 2 * device.multiprocessors() as usize;
        let time = |splits: &usize| (blocks * splits).div_ceil(slots) * chunks.div_ceil(*splits);
        (1..=chunks).min_by_key(time).unwrap_or(1)
    }

    /// Bytes of scratch memory that [`few`] takes for `tokens` tokens.
    pub fn sums_bytes(&self, device: &dyn Device, tokens: usize) -> usize {
        4 * self.splits(device) * tokens * self.width()
    }

    /// Refuses what the kernels are not made for.
    fn check(&self) -> Result<()> {
        let halves = |parts: &[StackPart]| parts[0].rows == parts[1].rows && parts[0].rows.is_multiple_of(8);
        let ok = (1..=PARTS).contains(&self.parts.len())
            && (!self.eights || self.parts.len() == 2 && halves(self.parts))
            && self.cols.is_multiple_of(32)
            && self.cols > 0
            && (1..=2).contains(&self.units);
        if !ok {
            return Err(ZooError::Device(format!("no kernel for the levels of {self:?}")));
        }
        self.parts.iter().try_for_each(|part| need("levels", part.entries, ENTRY_BYTES * part.levels))
    }

    /// The parts, whose blocks have `rows` rows, and whose first outputs are by `first`.
    fn parts(&self, rows: usize, first: impl Fn(usize) -> usize) -> [StackPartParams; PARTS] {
        let mut params = [bytemuck::Zeroable::zeroed(); PARTS];
        let mut block = 0;
        for (index, (part, params)) in self.parts.iter().zip(&mut params).enumerate() {
            *params = StackPartParams {
                entries: part.entries.pointer(),
                levels: part.levels as u32,
                rows: part.rows as u32,
                first_block: block as u32,
                first_sum: first(index) as u32,
            };
            block += part.rows.div_ceil(rows);
        }
        params
    }

    /// Where the padded sums of a part begin among a token's.
    fn first_sum(&self, index: usize) -> usize {
        self.parts.iter().take(index).map(|part| part.rows.next_multiple_of(64)).sum()
    }
}

/// The product of `stack` with up to [`STACK_TOKENS`] tokens, each with its own levels; then `after`. `sums` is scratch
/// memory (see [`Stack::sums_bytes`]). Among two tokens or more a result does not depend on which they are and how many;
/// of one alone it is rounded elsewhere.
///
/// # Errors
/// [`ZooError::Device`].
pub fn few(device: &dyn Device, stack: &Stack<'_>, input: Input, (sums, after): (Part, After)) -> Result<()> {
    let Input { x, tokens, blocks } = input;
    let Tokens { count, index, skips } = tokens;
    stack.check()?;
    if count > STACK_TOKENS {
        return Err(ZooError::Device(format!("{count} tokens for a kernel of {STACK_TOKENS}")));
    }
    need("x", x, 2 * count * stack.cols)?;
    need("sums", sums, stack.sums_bytes(device, count))?;
    need("blocks", blocks, if index.is_empty() { 4 * count } else { 4 })?;
    need("index", index, if index.is_empty() { 0 } else { 4 * count })?;
    if count == 0 {
        return Ok(());
    }
    let splits = stack.splits(device) as u32;
    let params = StackParams {
        x: x.pointer(),
        sums: sums.pointer(),
        blocks: blocks.pointer(),
        index: index.pointer(),
        cols: stack.cols as u32,
        tokens: count as u32,
        width: stack.width() as u32,
        count: stack.parts.len() as u32,
        skips: Skips::params(skips.as_ref()),
        parts: stack.parts(64 * WARPS, |index| stack.first_sum(index)),
    };
    // One token alone takes a way of its own, which keeps rows of B like those of eight tokens or sixteen.
    let (kernels, tiles, extra) = match count {
        1 => (["stack_1", "stack_1_deep"], 1, 2 * stack.units),
        2..=8 => (["stack_8", "stack_8_deep"], 1, 0),
        _ => (["stack_32", "stack_32_deep"], 4, 0),
    };
    let (kernel, shared) = (kernels[stack.units - 1], memory(tiles, stack.units) + extra * 8 * ROW);
    run(device, (kernel, THREADS, shared), [stack.blocks(64 * WARPS) as u32, splits, 1], &params)?;
    join(device, stack, (&params, splits), (tokens, after))
}

/// Adds up what the blocks of [`few`] have summed, and does what comes after.
fn join(
    device: &dyn Device,
    stack: &Stack<'_>,
    (few, splits): (&StackParams, u32),
    (tokens, after): (Tokens, After),
) -> Result<()> {
    let params = StackJoinParams {
        sums: few.sums,
        splits,
        tokens: few.tokens,
        width: few.width,
        eights: u32::from(stack.eights),
        rows: [few.parts[0].rows, few.parts[1].rows],
        first: few.parts.map(|part| part.first_sum),
        pad: 0,
        skinny: after_params((stack.rows(), stack.bias), tokens, after)?,
    };
    let kernel = match after {
        After::Place(_) => "stack_join_place",
        After::Half(_) => "stack_join_half",
        After::Float(_) => "stack_join_float",
        After::Gate(..) => "stack_join_gate",
        After::Add(_) => "stack_join_add",
    };
    let pairs = stack.rows().div_ceil(16) * 8;
    run(device, (kernel, THREADS, 0), [pairs.div_ceil(32 * WARPS) as u32, few.tokens, 1], &params)
}

/// Bytes of a block's memory for so many tiles of eight tokens and sixteens of the rank.
fn memory(tiles: usize, units: usize) -> usize {
    let (left, signs) = (WARPS * 4 * units * 32, WARPS * CHUNK * 32);
    2 * (16 * (left + signs + CHUNK * 4 * units * 32) + tiles * 8 * ROW)
}

/// The levels that `blocks` blocks of the model's stack have of `stack`, added up, `[rows, cols]` bf16, to `out`.
///
/// # Errors
/// [`ZooError::Device`].
pub fn whole(device: &dyn Device, stack: &Stack<'_>, blocks: u32, out: Part) -> Result<()> {
    stack.check()?;
    need("matrix", out, 2 * stack.rows() * stack.cols)?;
    let rows = |parts: &[StackPart]| parts.iter().map(|part| part.rows).sum();
    let first = |index: usize| if stack.eights { 8 * index } else { rows(&stack.parts[..index]) };
    let params = StackWholeParams {
        out: out.pointer(),
        blocks,
        cols: stack.cols as u32,
        eights: u32::from(stack.eights),
        count: stack.parts.len() as u32,
        parts: stack.parts(16 * WARPS, first),
    };
    let kernel = if stack.units == 1 { "stack_whole" } else { "stack_whole_deep" };
    let grid = [stack.blocks(16 * WARPS) as u32, stack.cols.div_ceil(64) as u32, 1];
    run(device, (kernel, THREADS, 0), grid, &params)
}
