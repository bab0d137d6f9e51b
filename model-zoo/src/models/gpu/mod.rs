//! The decoder of the Llama family and Gemma 3 on a GPU, over whatever [`Device`] runs the kernels.
//!
//! A step: lay it out as tables and upload them → embed → for each layer, attention then FFN on the tokens that run
//! them → keep the stream for logits. Steps of one token a row are one launch where they are few (`fused`), and else
//! captured once their class has been seen, and replayed. Weights and activations are bf16, the residual stream and all sums f32.

mod fused;
mod graphs;
mod images;
mod layer;
mod levels;
mod load;
mod pool;
mod pruned;
mod quantized;
mod scratch;
mod stack;
mod visual;

use std::ops::Range;
use std::sync::Arc;

use crate::compression::must_drop::step as must_drop;
use crate::compression::route::Route;
use crate::config::DecoderConfig;
use crate::kernels::cuda::attention::Attention;
use crate::kernels::cuda::device::{Buffer, Device, Graph, Part};
use crate::kernels::cuda::ops::{self, Heads, Matrix, Norm, Tokens};
use crate::kernels::cuda::quantized::{Operand, Quantized, QuantizedPart};
use crate::kernels::cuda::sampling;
use crate::kernels::cuda::stack::STACK_TOKENS;
use crate::kernels::cuda::tables::{Bounds, Pages, StepTables};
use crate::kv_cache::{KvCache, KvLayout};
use crate::models::elastic::ElasticWeights;
use crate::models::{CausalLm, Draw, ModelDims};
use crate::step::StepBatch;
use crate::{Result, ZooError};
use graphs::Graphs;
use images::Images;
use levels::{Joint, Levels};
use pool::Pool;
use pruned::Pruned;
use scratch::Scratch;
use visual::Visual;

/// Logit rows that are computed at once.
const LOGIT_ROWS: usize = 256;

/// A decoder whose weights lie on a device.
#[derive(Debug)]
pub struct GpuDecoder {
    config: DecoderConfig,
    dims: ModelDims,
    device: Arc<dyn Device>,
    weights: Weights,
    /// Where its matrices come in levels.
    levels: Option<Levels>,
    tables: StepTables,
    scratch: Scratch,
    pruned: Pruned,
    images: Images,
    visual: Visual,
    graphs: Graphs,
    /// Logit rows of the last step that lie in the scratch memory from its beginning on.
    ready: usize,
    host_logits: Vec<f32>,
}

/// How a matrix lies in memory.
#[derive(Debug)]
enum Weight {
    /// bf16 `[rows, cols]`.
    Dense(Buffer),
    Levels(Joint),
    /// Codes of its parts' rows.
    Quantized {
        units: Buffer,
        parts: Vec<QuantizedPart>,
    },
}

/// A matrix with the buffers that it lies in.
#[derive(Debug)]
struct Linear {
    weight: Weight,
    bias: Option<Buffer>,
    rows: usize,
    cols: usize,
}

#[derive(Debug)]
struct Weights {
    embedding: Linear,
    /// `None` when tied to the embedding.
    lm_head: Option<Linear>,
    layers: Vec<Layer>,
    norm: Buffer,
    /// Frequencies and magnitude, of all layers or the global ones, and of windowed ones where theirs differ.
    rotary: [Option<(Buffer, f32)>; 2],
    /// Query and KV heads of this device.
    heads: [usize; 2],
    /// FFN channels of this device.
    ffn: usize,
}

#[derive(Debug)]
struct Layer {
    attention_norm: Buffer,
    /// Queries, keys and values; heads of the first two in tile order (see `place.cuh`).
    qkv: Linear,
    o: Linear,
    qk_norm: Option<[Buffer; 2]>,
    ffn_norm: Buffer,
    /// Eight gates, eight values, and so on.
    gate_up: Linear,
    down: Linear,
    post_norms: Option<[Buffer; 2]>,
    window: Option<usize>,
}

