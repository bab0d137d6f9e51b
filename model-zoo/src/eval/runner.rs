//! One model and the cache of a few sequences, without a server: what calibration and evaluation run on.

use crate::compression::think::{self, SealMoves};
use crate::compression::{Plan, RowState};
use crate::kv_cache::{KvCache, PackedLayout, PageId, PageMove};
use crate::models::{CausalLm, ModelDims};
use crate::step::{LogitRows, Probe, StepBatch, StepRow};
use crate::vision::PromptImage;
use crate::{Result, ZooError};

/// Logit rows asked for at once: bounds the model's scratch memory.
const TILE: usize = 16;
/// KV slots in a page.
const BLOCK_SIZE: usize = 16;

/// Runs up to `num_sequences` sequences of up to `capacity` tokens each.
pub struct Runner<'m> {
    model: &'m mut dyn CausalLm,
    kv: KvCache,
    capacity: usize,
}

/// A sequence under way in a [`Runner`].
#[derive(Debug)]
pub struct Running {
    block_tables: Vec<Vec<PageId>>,
    plan: Plan,
    images: Vec<PromptImage>,
    len: usize,
    /// What its plan has decided, and the work done.
    pub state: RowState,
}

impl Running {
    /// The same sequence with the images of its prompt.
    #[must_use]
    pub fn showing(self, images: Vec<PromptImage>) -> Self {
        Self { images, ..self }
    }

    /// Forgets all but its first `len` tokens, to go on with others. Of a plan that drops or packs what is computed,
    /// what comes before `len` must not have been touched.
    pub fn rewind(&mut self, len: usize) {
        self.len = len.min(self.len);
    }
}

/// What one sequence runs next.
#[derive(Debug)]
pub struct Chunk<'a> {
    /// The sequence.
    pub sequence: &'a mut Running,
    /// Tokens after those that it has run.
    pub tokens: &'a [u32],
    /// Which of them need logits.
    pub logits: LogitRows,
}

impl<'m> Runner<'m> {
    /// A runner with KV for `num_sequences` sequences of `capacity` tokens.
    ///
    /// # Errors
    /// [`ZooError::Memory`] when there is none for them.
    pub fn new(model: &'m mut dyn CausalLm, num_sequences: usize, capacity: usize) -> Result<Self> {
        // Twice: packed pages lie beside the dense ones that they are made of.
        let num_pages = 2 * num_sequences * model.dims().num_layers * capacity.div_ceil(BLOCK_SIZE);
        let kv = model.new_kv(model.dims().kv_layout(BLOCK_SIZE), num_pages)?;
        Ok(Self { model, kv, capacity })
    }

    /// The model's sizes.
    pub fn dims(&self) -> &ModelDims {
        self.model.dims()
    }

    /// Decoder layers of the model.
    pub fn num_layers(&self) -> usize {
        self.model.dims().num_layers
    }

    /// Channels of a head.
    pub fn head_dim(&self) -> usize {
        self.model.dims().head_dim
    }

    /// Starts sequence `slot`; one that ran there before is forgotten.
    pub fn start(&self, slot: usize, plan: Plan) -> Running {
        let (layers, pages) = (self.num_layers(), self.capacity.div_ceil(BLOCK_SIZE));
        let table = |layer| {
            let first = 2 * (slot * layers + layer) * pages;
            (first..first + pages).map(|page| page as PageId).collect()
        };
        let block_tables = (0..layers).map(table).collect();
        Running { block_tables, plan, images: Vec::new(), len: 0, state: RowState::default() }
    }

