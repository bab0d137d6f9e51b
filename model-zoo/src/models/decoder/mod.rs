//! The decoder of the Llama family and Gemma 3, on the CPU kernels.
//!
//! One step: embed → for each layer, attention then FFN on the rows that their plans send there → keep
//! the hidden states whose logits are wanted. `load` reads the weights, `sublayer` runs a layer's halves.

mod load;
mod sublayer;

use std::ops::Range;

use crate::compression::{self, Rows, Sublayer};
use crate::config::DecoderConfig;
use crate::kernels::cpu::attention::SLOTS;
use crate::kernels::cpu::packed::Write;
use crate::kernels::cpu::quantize::QuantizedRows;
use crate::kernels::cpu::vector::rms_norm;
use crate::kv_cache::KvCache;
use crate::layers::linear::{Activations, Cpu, Linear};
use crate::layers::rotary::{Rotary, RotaryTable};
use crate::models::{CausalLm, ModelDims};
use crate::step::{LogitRows, StepBatch};
use crate::{Result, ZooError};

/// A decoder with its weights, ready to run steps.
#[derive(Debug)]
pub struct CpuDecoder {
    config: DecoderConfig,
    dims: ModelDims,
    cpu: Cpu,
    weights: Weights,
    scratch: Scratch,
}

#[derive(Debug)]
struct Weights {
    embedding: Linear,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    /// `None` when tied to the embedding.
    lm_head: Option<Linear>,
    rotary: Rotary,
    /// RoPE of windowed layers, where it differs.
    local_rotary: Option<Rotary>,
}

#[derive(Debug)]
struct Layer {
    attention_norm: Vec<f32>,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    /// Per-head norms of queries and keys.
    qk_norm: Option<[Vec<f32>; 2]>,
    ffn_norm: Vec<f32>,
    gate: Linear,
    up: Linear,
    down: Linear,
    /// Norms after attention and after the FFN.
    post_norms: Option<[Vec<f32>; 2]>,
    window: Option<usize>,
}

/// Memory that is kept from step to step.
#[derive(Debug, Default)]
struct Scratch {
    quantized: QuantizedRows,
    tables: [RotaryTable; 2],
    x: Vec<f32>,
    compact: Vec<f32>,
    normed: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    mixed: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    /// Final hidden states whose logits are wanted, normed, `[num_logit_rows, hidden_size]`
    hidden: Vec<f32>,
    logits: Vec<f32>,
}

/// A row's tokens inside a (possibly gathered) block of the residual stream.
#[derive(Debug, Clone, Copy)]
struct Span {
    row: usize,
    /// First token in the block.
    start: usize,
    /// First token in the whole step.
    step_start: usize,
    len: usize,
}

impl CausalLm for CpuDecoder {
    fn dims(&self) -> &ModelDims {
        &self.dims
    }

    fn forward(&mut self, batch: &mut StepBatch<'_>, kv: &mut KvCache) -> Result<()> {
        self.check(batch, kv)?;
        let mut x = std::mem::take(&mut self.scratch.x);
        self.embed(batch, &mut x);
        let spans = spans(batch, 0..batch.rows.len());
        for layer in 0..self.config.num_layers {
            for sublayer in [Sublayer::Attention, Sublayer::Ffn] {
                let plans = batch.rows.iter().map(|row| row.plan);
                match compression::rows(layer, sublayer, plans) {
                    Rows::None => {}
                    Rows::All => self.run(batch, kv, Half { layer, sublayer, spans: &spans, x: &mut x }),
                    Rows::Some(active) => self.run_some(batch, kv, (layer, sublayer, &active), &mut x),
                }
            }
        }
        self.keep_hidden(batch, &x);
        self.scratch.x = x;
        Ok(())
    }

    fn logits(&mut self, rows: Range<usize>) -> Result<&[f32]> {
        let width = self.config.hidden_size;
        let kept = self.scratch.hidden.len() / width;
        if rows.start > rows.end || rows.end > kept {
            return Err(ZooError::Step(format!("logit rows {rows:?} of a step that kept {kept}")));
        }
        let Scratch { hidden, logits, quantized, .. } = &mut self.scratch;
        logits.resize(rows.len() * self.config.vocab_size, 0.0);
        let mut x = Activations::new(&hidden[rows.start * width..rows.end * width], width, quantized);
        let head = self.weights.lm_head.as_ref().unwrap_or(&self.weights.embedding);
        head.forward(&self.cpu, &mut x, (Write::Store, logits));
        Ok(logits)
    }
}

/// A sublayer to run on a block of the residual stream.
struct Half<'a> {
    layer: usize,
    sublayer: Sublayer,
    spans: &'a [Span],
    /// `[tokens of the spans, hidden_size]`
    x: &'a mut [f32],
}

