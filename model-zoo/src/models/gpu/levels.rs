//! Weights in levels on a device: what is held of them, and which of it each token uses.
//!
//! Levels lie in one range of addresses, the base first and then the stack in its order: the next block comes at the end
//! of what is held and goes from there. So a level's address never changes, and what kernels look up is made once: for
//! each matrix its levels, with the blocks that a token has which uses them. A token's count is in the tables of its
//! step and never above what is held, so that growing and shrinking leave captured steps right.
//!
//! Held are whole levels; the device's memory comes and goes in chunks of its own, so that it may hold up to one more.

use std::collections::HashMap;
use std::sync::Arc;

use super::GpuDecoder;
use crate::compression::route::Route;
use crate::kernels::cpu::bitstack::LevelShape;
use crate::kernels::cuda::device::{Buffer, Device, Growable, Part};
use crate::kernels::cuda::stack::{
    DeviceLevel, ENTRY_BYTES, Entry, STACK_TOKENS, Stack as Product, StackPart,
};
use crate::models::elastic::ElasticWeights;
use crate::models::levels::{Stack, matrices};
use crate::step::StepRow;
use crate::weights::levels::{LevelEntry, LevelSource, StoredLevel};
use crate::{Result, ZooError};

/// See the module.
#[derive(Debug)]
pub(super) struct Levels {
    stack: Stack,
    device: Arc<dyn Device>,
    memory: Box<dyn Growable>,
    /// [`Entry`] of every level of every matrix, a matrix's together.
    entries: Buffer,
    matrices: HashMap<String, Placed>,
    /// Sixteens of the largest rank.
    units: usize,
    /// Blocks that each token of the step uses, with padding.
    services: Vec<u32>,
    blocks: Buffer,
    pub(super) scratch: LevelScratch,
}

/// Memory of products with levels.
#[derive(Debug)]
pub(super) struct LevelScratch {
    /// Sums of few tokens.
    pub(super) sums: Buffer,
    /// A matrix made whole, bf16.
    pub(super) whole: Buffer,
}

/// A matrix of the checkpoint.
#[derive(Debug)]
struct Placed {
    shape: LevelShape,
    layout: DeviceLevel,
    /// Which of its rows comes where, once its joint matrix is known.
    order: Vec<usize>,
    first_entry: usize,
    /// By level: the blocks that a token has which uses it.
    from: Vec<u32>,
}

/// A joint matrix in levels.
#[derive(Debug)]
pub(super) struct Joint {
    parts: Vec<StackPart>,
    eights: bool,
    cols: usize,
    units: usize,
    /// Counts of blocks from which on a part has one more level, rising from 0.
    from: Vec<u32>,
}

impl Joint {
    /// As its kernels take it.
    pub(super) fn product(&self, bias: Part) -> Product<'_> {
        Product { parts: &self.parts, eights: self.eights, bias, cols: self.cols, units: self.units }
    }

    /// The least count of blocks that has of this matrix what `blocks` has.
    pub(super) fn effective(&self, blocks: u32) -> u32 {
        let more = self.from.partition_point(|&from| from <= blocks);
        self.from[more.max(1) - 1]
    }
}

/// Where the matrices of `source` have their entries, and the sixteens of the largest rank.
fn place(source: &dyn LevelSource) -> Result<(HashMap<String, Placed>, usize)> {
    let found = matrices(source)?;
    found.values().try_for_each(|(shape, _)| shape.check())?;
    let units = found.values().map(|(shape, _)| shape.rank.div_ceil(16)).max().unwrap_or(1);
    let mut placed = HashMap::new();
    let mut first_entry = 0;
    for (name, (shape, places)) in found {
        let from = std::iter::once(0).chain(places.iter().map(|&place| place as u32 + 1)).collect();
        let layout = DeviceLevel { units, ..DeviceLevel::of(shape) };
        placed.insert(name, Placed { shape, layout, order: Vec::new(), first_entry, from });
        first_entry += 1 + places.len();
    }
    Ok((placed, units))
}