    /// Runs one step over `chunks`; its logits are [`Runner::logits`].
    ///
    /// # Errors
    /// [`ZooError::Step`] when a sequence outgrows its capacity, or as [`CausalLm::forward`].
    pub fn step(&mut self, chunks: &mut [Chunk<'_>], probe: Option<&mut dyn Probe>) -> Result<()> {
        let layers = self.num_layers();
        let lens: Vec<Vec<usize>> = chunks
            .iter()
            .map(|Chunk { sequence, .. }| {
                (0..layers).map(|layer| sequence.plan.kv_len(layer, sequence.len, &sequence.state)).collect()
            })
            .collect();
        if chunks.iter().any(|chunk| chunk.sequence.len + chunk.tokens.len() > self.capacity) {
            return Err(ZooError::Step(format!("a sequence outgrew its {} tokens", self.capacity)));
        }
        let rows = chunks.iter_mut().zip(&lens).map(|(chunk, kv_len)| StepRow {
            tokens: chunk.tokens,
            first_pos: chunk.sequence.len,
            images: &chunk.sequence.images,
            kv_len,
            block_tables: &chunk.sequence.block_tables,
            logits: chunk.logits,
            plan: &chunk.sequence.plan,
            state: &mut chunk.sequence.state,
        });
        // A shorter loan: behind `Option` the compiler does not shorten it by itself.
        let probe = probe.map(|probe| -> &mut dyn Probe { probe });
        self.model.forward(&mut StepBatch { rows: rows.collect(), probe }, &mut self.kv)?;
        for chunk in chunks {
            chunk.sequence.len += chunk.tokens.len();
            self.seal(chunk.sequence)?;
        }
        Ok(())
    }

    /// Packs the older keys of a sequence whose prompt has just been computed.
    fn seal(&mut self, sequence: &mut Running) -> Result<()> {
        let Some(pruning) = sequence.plan.pruning().filter(|pruning| pruning.prompt_len == sequence.len)
        else {
            return Ok(());
        };
        let num_packed = pruning.num_packed(BLOCK_SIZE);
        if num_packed == 0 {
            return Ok(());
        }
        let layout = PackedLayout { layout: self.kv.layout(), kept: pruning.kept };
        let (num_pages, behind) =
            (layout.num_pages(num_packed) as PageId, self.capacity.div_ceil(BLOCK_SIZE));
        let demand = sequence.plan.kv_demand();
        let mut moves = SealMoves::default();
        for (layer, table) in sequence.block_tables.iter_mut().enumerate() {
            let holds = demand.kv_len(layer, sequence.len) > 0;
            moves.old.push(if holds { table.clone() } else { Vec::new() });
            if holds {
                let first = table[0] + behind as PageId;
                let packed: Vec<PageId> = (first..first + num_pages).collect();
                let dense = table.split_off(num_packed / BLOCK_SIZE);
                let pack = |(index, &page): (usize, &PageId)| {
                    let first = index * BLOCK_SIZE;
                    let packed = packed[layout.pages_of(first, BLOCK_SIZE)].to_vec();
                    PageMove::Pack { layer, page, first, packed }
                };
                moves.moves.extend(table.iter().enumerate().map(pack));
                *table = packed.iter().chain(&dense).copied().collect();
            }
        }
        think::seal(&mut self.kv, &moves, (pruning, &mut sequence.state.pruning))
    }

    /// Runs `tokens` as one sequence from an empty cache: the layer sets of every position are those of
    /// generation (methods.md §5d), so this is teacher forcing.
    ///
    /// # Errors
    /// As [`Runner::step`].
    pub fn teach(&mut self, plan: &Plan, tokens: &[u32], probe: Option<&mut dyn Probe>) -> Result<RowState> {
        let mut sequence = self.start(0, plan.clone());
        let chunk = Chunk { sequence: &mut sequence, tokens, logits: LogitRows::None };
        self.step(&mut [chunk], probe)?;
        Ok(sequence.state)
    }

    /// The same, and `visit`s the logits of every position from `first` on.
    ///
    /// # Errors
    /// As [`Runner::step`].
    pub fn teach_from(
        &mut self,
        plan: &Plan,
        (tokens, first): (&[u32], usize),
        mut visit: impl FnMut(usize, &[f32]),
    ) -> Result<RowState> {
        let mut sequence = self.start(0, plan.clone());
        // Pruning takes place between two steps.
        let seal = plan.pruning().map_or(tokens.len(), |pruning| pruning.prompt_len.min(tokens.len()));
        for range in [0..seal, seal..tokens.len()].into_iter().filter(|range| !range.is_empty()) {
            let chunk =
                Chunk { sequence: &mut sequence, tokens: &tokens[range.clone()], logits: LogitRows::All };
            self.step(&mut [chunk], None)?;
            for start in (first.max(range.start)..range.end).step_by(TILE) {
                let tile = start..(start + TILE).min(range.end);
                let logits = self.model.logits(start - range.start..tile.end - range.start)?;
                let vocab = logits.len() / tile.len();
                tile.zip(logits.chunks_exact(vocab)).for_each(|(position, logits)| visit(position, logits));
            }
        }
        Ok(sequence.state)
    }

    /// Logits of the last step's rows, as [`CausalLm::logits`].
    ///
    /// # Errors
    /// As [`CausalLm::logits`].
    pub fn logits(&mut self, rows: std::ops::Range<usize>) -> Result<&[f32]> {
        self.model.logits(rows)
    }

    /// Tokens that `plan` samples greedily after `prompt`, up to `max_tokens` or an end in `ends`.
    ///
    /// # Errors
    /// As [`Runner::step`].
    pub fn generate(
        &mut self,
        plan: &Plan,
        prompt: &[u32],
        (max_tokens, ends): (usize, &[u32]),
    ) -> Result<Vec<u32>> {
        let mut sequence = self.start(0, plan.clone());
        let mut next = prompt.to_vec();
        let mut output = Vec::new();
        while output.len() < max_tokens {
            let chunk = Chunk { sequence: &mut sequence, tokens: &next, logits: LogitRows::Last };
            self.step(&mut [chunk], None)?;
            let token = argmax(self.logits(0..1)?);
            if ends.contains(&token) {
                break;
            }
            output.push(token);
            next = vec![token];
        }
        Ok(output)
    }
}

/// The likeliest token, the lowest of equals.
pub fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (token, &logit)| {
        if logit > best.1 { (token, logit) } else { best }
    });
    best.0 as u32
}