impl Linear {
    /// In one piece, as joint steps and embeddings take it.
    fn operand(&self) -> Result<Operand<'_>> {
        let (bias, rows, cols) = (self.bias(), self.rows, self.cols);
        match &self.weight {
            Weight::Dense(weight) => {
                Ok(Operand::Dense(Matrix { weight: Part::all(weight), bias, rows, cols }))
            }
            Weight::Levels(_) => Err(ZooError::Device("a matrix in levels lies in many pieces".into())),
            Weight::Quantized { units, parts } => {
                Ok(Operand::Quantized(Quantized { units: Part::all(units), parts, bias, cols }))
            }
        }
    }
}

impl CausalLm for GpuDecoder {
    fn dims(&self) -> &ModelDims {
        &self.dims
    }

    fn device(&self) -> String {
        self.device.name()
    }

    fn is_on_gpu(&self) -> bool {
        true
    }

    fn kv_room(&self) -> Option<u64> {
        // What steps and the driver still take is small beside a tenth of what is left.
        self.device.memory().ok().map(|(free, _)| free / 10 * 9)
    }

    fn new_kv(&self, layout: KvLayout, num_pages: usize) -> Result<KvCache> {
        let layout = KvLayout { num_kv_heads: self.weights.heads[1], ..layout };
        Ok(KvCache::on_device(layout, Box::new(Pool::new(&self.device, layout, num_pages)?)))
    }

    fn elastic(&mut self) -> Option<&mut dyn ElasticWeights> {
        if self.levels.is_some() { Some(self) } else { None }
    }

    fn forward(&mut self, batch: &mut StepBatch<'_>, kv: &mut KvCache) -> Result<()> {
        if batch.probe.is_some() {
            return Err(ZooError::Step("calibration looks on at steps on the CPU only".into()));
        }
        let layout = kv.layout();
        let pool = pool::part(kv)?;
        let heads = Heads {
            queries: self.weights.heads[0],
            kv: self.weights.heads[1],
            dim: self.config.head_dim,
            block_size: layout.block_size,
        };
        if (layout.num_kv_heads, layout.head_dim) != (heads.kv, heads.dim)
            || !layout.block_size.is_multiple_of(16)
        {
            return Err(ZooError::Step(format!("pages of layout {layout:?} do not fit this model")));
        }
        if let Some(levels) = &self.levels {
            levels.check(&batch.rows)?;
        }
        self.ready = 0;
        let prefixes = self.pruned.prefixes(&*self.device, batch, layout)?;
        let mut route = Route::begin(&mut batch.rows);
        let pages = Pages { count: kv.num_pages(), layout, prefixes: &prefixes };
        self.tables.lay((&mut *batch, &mut route), pages, graphs::bucket)?;
        let whole = self.tables.is_uniform() && self.tables.num_logits() == batch.rows.len();
        let served = match &mut self.levels {
            Some(levels) => levels.serve((&batch.rows, &route), self.tables.num_tokens())?,
            None => false,
        };
        if served {
            self.graphs.clear();
        }
        if self.tables.restarts_flags() {
            self.device.fill(Part::all(&self.scratch.links), 0)?;
        }
        self.pruned.clear_sums(
            &*self.device,
            (self.tables.observers().len(), self.config.num_layers),
            layout,
        )?;
        self.images.bring(&*self.device, (batch, &route), self.config.hidden_size)?;
        let step = Step { pool, heads, whole };
        self.run_part(&step, (&mut *batch, &route))?;
        while self.filter(&step, (&mut *batch, &mut route), &prefixes)? {
            self.run_part(&step, (&mut *batch, &route))?;
        }
        self.pruned.take_sums(&*self.device, self.tables.observers(), batch)?;
        self.ready = if whole { self.tables.num_logits() } else { 0 };
        route.finish(&mut batch.rows);
        must_drop::compact(batch, kv, &route)
    }

