//! Weights in levels: what is held of them, and how it grows and shrinks between steps.

use super::{CpuDecoder, Layer, Weights};
use crate::compression::route::Span;
use crate::layers::linear::Linear;
use crate::layers::stack::{Service, StackMatrix};
use crate::models::elastic::ElasticWeights;
use crate::models::levels::Stack;
use crate::step::StepRow;
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
    /// [`crate::weights::levels::LevelSource::read`].
    pub(super) fn fill_stack(&mut self, budget: Option<u64>) -> Result<()> {
        let Some(stack) = &self.stack else { return Ok(()) };
        let budget = budget.unwrap_or(u64::MAX);
        let least = stack.bytes_of(0);
        let Some(blocks) = self.blocks_within(budget) else {
            return Err(ZooError::WeightBudget { budget, least });
        };
        for (index, entry) in stack.source.base().iter().enumerate() {
            let level = stack.source.read_base(index)?.lay()?;
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
        self.stack.as_ref().map_or(0, Stack::num_blocks)
    }

    fn held(&self) -> usize {
        self.stack.as_ref().map_or(0, |stack| stack.held)
    }

    fn bytes_of(&self, blocks: usize) -> u64 {
        self.stack.as_ref().map_or(self.dims.weight_bytes as u64, |stack| stack.bytes_of(blocks))
    }

    fn num_levels(&self) -> usize {
        self.stack.as_ref().map_or(1, Stack::num_levels)
    }

    fn blocks_of_levels(&self, levels: usize) -> usize {
        self.stack.as_ref().map_or(0, |stack| stack.blocks_of_levels(levels))
    }

    fn mean_levels(&self, blocks: usize) -> f64 {
        self.stack.as_ref().map_or(1.0, |stack| stack.mean_levels(blocks))
    }

    fn grow(&mut self) -> Result<()> {
        let Some(stack) = &mut self.stack else { return Ok(()) };
        let Some(entry) = stack.source.stack().get(stack.held) else { return Ok(()) };
        let level = stack.source.read(stack.held)?.lay()?;
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
