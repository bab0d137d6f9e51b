//! Weights in levels: what is held of them, and how it grows and shrinks between steps.

use std::collections::HashMap;

use super::{CpuDecoder, Layer, Weights};
use crate::compression::route::Span;
use crate::kernels::cpu::bitstack::LevelShape;
use crate::layers::linear::Linear;
use crate::layers::stack::{Service, StackMatrix};
use crate::models::elastic::ElasticWeights;
use crate::step::StepRow;
use crate::weights::levels::{LevelEntry, LevelSource};
use crate::{Result, ZooError};

/// The matrices of a layer that may come in levels, by their names below `model.layers.N`.
const MODULES: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// Where levels come from, and how many of them are held.
#[derive(Debug)]
pub(super) struct Stack {
    source: Box<dyn LevelSource>,
    held: usize,
    /// Bytes of all weights with the base alone.
    base_bytes: u64,
    /// `[blocks]`: bytes of the first so many blocks of the stack, from 0 on.
    bytes: Vec<u64>,
    /// `[blocks]`: levels of a matrix on average.
    levels: Vec<f64>,
}

/// A matrix of the checkpoint: its sizes, and where its levels after the first lie in the stack.
pub(super) type Matrices = HashMap<String, (LevelShape, Vec<usize>)>;

/// The matrices that `source` has in levels.
///
/// # Errors
/// [`ZooError::Unsupported`] when the levels of one do not come in order or differ in their sizes.
pub(super) fn matrices(source: &dyn LevelSource) -> Result<Matrices> {
    let mut matrices = Matrices::new();
    let out_of_order =
        |entry: &LevelEntry| ZooError::Unsupported(format!("level {} of {}", entry.level, entry.matrix));
    for entry in source.base() {
        let before = matrices.insert(entry.matrix.clone(), (entry.shape, Vec::new()));
        if before.is_some() || entry.level != 0 {
            return Err(out_of_order(entry));
        }
    }
    for (place, entry) in source.stack().iter().enumerate() {
        match matrices.get_mut(&entry.matrix) {
            Some((shape, places)) if *shape == entry.shape && places.len() + 1 == entry.level => {
                places.push(place);
            }
            _ => return Err(out_of_order(entry)),
        }
    }
    Ok(matrices)
}

impl Stack {
    /// A stack of which nothing is held yet, beside `other_bytes` of weights that do not come in levels.
    pub(super) fn new(source: Box<dyn LevelSource>, other_bytes: u64) -> Self {
        let bytes_of = |entry: &LevelEntry| entry.shape.held_bytes() as u64;
        let base: u64 = source.base().iter().map(bytes_of).sum();
        let (mut bytes, mut levels) = (vec![0], vec![1.0]);
        let (mut byte, mut level) = (0, 1.0);
        for entry in source.stack() {
            byte += bytes_of(entry);
            level += bytes_of(entry) as f64 / base as f64;
            bytes.push(byte);
            levels.push(level);
        }
        Self { source, held: 0, base_bytes: other_bytes + base, bytes, levels }
    }
}

impl Layer {
    /// The matrix of this name below the layer's.
    fn matrix_mut(&mut self, module: &str) -> Option<&mut StackMatrix> {
        let index = MODULES.iter().position(|name| *name == module)?;
        let linears: [&mut Linear; 7] = [
            &mut self.q,
            &mut self.k,
            &mut self.v,
            &mut self.o,
            &mut self.gate,
            &mut self.up,
            &mut self.down,
        ];
        linears.into_iter().nth(index)?.stack_mut()
    }
}

impl Weights {
    /// The matrix `name`, where it comes in levels.
    fn matrix_mut(&mut self, name: &str) -> Result<&mut StackMatrix> {
        let (layer, module) = name
            .strip_prefix("model.layers.")
            .and_then(|rest| rest.split_once('.'))
            .and_then(|(layer, module)| Some((layer.parse::<usize>().ok()?, module)))
            .unwrap_or((usize::MAX, name));
        let matrix = self.layers.get_mut(layer).and_then(|layer| layer.matrix_mut(module));
        matrix.ok_or_else(|| ZooError::Unsupported(format!("{name} in levels")))
    }
}

