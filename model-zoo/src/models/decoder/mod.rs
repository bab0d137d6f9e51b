//! The decoder of the Llama family and Gemma 3, on the CPU kernels.
//!
//! One step: embed → for each layer, attention then FFN on the rows that their plans send there → keep
//! the hidden states whose logits are wanted. `load` reads the weights, `sublayer` runs a layer's halves.

mod load;
mod pruned;
mod stack;
mod sublayer;
mod visual;

use std::ops::Range;

use crate::compression::Sublayer;
use crate::compression::bitstack::{LinearId, Projection};
use crate::compression::must_drop::step as must_drop;
use crate::compression::route::{Active, Route, Span};
use crate::config::DecoderConfig;
use crate::kernels::cpu::attention::SLOTS;
use crate::kernels::cpu::packed::Write;
use crate::kernels::cpu::vector::{cosine, rms_norm};
use crate::kv_cache::KvCache;
use crate::layers::linear::{ActivationScratch, Activations, Cpu, Linear};
use crate::layers::rotary::{Rotary, RotaryTable};
use crate::layers::stack::Service;
use crate::models::elastic::ElasticWeights;
use crate::models::levels::Stack;
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
    /// Where its matrices come in levels.
    stack: Option<Stack>,
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
    quantized: ActivationScratch,
    /// How each token of the running sublayer is served, where weights come in levels.
    services: Vec<Service>,
    tables: [RotaryTable; 2],
    x: Vec<f32>,
    compact: Vec<f32>,
    /// Watched rows of the stream before their FFN.
    before: Vec<f32>,
    normed: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    mixed: Vec<f32>,
    /// Of the attention that ran last, where a filter of image tokens asks for it, `[tokens, num_heads]`
    lse: Vec<f32>,
    /// Rows whose image tokens were filtered after it, with the tokens that go on.
    filtered: Vec<(usize, Vec<usize>)>,
    gate: Vec<f32>,
    up: Vec<f32>,
    /// Final hidden states whose logits are wanted, normed, `[num_logit_rows, hidden_size]`
    hidden: Vec<f32>,
    logits: Vec<f32>,
}

impl CausalLm for CpuDecoder {
    fn dims(&self) -> &ModelDims {
        &self.dims
    }

    fn forward(&mut self, batch: &mut StepBatch<'_>, kv: &mut KvCache) -> Result<()> {
        self.check(batch, kv)?;
        let mut route = Route::begin(&mut batch.rows);
        let mut x = std::mem::take(&mut self.scratch.x);
        self.embed(batch, &route, &mut x);
        for layer in 0..self.config.num_layers {
            for sublayer in [Sublayer::Attention, Sublayer::Ffn] {
                let active = route.select(layer, sublayer, &mut batch.rows);
                let step = &mut Step { batch, kv, route: &route };
                match active {
                    Active::None => {}
                    Active::Prefix(tokens) => {
                        let x = &mut x[..tokens * self.config.hidden_size];
                        self.run(step, Half { layer, sublayer, x });
                    }
                    Active::Gather(tokens) => self.run_gathered(step, (layer, sublayer, tokens), &mut x),
                }
                for (row, tokens) in self.scratch.filtered.drain(..) {
                    route.retain(row, layer, tokens);
                }
            }
        }
        route.finish(&mut batch.rows);
        must_drop::compact(batch, kv, &route)?;
        self.keep_hidden(batch, &route, &x);
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

    fn elastic(&mut self) -> Option<&mut dyn ElasticWeights> {
        self.stack.is_some().then_some(self as &mut dyn ElasticWeights)
    }
}

/// What a sublayer sees of the running step.
struct Step<'a, 'b> {
    batch: &'a mut StepBatch<'b>,
    kv: &'a mut KvCache,
    route: &'a Route,
}

/// A sublayer to run on a block of the residual stream.
struct Half<'a> {
    layer: usize,
    sublayer: Sublayer,
    /// `[tokens of the route's spans, hidden_size]`
    x: &'a mut [f32],
}