impl Levels {
    /// The levels of `source`, of which nothing is held yet. Blocks are those of its stack.
    ///
    /// # Errors
    /// [`ZooError::Unsupported`] for sizes that the kernels are not made for; [`ZooError::Device`].
    pub(super) fn new(source: Box<dyn LevelSource>, device: &Arc<dyn Device>) -> Result<Self> {
        if device.shard().size > 1 {
            return Err(ZooError::Unsupported("BitStack weights on more than one GPU".into()));
        }
        let (matrices, units) = place(&*source)?;
        let bytes_of = |entry: &LevelEntry| matrices[&entry.matrix].layout.bytes();
        let all = source.base().iter().chain(source.stack());
        let memory = device.reserve(all.clone().map(bytes_of).sum())?;
        let num_entries = matrices.values().map(|matrix| matrix.from.len()).sum::<usize>();
        let mut entries = vec![0u8; ENTRY_BYTES * num_entries];
        let mut level = memory.address();
        for entry in all {
            let Placed { first_entry, from, .. } = &matrices[&entry.matrix];
            let own = Entry { level, from: from[entry.level], pad: 0 }.bytes();
            entries[ENTRY_BYTES * (first_entry + entry.level)..][..ENTRY_BYTES].copy_from_slice(&own);
            level += bytes_of(entry) as u64;
        }
        let buffer = device.alloc(entries.len())?;
        device.upload(Part::all(&buffer), &entries)?;
        let stack = Stack::new(source, 0, |entry| matrices[&entry.matrix].layout.bytes() as u64);
        let scratch = LevelScratch { sums: device.alloc(0)?, whole: device.alloc(0)? };
        Ok(Self {
            stack,
            device: Arc::clone(device),
            memory,
            entries: buffer,
            matrices,
            units,
            services: Vec::new(),
            blocks: device.alloc(0)?,
            scratch,
        })
    }

    /// The joint matrix whose rows are `rows` of `tensors` (names and shapes), where these come in levels; of two in
    /// alternating `eights`, or of one after the other.
    ///
    /// # Errors
    /// [`ZooError::Unsupported`] where only some of them do, or one has another shape.
    pub(super) fn joint(
        &mut self,
        tensors: &[(String, [usize; 2])],
        rows: &[(usize, usize)],
        eights: bool,
    ) -> Result<Option<Joint>> {
        let known = tensors.iter().filter(|(name, _)| self.matrices.contains_key(name)).count();
        if known == 0 {
            return Ok(None);
        }
        let mut joint =
            Joint { parts: Vec::new(), eights, cols: tensors[0].1[1], units: self.units, from: Vec::new() };
        for (tensor, (name, shape)) in tensors.iter().enumerate() {
            let matrix = self.matrices.get_mut(name);
            let matrix = matrix.ok_or_else(|| ZooError::Unsupported(format!("{name} without levels")))?;
            let found = [matrix.shape.rows, matrix.shape.cols];
            if found != *shape {
                return Err(ZooError::Unsupported(format!(
                    "the levels of {name} have shape {found:?}, the config says {shape:?}"
                )));
            }
            matrix.order = rows.iter().filter(|(of, _)| *of == tensor).map(|&(_, row)| row).collect();
            let (at, levels) = (ENTRY_BYTES * matrix.first_entry, matrix.from.len());
            let entries = Part::of(&self.entries, at, ENTRY_BYTES * levels)?;
            joint.parts.push(StackPart { entries, levels, rows: matrix.order.len() });
            joint.from.extend(&matrix.from);
        }
        joint.from.sort_unstable();
        joint.from.dedup();
        Ok(Some(joint))
    }

