//! Steps of few tokens as one launch.

use super::{GpuDecoder, Step};
use crate::Result;
use crate::compression::Sublayer;
use crate::kernels::cuda::device::{Graph, Part};
use crate::kernels::cuda::fused::{Program, fuses};
use crate::kernels::cuda::ops::After;

impl GpuDecoder {
    /// Whether the step that lies in the tables can be one launch: few tokens of a plain Llama in bf16, all of whose sublayers are
    /// known to run or not.
    pub(super) fn fuses(&self, step: &Step) -> bool {
        let plain = |layer: &super::Layer| layer.qk_norm.is_none() && layer.post_norms.is_none();
        let widths = [self.config.hidden_size, self.weights.ffn];
        self.tables.most_watched() == 0
            && fuses(&*self.device, self.tables.num_tokens(), step.heads, widths)
            && self.weights.layers.iter().all(plain)
            && self.weights.rotary[1].is_none()
            && self.device.shard().size == 1
            && self.levels.is_none()
    }

    /// The step as one launch. What it does is what [`GpuDecoder::launch`] does.
    pub(super) fn fuse(&self, step: &Step) -> Result<Box<dyn Graph>> {
        let mut program = Program::new(&self.device, (step.heads.dim, self.tables.is_packed()))?;
        let (tables, scratch, count) = (&self.tables, &self.scratch, self.tables.num_tokens());
        let x = Part::all(&scratch.x);
        let embedding = self.weights.embedding.operand()?;
        let [rotary, _] = &self.weights.rotary;
        let (frequencies, magnitude) = rotary.as_ref().map_or((Part::NONE, 1.0), |(f, m)| (Part::all(f), *m));
        program.embed(
            ((&embedding, tables.token_ids()?), (x, self.config.hidden_size), self.config.embedding_scale),
            ((frequencies, magnitude), tables.positions()?, Part::all(&scratch.rotary[0])),
            count,
        )?;
        for layer in 0..self.weights.layers.len() {
            self.fuse_attention(&mut program, step, layer)?;
            self.fuse_ffn(&mut program, layer)?;
        }
        if step.whole {
            let head = self.weights.lm_head.as_ref().unwrap_or(&self.weights.embedding).operand()?;
            let norm = Some(self.norm(&self.weights.norm));
            let logits = After::Float(Part::all(&scratch.logits));
            program.product(&head, (x, tables.logits(0..count)?, norm), logits)?;
        }
        Ok(Box::new(program.finish(tables.counter()?, Part::all(&scratch.links))?))
    }

    fn fuse_attention(&self, program: &mut Program<'_>, step: &Step, layer: usize) -> Result<()> {
        let (scratch, weights) = (&self.scratch, &self.weights.layers[layer]);
        let tokens = self.tables.selected(layer, Sublayer::Attention)?;
        if tokens.count == 0 {
            return Ok(());
        }
        let (x, attention) = (Part::all(&scratch.x), self.attention_of(step, layer)?);
        let norm = Some(self.norm(&weights.attention_norm));
        program.product(&weights.qkv.operand()?, (x, tokens, norm), After::Place(attention.places))?;
        let [single, _] = self.tables.items(layer)?;
        program.attention(&attention, single)?;
        program.product(&weights.o.operand()?, (attention.out, tokens, None), After::Add(x))
    }

    fn fuse_ffn(&self, program: &mut Program<'_>, layer: usize) -> Result<()> {
        let (scratch, weights) = (&self.scratch, &self.weights.layers[layer]);
        let tokens = self.tables.selected(layer, Sublayer::Ffn)?;
        if tokens.count == 0 {
            return Ok(());
        }
        let (x, gated) = (Part::all(&scratch.x), Part::all(&scratch.gated));
        let norm = Some(self.norm(&weights.ffn_norm));
        let gate = After::Gate(gated, self.config.activation);
        program.product(&weights.gate_up.operand()?, (x, tokens, norm), gate)?;
        program.product(&weights.down.operand()?, (gated, tokens, None), After::Add(x))
    }
}