impl CpuDecoder {
    /// Puts `linear` in the place of the operator `id`, which is returned: to see what a change of one matrix does.
    ///
    /// # Panics
    /// When it has another shape, or there is no such layer.
    pub fn swap_linear(&mut self, id: LinearId, linear: Linear) -> Linear {
        let layer = &mut self.weights.layers[id.layer];
        let place = match id.projection {
            Projection::Q => &mut layer.q,
            Projection::K => &mut layer.k,
            Projection::V => &mut layer.v,
            Projection::O => &mut layer.o,
            Projection::Gate => &mut layer.gate,
            Projection::Up => &mut layer.up,
            Projection::Down => &mut layer.down,
        };
        let shape = |linear: &Linear| (linear.out_features(), linear.in_features());
        assert_eq!(shape(place), shape(&linear), "invariant: an operator is replaced by one of its shape");
        std::mem::replace(place, linear)
    }

    /// Refuses what would read or write outside the step's own pages. Nothing was written when it fails.
    fn check(&self, batch: &StepBatch<'_>, kv: &KvCache) -> Result<()> {
        let layout = kv.layout();
        if layout != self.dims.kv_layout(layout.block_size) || !layout.block_size.is_multiple_of(SLOTS) {
            return Err(ZooError::Step(format!("pages of layout {layout:?} do not fit this model")));
        }
        if kv.device_pages().is_some() {
            return Err(ZooError::Step("the pages are on a device; this model runs on the CPU".into()));
        }
        let layers = self.config.num_layers;
        for (index, row) in batch.rows.iter().enumerate() {
            let fail = |what: String| Err(ZooError::Step(format!("row {index}: {what}")));
            if row.tokens.is_empty() {
                return fail("no tokens".into());
            }
            if row.images.iter().any(|image| image.embeddings.hidden_size() != self.config.hidden_size) {
                return fail("the embeddings of an image are not as wide as this model".into());
            }
            let unknown = |&(index, &token): &(usize, &u32)| {
                token as usize >= self.config.vocab_size && !row.is_visual(index)
            };
            if let Some((_, token)) = row.tokens.iter().enumerate().find(unknown) {
                return fail(format!("token {token} is outside the vocabulary"));
            }
            if let Some(blocks) = row.state.blocks.filter(|&blocks| blocks > self.held_blocks()) {
                return fail(format!("is served with {blocks} blocks, of which not all are held"));
            }
            if row.kv_len.len() != layers || row.block_tables.len() != layers {
                return fail(format!("block tables of {} layers, not {layers}", row.block_tables.len()));
            }
            must_drop::check(row).or_else(fail)?;
            for (layer, (table, &len)) in row.block_tables.iter().zip(row.kv_len).enumerate() {
                let active = must_drop::slots(row, layer);
                let slots = pruned::packed(row, (layer, layout.block_size));
                let room = slots.map_or(0, |packed| packed.room(layout)) + table.len() * layout.block_size;
                if room < len + active {
                    return fail(format!(
                        "layer {layer} has {} pages for {} slots",
                        table.len(),
                        len + active
                    ));
                }
                if let Some(page) = table.iter().find(|&&page| page as usize >= kv.num_pages()) {
                    return fail(format!("page {page} is outside the pool"));
                }
            }
        }
        Ok(())
    }