impl CpuDecoder {
    /// Reads the base, then as much of the stack as `budget` bytes of weights hold: all of it without one.
    ///
    /// # Errors
    /// [`ZooError::WeightBudget`] before anything is read when not even the base fits; else as
    /// [`LevelSource::read`].
    pub(super) fn fill_stack(&mut self, budget: Option<u64>) -> Result<()> {
        let Some(stack) = &self.stack else { return Ok(()) };
        let budget = budget.unwrap_or(u64::MAX);
        let least = stack.base_bytes;
        let Some(blocks) = self.blocks_within(budget) else {
            return Err(ZooError::WeightBudget { budget, least });
        };
        for (index, entry) in stack.source.base().iter().enumerate() {
            let level = stack.source.read_base(index)?;
            self.weights.matrix_mut(&entry.matrix)?.grow(level)?;
        }
        (0..blocks).try_for_each(|_| self.grow())
    }

    /// How each token of `spans` is served; nothing where all weights are whole.
    pub(super) fn serve(&mut self, rows: &[StepRow<'_>], spans: &[Span]) {
        let Some(stack) = &self.stack else { return };
        let services = &mut self.scratch.services;
        services.clear();
        for span in spans {
            let row = &rows[span.row];
            let state = (row.state.blocks.unwrap_or(stack.held), row.state.decode_from);
            let first = row.first_pos + span.first;
            services.extend((first..first + span.len).map(|position| Service::of(position, state)));
        }
    }

    /// The most blocks that a row may be served with.
    pub(super) fn held_blocks(&self) -> usize {
        self.stack.as_ref().map_or(usize::MAX, |stack| stack.held)
    }
}

impl ElasticWeights for CpuDecoder {
    fn num_blocks(&self) -> usize {
        self.stack.as_ref().map_or(0, |stack| stack.source.stack().len())
    }

    fn held(&self) -> usize {
        self.stack.as_ref().map_or(0, |stack| stack.held)
    }

    fn bytes_of(&self, blocks: usize) -> u64 {
        let whole = self.dims.weight_bytes as u64;
        self.stack.as_ref().map_or(whole, |stack| stack.base_bytes + stack.bytes[blocks])
    }

    fn num_levels(&self) -> usize {
        let stack = self.stack.iter().flat_map(|stack| stack.source.stack());
        1 + stack.map(|entry| entry.level).max().unwrap_or(0)
    }

    fn blocks_of_levels(&self, levels: usize) -> usize {
        let stack = self.stack.as_ref().map_or(&[][..], |stack| stack.source.stack());
        stack.iter().position(|entry| entry.level >= levels).unwrap_or(stack.len())
    }

    fn mean_levels(&self, blocks: usize) -> f64 {
        self.stack.as_ref().map_or(1.0, |stack| stack.levels[blocks])
    }

    fn grow(&mut self) -> Result<()> {
        let Some(stack) = &mut self.stack else { return Ok(()) };
        let Some(entry) = stack.source.stack().get(stack.held) else { return Ok(()) };
        let level = stack.source.read(stack.held)?;
        self.weights.matrix_mut(&entry.matrix)?.grow(level)?;
        stack.held += 1;
        Ok(())
    }

    fn shrink(&mut self) {
        let Some(stack) = &mut self.stack else { return };
        let Some(last) = stack.held.checked_sub(1) else { return };
        // The matrix is there: it took this block when it was read.
        if let Ok(matrix) = self.weights.matrix_mut(&stack.source.stack()[last].matrix) {
            matrix.shrink();
            stack.held = last;
        }
    }

    fn shareable_len(&self, prompt_len: usize) -> usize {
        Service::shareable_len(prompt_len)
    }
}