impl CpuDecoder {
    /// Refuses what would read or write outside the step's own pages. Nothing was written when it fails.
    fn check(&self, batch: &StepBatch<'_>, kv: &KvCache) -> Result<()> {
        let layout = kv.layout();
        if layout != self.dims.kv_layout(layout.block_size) || !layout.block_size.is_multiple_of(SLOTS) {
            return Err(ZooError::Step(format!("pages of layout {layout:?} do not fit this model")));
        }
        let layers = self.config.num_layers;
        for (index, row) in batch.rows.iter().enumerate() {
            let fail = |what: String| Err(ZooError::Step(format!("row {index}: {what}")));
            if row.tokens.is_empty() {
                return fail("no tokens".into());
            }
            if let Some(token) = row.tokens.iter().find(|&&t| t as usize >= self.config.vocab_size) {
                return fail(format!("token {token} is outside the vocabulary"));
            }
            if row.kv_len.len() != layers || row.block_tables.len() != layers {
                return fail(format!("block tables of {} layers, not {layers}", row.block_tables.len()));
            }
            for (layer, (table, &len)) in row.block_tables.iter().zip(row.kv_len).enumerate() {
                if !row.plan.runs(layer, Sublayer::Attention) {
                    continue;
                }
                if table.len() * layout.block_size < len + row.tokens.len() {
                    return fail(format!(
                        "layer {layer} has {} pages for {} slots",
                        table.len(),
                        len + row.tokens.len()
                    ));
                }
                if let Some(page) = table.iter().find(|&&page| page as usize >= kv.num_pages()) {
                    return fail(format!("page {page} is outside the pool"));
                }
            }
        }
        Ok(())
    }

    /// Fills `x` with the scaled embeddings and the rotary tables with the step's positions.
    fn embed(&mut self, batch: &StepBatch<'_>, x: &mut Vec<f32>) {
        let width = self.config.hidden_size;
        x.resize(batch.num_tokens() * width, 0.0);
        let tokens = batch.rows.iter().flat_map(|row| row.tokens);
        for (&token, out) in tokens.zip(x.chunks_exact_mut(width)) {
            self.weights.embedding.row(&self.cpu, token as usize, out);
            if self.config.embedding_scale != 1.0 {
                out.iter_mut().for_each(|v| *v *= self.config.embedding_scale);
            }
        }
        let positions: Vec<usize> =
            batch.rows.iter().flat_map(|row| row.first_pos..row.first_pos + row.tokens.len()).collect();
        self.weights.rotary.fill(&positions, &mut self.scratch.tables[0]);
        if let Some(local) = &self.weights.local_rotary {
            local.fill(&positions, &mut self.scratch.tables[1]);
        }
    }

    fn run(&mut self, batch: &mut StepBatch<'_>, kv: &mut KvCache, half: Half<'_>) {
        for span in half.spans {
            batch.rows[span.row].state.sublayers_run[half.sublayer as usize] += span.len as u64;
        }
        match half.sublayer {
            Sublayer::Attention => self.attention(batch, kv, half),
            Sublayer::Ffn => self.ffn(half),
        }
    }

    /// Gathers the active rows' tokens, runs the sublayer on them, puts them back.
    fn run_some(
        &mut self,
        batch: &mut StepBatch<'_>,
        kv: &mut KvCache,
        (layer, sublayer, active): (usize, Sublayer, &[usize]),
        x: &mut [f32],
    ) {
        let width = self.config.hidden_size;
        let spans = spans(batch, active.iter().copied());
        let mut compact = std::mem::take(&mut self.scratch.compact);
        compact.clear();
        for span in &spans {
            compact.extend_from_slice(&x[span.step_start * width..(span.step_start + span.len) * width]);
        }
        self.run(batch, kv, Half { layer, sublayer, spans: &spans, x: &mut compact });
        for span in &spans {
            x[span.step_start * width..(span.step_start + span.len) * width]
                .copy_from_slice(&compact[span.start * width..(span.start + span.len) * width]);
        }
        self.scratch.compact = compact;
    }

    fn keep_hidden(&mut self, batch: &StepBatch<'_>, x: &[f32]) {
        let width = self.config.hidden_size;
        let hidden = &mut self.scratch.hidden;
        hidden.clear();
        let mut end = 0;
        for row in &batch.rows {
            end += row.tokens.len();
            let first = match row.logits {
                LogitRows::None => end,
                LogitRows::Last => end - 1,
                LogitRows::All => end - row.tokens.len(),
            };
            for token in first..end {
                let start = hidden.len();
                hidden.resize(start + width, 0.0);
                let x = &x[token * width..(token + 1) * width];
                rms_norm(self.cpu.isa, x, &self.weights.norm, self.config.rms_norm_eps, &mut hidden[start..]);
            }
        }
    }
}

/// Where the tokens of `rows` lie in the step, and in a block of these rows alone.
fn spans(batch: &StepBatch<'_>, rows: impl Iterator<Item = usize>) -> Vec<Span> {
    let mut starts = Vec::with_capacity(batch.rows.len());
    let mut total = 0;
    for row in &batch.rows {
        starts.push(total);
        total += row.tokens.len();
    }
    let mut start = 0;
    rows.map(|row| {
        let len = batch.rows[row].tokens.len();
        let span = Span { row, start, step_start: starts[row], len };
        start += len;
        span
    })
    .collect()
}