    /// Fills `x` with the scaled embeddings, images' as they are, and the rotary tables with the step's
    /// positions.
    fn embed(&mut self, batch: &StepBatch<'_>, route: &Route, x: &mut Vec<f32>) {
        let width = self.config.hidden_size;
        x.resize(batch.num_tokens() * width, 0.0);
        let rows = || route.order().iter().map(|&row| &batch.rows[row]);
        let tokens = rows().flat_map(|row| {
            let visual = move |index| row.is_visual(index).then(|| row.image_row(index));
            row.tokens.iter().enumerate().map(move |(index, &token)| (token, visual(index)))
        });
        for ((token, visual), out) in tokens.zip(x.chunks_exact_mut(width)) {
            if let Some(image) = visual {
                match image {
                    Some(image) => out.copy_from_slice(image),
                    // It runs nowhere.
                    None => out.fill(0.0),
                }
                continue;
            }
            self.weights.embedding.row(&self.cpu, token as usize, out);
            if self.config.embedding_scale != 1.0 {
                out.iter_mut().for_each(|v| *v *= self.config.embedding_scale);
            }
        }
        let positions: Vec<usize> =
            rows().flat_map(|row| row.first_pos..row.first_pos + row.tokens.len()).collect();
        self.weights.rotary.fill(&positions, &mut self.scratch.tables[0]);
        if let Some(local) = &self.weights.local_rotary {
            local.fill(&positions, &mut self.scratch.tables[1]);
        }
    }

    fn run(&mut self, step: &mut Step<'_, '_>, half: Half<'_>) {
        if step.batch.probe.is_none() {
            return self.run_unseen(step, half);
        }
        let Half { layer, sublayer, x } = half;
        let before = x.to_vec();
        self.run_unseen(step, Half { layer, sublayer, x });
        if let Some(probe) = &mut step.batch.probe {
            probe.sublayer((layer, sublayer), &before, x);
        }
    }

    fn run_unseen(&mut self, step: &mut Step<'_, '_>, half: Half<'_>) {
        self.serve(&step.batch.rows, step.route.spans());
        match half.sublayer {
            Sublayer::Attention => self.attention(step, half),
            Sublayer::Ffn if step.route.watched().is_empty() => self.ffn(step, half),
            Sublayer::Ffn => self.watched_ffn(step, half),
        }
    }

    /// Gathers the active tokens, runs the sublayer on them, puts them back.
    fn run_gathered(
        &mut self,
        step: &mut Step<'_, '_>,
        (layer, sublayer, tokens): (usize, Sublayer, usize),
        x: &mut [f32],
    ) {
        let width = self.config.hidden_size;
        let in_step = |span: &Span| span.step_start * width..(span.step_start + span.len) * width;
        let mut compact = std::mem::take(&mut self.scratch.compact);
        compact.clear();
        compact.reserve(tokens * width);
        for span in step.route.spans() {
            compact.extend_from_slice(&x[in_step(span)]);
        }
        self.run(step, Half { layer, sublayer, x: &mut compact });
        for span in step.route.spans() {
            x[in_step(span)].copy_from_slice(&compact[span.start * width..(span.start + span.len) * width]);
        }
        self.scratch.compact = compact;
    }

    /// Runs an FFN and tells the route how it turned the stream of the watched tokens.
    fn watched_ffn(&mut self, step: &mut Step<'_, '_>, half: Half<'_>) {
        let width = self.config.hidden_size;
        let Half { layer, sublayer, x } = half;
        let mut before = std::mem::take(&mut self.scratch.before);
        before.clear();
        for watched in step.route.watched() {
            before.extend_from_slice(&x[watched.token * width..(watched.token + 1) * width]);
        }
        self.ffn(step, Half { layer, sublayer, x });
        for (&watched, before) in step.route.watched().iter().zip(before.chunks_exact(width)) {
            let after = &x[watched.token * width..(watched.token + 1) * width];
            Route::observe(watched, cosine(self.cpu.isa, before, after), &mut step.batch.rows);
        }
        self.scratch.before = before;
    }

    fn keep_hidden(&mut self, batch: &StepBatch<'_>, route: &Route, x: &[f32]) {
        let width = self.config.hidden_size;
        let hidden = &mut self.scratch.hidden;
        hidden.clear();
        for (index, row) in batch.rows.iter().enumerate() {
            let end = route.start(index) + row.tokens.len();
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