    fn logits(&mut self, rows: Range<usize>) -> Result<&[f32]> {
        let kept = self.tables.num_logits();
        if rows.start > rows.end || rows.end > kept {
            return Err(ZooError::Step(format!("logit rows {rows:?} of a step that kept {kept}")));
        }
        let vocab = self.config.vocab_size;
        self.host_logits.resize(rows.len() * vocab, 0.0);
        for start in rows.clone().step_by(LOGIT_ROWS) {
            let tile = start..(start + LOGIT_ROWS).min(rows.end);
            let first = self.ensure_logits(tile.clone())?;
            let part = Part::all(&self.scratch.logits).slice(4 * first * vocab, 4 * tile.len() * vocab)?;
            let host =
                &mut self.host_logits[(tile.start - rows.start) * vocab..(tile.end - rows.start) * vocab];
            self.device.download(part, bytemuck::cast_slice_mut(host))?;
        }
        Ok(&self.host_logits)
    }

    fn choose(&mut self, draws: &[Draw]) -> Result<Option<Vec<u32>>> {
        let mut tokens = Vec::with_capacity(draws.len());
        let mut rest = draws;
        while let Some(first) = rest.first() {
            // Draws whose rows lie close together share one call; they come in the order of their rows.
            let near = |draw: &&Draw| draw.row >= first.row && draw.row < first.row + LOGIT_ROWS;
            let (own, others) = rest.split_at(rest.iter().take_while(near).count());
            let end = own.iter().map(|draw| draw.row + 1).max().unwrap_or(0);
            if end > self.tables.num_logits() {
                let kept = self.tables.num_logits();
                return Err(ZooError::Step(format!("logit row {} of a step that kept {kept}", end - 1)));
            }
            let at = self.ensure_logits(first.row..end)?;
            let own: Vec<Draw> =
                own.iter().map(|draw| Draw { row: draw.row - first.row + at, ..*draw }).collect();
            tokens.extend(self.draw(&own)?);
            rest = others;
        }
        Ok(Some(tokens))
    }
}

/// What a running step needs beside the decoder.
#[derive(Debug, Clone, Copy)]
struct Step {
    pool: Part,
    heads: Heads,
    /// Logits of all rows are part of the step.
    whole: bool,
}