    /// Makes room for products with `joints`, and holds the base and as much of the stack as `budget` bytes of weights
    /// do beside `other_bytes`: all of it without one.
    ///
    /// # Errors
    /// [`ZooError::WeightBudget`] when not even the base fits; [`ZooError::Device`]; as [`LevelSource::read`].
    pub(super) fn fill<'a>(
        &mut self,
        joints: impl Iterator<Item = &'a Joint> + Clone,
        (other_bytes, budget): (usize, Option<u64>),
    ) -> Result<()> {
        self.stack.add_bytes(other_bytes as u64);
        let products = || joints.clone().map(|joint| joint.product(Part::NONE));
        let sums = products().map(|product| product.sums_bytes(&*self.device, STACK_TOKENS)).max();
        let whole = products().map(|product| 2 * product.rows() * product.cols).max();
        self.scratch.sums = self.device.alloc(sums.unwrap_or(0))?;
        self.scratch.whole = self.device.alloc(whole.unwrap_or(0))?;
        let budget = budget.unwrap_or(u64::MAX);
        let least = self.stack.bytes_of(0);
        if budget < least {
            return Err(ZooError::WeightBudget { budget, least });
        }
        for index in 0..self.stack.source.base().len() {
            let level = self.stack.source.read_base(index)?;
            let name = self.stack.source.base()[index].matrix.clone();
            self.hold(&level, &name)?;
        }
        while self.stack.held < self.stack.num_blocks() && self.stack.bytes_of(self.stack.held + 1) <= budget
        {
            self.grow()?;
        }
        Ok(())
    }

    /// Brings the next level to the end of what is held. What was held is held still when that fails.
    fn hold(&mut self, level: &StoredLevel, name: &str) -> Result<()> {
        let Placed { shape, layout, order, .. } = &self.matrices[name];
        if level.shape() != *shape {
            let found = level.shape();
            return Err(ZooError::Unsupported(format!(
                "a level of sizes {found:?} of a matrix of {shape:?}"
            )));
        }
        let packed = level.read(|parts| layout.pack(*shape, parts, order))?;
        let end = self.memory.len();
        self.memory.resize(end + packed.len())?;
        let part = Part::of_growable(&*self.memory).slice(end, packed.len());
        let brought = part.and_then(|part| self.device.upload(part, &packed));
        if brought.is_err() {
            self.memory.resize(end)?;
        }
        brought
    }

    fn grow(&mut self) -> Result<()> {
        let held = self.stack.held;
        let Some(entry) = self.stack.source.stack().get(held) else { return Ok(()) };
        let name = entry.matrix.clone();
        let level = self.stack.source.read(held)?;
        self.hold(&level, &name)?;
        self.stack.held = held + 1;
        Ok(())
    }

    fn shrink(&mut self) {
        let Some(last) = self.stack.held.checked_sub(1) else { return };
        let entry = &self.stack.source.stack()[last];
        let len = self.memory.len() - self.matrices[&entry.matrix].layout.bytes();
        match self.memory.resize(len) {
            Ok(()) => self.stack.held = last,
            Err(error) => tracing::warn!(%error, "a level stays on the GPU"),
        }
    }

    /// Bytes of all weights that are held.
    pub(super) fn bytes(&self) -> u64 {
        self.stack.bytes_of(self.stack.held)
    }

    /// Refuses a row that is to be served with more than is held.
    ///
    /// # Errors
    /// [`ZooError::Step`].
    pub(super) fn check(&self, rows: &[StepRow<'_>]) -> Result<()> {
        let wanted = |row: &StepRow<'_>| row.state.blocks.filter(|&blocks| blocks > self.stack.held);
        match rows.iter().enumerate().find_map(|(index, row)| Some((index, wanted(row)?))) {
            Some((index, blocks)) => Err(ZooError::Step(format!(
                "row {index}: is served with {blocks} blocks, of which not all are held"
            ))),
            None => Ok(()),
        }
    }

    /// Lays out and uploads the blocks that each token of a step uses, `tokens` with padding. Says whether their memory
    /// moved.
    ///
    /// # Errors
    /// [`ZooError::Device`].
    pub(super) fn serve(&mut self, (rows, route): (&[StepRow<'_>], &Route), tokens: usize) -> Result<bool> {
        self.services.clear();
        for row in route.order().iter().map(|&row| &rows[row]) {
            let blocks = row.state.blocks.unwrap_or(self.stack.held) as u32;
            self.services.extend(std::iter::repeat_n(blocks, row.tokens.len()));
        }
        // Padding is served as the last token, that it makes no run of its own.
        let last = self.services.last().copied().unwrap_or(0);
        self.services.resize(tokens.max(self.services.len()), last);
        let bytes: &[u8] = bytemuck::cast_slice(&self.services);
        let moved = self.blocks.len() < bytes.len();
        if moved {
            self.device.synchronize()?;
            self.blocks = self.device.alloc(bytes.len().next_power_of_two().max(1 << 10))?;
        }
        self.device.upload(Part::all(&self.blocks), bytes)?;
        Ok(moved)
    }

    /// Blocks of the step's tokens, as [`Levels::serve`] laid them out.
    pub(super) fn services(&self) -> &[u32] {
        &self.services
    }

    /// The same on the device.
    pub(super) fn blocks(&self) -> Result<Part> {
        Part::of(&self.blocks, 0, 4 * self.services.len())
    }
}

/// K and V of every token may be shared, sampled or not: which way a product is made follows from the step and not from
/// whose its tokens are, and each way rounds a weight, or what it is multiplied by, once to bf16. Tokens that are computed
/// again in other company get other last bits, as they do from dense weights, and nothing more.
impl ElasticWeights for GpuDecoder {
    fn num_blocks(&self) -> usize {
        self.levels.as_ref().map_or(0, |levels| levels.stack.num_blocks())
    }

    fn held(&self) -> usize {
        self.levels.as_ref().map_or(0, |levels| levels.stack.held)
    }

    fn bytes_of(&self, blocks: usize) -> u64 {
        self.levels.as_ref().map_or(self.dims.weight_bytes as u64, |levels| levels.stack.bytes_of(blocks))
    }

    fn num_levels(&self) -> usize {
        self.levels.as_ref().map_or(1, |levels| levels.stack.num_levels())
    }

    fn blocks_of_levels(&self, levels: usize) -> usize {
        self.levels.as_ref().map_or(0, |own| own.stack.blocks_of_levels(levels))
    }

    fn mean_levels(&self, blocks: usize) -> f64 {
        self.levels.as_ref().map_or(1.0, |levels| levels.stack.mean_levels(blocks))
    }

    fn grow(&mut self) -> Result<()> {
        self.levels.as_mut().map_or(Ok(()), Levels::grow)
    }

    fn shrink(&mut self) {
        if let Some(levels) = &mut self.levels {
            levels.shrink();
        }
    }
}