impl GpuDecoder {
    /// Runs the part of the step that lies in the tables, and tells its rows what was decided in it.
    fn run_part(&mut self, step: &Step, (batch, route): (&mut StepBatch<'_>, &Route)) -> Result<()> {
        let grown = self.scratch.fit(&*self.device, (&self.tables, step.heads), self.config.vocab_size)?;
        if self.tables.upload(&*self.device)? || grown {
            self.graphs.clear();
        }
        self.run(step)?;
        self.tables.tell(&*self.device, batch, route)
    }

    /// Replays the step's class, or runs it: as one launch where that can be, else capturing it the second time.
    fn run(&mut self, step: &Step) -> Result<()> {
        if !self.tables.is_uniform() {
            return self.launch(step);
        }
        let mut key = graphs::key(self.tables.class(), (step.pool, step.whole));
        // What many tokens launch follows from the levels that each uses.
        let levels = self.levels.iter().filter(|_| self.tables.num_tokens() > STACK_TOKENS);
        key.extend(levels.flat_map(Levels::services).map(|&blocks| u64::from(blocks)));
        if let Some(graph) = self.graphs.get(&key) {
            return graph.replay();
        }
        if self.fuses(step) {
            let fused = self.fuse(step)?;
            fused.replay()?;
            self.graphs.insert(key, fused);
            return Ok(());
        }
        if !self.graphs.is_due(&key) {
            return self.launch(step);
        }
        match self.capture(step) {
            Ok(graph) => {
                graph.replay()?;
                self.graphs.insert(key, graph);
                Ok(())
            }
            // Others who use the device can spoil a capture. Nothing of the step has run then.
            Err(error) => {
                tracing::warn!(%error, "a step was not captured");
                self.launch(step)
            }
        }
    }

    fn capture(&self, step: &Step) -> Result<Box<dyn Graph>> {
        self.device.begin_capture()?;
        let launched = self.launch(step);
        // The stream leaves its capture whatever happened.
        let graph = self.device.end_capture();
        launched.and(graph)
    }

    /// Launches every kernel of the part of the step that lies in the tables.
    fn launch(&self, step: &Step) -> Result<()> {
        let (device, tables, scratch) = (&*self.device, &self.tables, &self.scratch);
        let (count, width) = (tables.num_tokens(), self.config.hidden_size);
        let x = Part::all(&scratch.x);
        if tables.part().start == 0 {
            let embedding = self.weights.embedding.operand()?;
            let scale = self.config.embedding_scale;
            ops::embed(device, (&embedding, tables.token_ids()?), (x, count, width), scale)?;
            self.images.put(device, (x, width))?;
            for (rotary, table) in self.weights.rotary.iter().zip(&scratch.rotary) {
                if let Some((frequencies, magnitude)) = rotary {
                    let frequencies = (Part::all(frequencies), *magnitude);
                    ops::rotary(device, frequencies, (tables.positions()?, count), Part::all(table))?;
                }
            }
        }
        for half in tables.part() {
            if half % 2 == 0 { self.attention(step, half / 2)? } else { self.ffn(half / 2)? }
        }
        if step.whole { self.head(tables.logits(0..count)?) } else { Ok(()) }
    }

    fn norm(&self, weight: &Buffer) -> Norm {
        Norm { weight: Part::all(weight), eps: self.config.rms_norm_eps }
    }

    /// The logits of `tokens`, to the beginning of the scratch memory.
    fn head(&self, tokens: Tokens) -> Result<()> {
        let head = self.weights.lm_head.as_ref().unwrap_or(&self.weights.embedding);
        let norm = self.norm(&self.weights.norm);
        self.product_of_normed(head, (tokens, norm), Part::all(&self.scratch.logits))
    }

    /// Sees to it that the logits of `rows` lie in the scratch memory, and returns where the first of them does.
    fn ensure_logits(&mut self, rows: Range<usize>) -> Result<usize> {
        if rows.end <= self.ready {
            return Ok(rows.start);
        }
        self.ready = 0;
        if self.scratch.fit_logits(&*self.device, rows.len() * self.config.vocab_size)? {
            self.graphs.clear();
        }
        self.head(self.tables.logits(rows)?)?;
        Ok(0)
    }

    fn draw(&mut self, draws: &[Draw]) -> Result<Vec<u32>> {
        let bytes = sampling::draw_bytes(draws);
        let part = self.scratch.draws(&*self.device, bytes.len() + 4 * draws.len())?;
        let (own, out) = (part.slice(0, bytes.len())?, part.slice(bytes.len(), 4 * draws.len())?);
        self.device.upload(own, &bytes)?;
        let logits = (Part::all(&self.scratch.logits), self.config.vocab_size);
        sampling::sample(&*self.device, logits, (own, draws), out)?;
        let mut tokens = vec![0u32; draws.len()];
        self.device.download(out, bytemuck::cast_slice_mut(&mut tokens))?;
        Ok(tokens)
    }

    /// Attention's inputs, for `layer`.
    fn attention_of(&self, step: &Step, layer: usize) -> Result<Attention> {
        let (tables, scratch) = (&self.tables, &self.scratch);
        let window = self.weights.layers[layer].window;
        let local = usize::from(window.is_some() && self.weights.rotary[1].is_some());
        let [rows, within] = tables.owners(layer)?;
        let [kv_len, starts, pages] = tables.pages(layer)?;
        let places = ops::Places {
            q: Part::all(&scratch.q),
            pages: step.pool,
            rotary: Part::all(&scratch.rotary[local]),
            rows,
            within,
            kv_len,
            starts,
            tables: pages,
            heads: step.heads,
        };
        Ok(Attention {
            places,
            out: Part::all(&scratch.mixed),
            scale: self.config.attention_scale,
            window,
            packed: if tables.is_packed() { tables.packed()? } else { Part::NONE },
            layer,
            scratch: scratch.parts.each_ref().map(Part::all),
        })
    }

    /// What tables of this model's steps are checked against.
    fn bounds(config: &DecoderConfig) -> Bounds {
        Bounds {
            layers: config.num_layers,
            vocab: config.vocab_size,
            hidden: config.hidden_size,
            num_pages: 0,
            block_size: 16,
        }
    }
}
