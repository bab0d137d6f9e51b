//! A deterministic model of no weights, for tests and for measuring the server's own overhead.
//!
//! It keeps the id and the position of every token in the KV pages, and makes the next token's logits
//! from a hash of everything that it reads back through the block tables. So any mistake of paging,
//! prefix sharing or preemption changes the text; with a stack of blocks for weights, so does any mistake about
//! the blocks that a token was, or is, served with. It speaks the vocabulary of
//! [`Tokenizer::toy`](crate::tokenizer::Tokenizer::toy), prefers letters, and ends a text now and then.

mod stack;

use std::ops::Range;

pub use stack::ToyStackOptions;

use super::elastic::ElasticWeights;
use super::{CausalLm, ModelDims};
use crate::compression::Sublayer;
use crate::kv_cache::{KvCache, KvLayout, PageId};
use crate::step::{LogitRows, StepBatch, StepRow};
use crate::tokenizer::toy::{EOS, VOCAB_SIZE};
use crate::{Result, ZooError};
use stack::ToyStack;

const LAYERS: usize = 2;
/// Of one slot: K and V of two channels, which hold the token's id and its position.
const SLOT_LEN: usize = 4;
/// Where a sequence's hash begins (any odd number does).
const SEED: u64 = 0x9E37_79B9_7F4A_7C15;
/// Letters and the space are likelier by this: greedy texts are readable, sampled ones hold other bytes.
const LETTER_BONUS: f32 = 3.0;
/// After one in so many tokens, the text's end is the likeliest.
const END_EVERY: u64 = 64;
const END_BONUS: f32 = 8.0;

/// How the toy misbehaves, for tests of what a defect does to others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ToyOptions {
    /// A step that runs this token fails.
    pub fails_on: Option<u32>,
    /// A step that runs this token panics, after its KV is written.
    pub panics_on: Option<u32>,
    /// The logits after this token are NaN.
    pub nan_on: Option<u32>,
    /// It has weights that can be held in part.
    pub stack: Option<ToyStackOptions>,
}

/// The model. See the module's documentation.
#[derive(Debug)]
pub struct ToyModel {
    dims: ModelDims,
    options: ToyOptions,
    stack: Option<ToyStack>,
    /// What each logit row of the last step has read; `None` for NaN.
    read: Vec<Option<u64>>,
    logits: Vec<f32>,
}

impl ToyModel {
    /// A toy for sequences of up to a million tokens.
    pub fn new(options: ToyOptions) -> Self {
        let stack = options.stack.map(ToyStack::new);
        let dims = ModelDims {
            architecture: "toy".into(),
            num_layers: LAYERS,
            hidden_size: 2,
            num_heads: 1,
            num_kv_heads: 1,
            head_dim: SLOT_LEN / 2,
            vocab_size: VOCAB_SIZE,
            max_context: 1 << 20,
            weight_bytes: stack.as_ref().map_or(0, |stack| stack.bytes_of(stack.held()) as usize),
            sublayer_weights: [1; 2],
        };
        Self { dims, options, stack, read: Vec::new(), logits: Vec::new() }
    }

    /// # Errors
    /// What is malformed about the batch, as every model's.
    fn check(&self, batch: &StepBatch<'_>, kv: &KvCache) -> Result<()> {
        let KvLayout { block_size, .. } = kv.layout();
        if kv.layout() != self.dims.kv_layout(block_size) {
            return Err(ZooError::Step("the pages do not fit this model".into()));
        }
        for row in &batch.rows {
            let known = row
                .tokens
                .iter()
                .enumerate()
                .all(|(i, &t)| (t as usize) < VOCAB_SIZE || row.image_row(i).is_some());
            let layers = row.block_tables.len() == LAYERS && row.kv_len.len() == LAYERS;
            let fits = |(layer, (table, &len)): (usize, (&Vec<PageId>, &usize))| {
                table.len() * block_size >= len + active_len(row, layer)
                    && table.iter().all(|&page| (page as usize) < kv.num_pages())
            };
            if row.tokens.is_empty()
                || !known
                || !layers
                || !row.block_tables.iter().zip(row.kv_len).enumerate().all(fits)
            {
                return Err(ZooError::Step(format!("malformed row at position {}", row.first_pos)));
            }
            if self.stack.as_ref().is_some_and(|stack| self.blocks_of(row) > stack.held()) {
                return Err(ZooError::Step("a row is served with blocks that are not held".into()));
            }
        }
        Ok(())
    }

    /// Blocks that `row` is served with; none without a stack.
    fn blocks_of(&self, row: &StepRow<'_>) -> usize {
        self.stack.as_ref().map_or(0, |stack| row.state.blocks.unwrap_or(stack.held()))
    }

    /// Reads what `row` sees and keeps what its logit rows need.
    fn read_row(&mut self, row: &StepRow<'_>, kv: &KvCache) {
        let mut hash = [SEED; LAYERS];
        for (layer, hash) in hash.iter_mut().enumerate().filter(|(layer, _)| active_len(row, *layer) > 0) {
            for slot in 0..row.kv_len[layer] {
                *hash = mix(*hash, load(kv, &row.block_tables[layer], slot));
            }
        }
        for (index, &token) in row.tokens.iter().enumerate() {
            let active = |layer| index < active_len(row, layer);
            for (layer, hash) in hash.iter_mut().enumerate().filter(|(layer, _)| active(*layer)) {
                *hash = mix(*hash, load(kv, &row.block_tables[layer], row.kv_len[layer] + index));
            }
            let wanted = match row.logits {
                LogitRows::None => false,
                LogitRows::Last => index + 1 == row.tokens.len(),
                LogitRows::All => true,
            };
            if wanted {
                let seed = if self.stack.is_some() { mix(SEED, self.blocks_of(row) as u64) } else { SEED };
                let read = hash.iter().fold(seed, |all, &layer| mix(all, layer));
                self.read.push((self.options.nan_on != Some(token)).then_some(read));
            }
        }
    }
}

impl CausalLm for ToyModel {
    fn dims(&self) -> &ModelDims {
        &self.dims
    }

    fn forward(&mut self, batch: &mut StepBatch<'_>, kv: &mut KvCache) -> Result<()> {
        self.check(batch, kv)?;
        let runs_token =
            |token: Option<u32>| token.is_some_and(|t| batch.rows.iter().any(|row| row.tokens.contains(&t)));
        if runs_token(self.options.fails_on) {
            return Err(ZooError::Step("the toy was told to fail".into()));
        }
        let panics = runs_token(self.options.panics_on);
        // All is written before any is read: rows that write the same page by mistake spoil each other.
        for row in &mut batch.rows {
            let blocks = self.blocks_of(row);
            write_row((row, blocks), kv);
        }
        assert!(!panics, "the toy was told to panic");
        self.read.clear();
        for row in &batch.rows {
            self.read_row(row, kv);
        }
        Ok(())
    }

    fn logits(&mut self, rows: Range<usize>) -> Result<&[f32]> {
        let Some(read) = self.read.get(rows) else {
            return Err(ZooError::Step("these logit rows are not of the last step".into()));
        };
        self.logits.clear();
        for &row in read {
            self.logits.extend((0..VOCAB_SIZE as u64).map(|token| logit(row, token)));
        }
        Ok(&self.logits)
    }

    fn elastic(&mut self) -> Option<&mut dyn ElasticWeights> {
        self.stack.as_mut().map(|stack| stack as &mut dyn ElasticWeights)
    }
}

/// How many of the row's tokens run `layer`, the first ones.
fn active_len(row: &StepRow<'_>, layer: usize) -> usize {
    row.plan.active_len(layer, Sublayer::Attention, (row.first_pos, row.tokens.len()))
}

/// Writes what the row's tokens are, where they stand, and the blocks by which they were computed.
fn write_row((row, blocks): (&mut StepRow<'_>, usize), kv: &mut KvCache) {
    for layer in 0..LAYERS {
        let active = active_len(row, layer);
        for (index, &token) in row.tokens.iter().take(active).enumerate() {
            let (page, start) = slot_place(kv.layout(), &row.block_tables[layer], row.kv_len[layer] + index);
            // Of an image, what its embedding says counts, and not the token.
            let token = row.image_row(index).map_or(u64::from(token), |image| {
                image.iter().fold(SEED, |hash, value| mix(hash, u64::from(value.to_bits()))) >> 32
            });
            let word = (blocks as u64) << 44 ^ token << 32 | (row.first_pos + index) as u64;
            let bits = [0, 16, 32, 48].map(|shift| (word >> shift) as u16);
            kv.pages_mut().page_mut(page)[start..start + SLOT_LEN].copy_from_slice(&bits);
        }
        let ffn = row.plan.active_len(layer, Sublayer::Ffn, (row.first_pos, row.tokens.len()));
        row.state.sublayers_run[0] += active as u64;
        row.state.sublayers_run[1] += ffn as u64;
    }
}

fn load(kv: &KvCache, table: &[PageId], slot: usize) -> u64 {
    let (page, start) = slot_place(kv.layout(), table, slot);
    let bits = &kv.pages().page(page)[start..start + SLOT_LEN];
    bits.iter().rev().fold(0, |word, &part| word << 16 | u64::from(part))
}

/// The slot's page, and where in it the slot's first value lies.
fn slot_place(layout: KvLayout, table: &[PageId], slot: usize) -> (PageId, usize) {
    (table[slot / layout.block_size], slot % layout.block_size * SLOT_LEN)
}

/// In [0, 4) and a bonus; NaN after the token that asks for it.
fn logit(read: Option<u64>, token: u64) -> f32 {
    let Some(read) = read else { return f32::NAN };
    let noise = (mix(read, token) >> 40) as f32 / (1 << 22) as f32;
    let is_letter = u8::try_from(token).is_ok_and(|byte| byte == b' ' || byte.is_ascii_lowercase());
    let ends = token == u64::from(EOS) && read.is_multiple_of(END_EVERY);
    noise + if is_letter { LETTER_BONUS } else { 0.0 } + if ends { END_BONUS } else { 0.0 }
}

/// The finaliser of `SplitMix64` over both: every bit of either changes half of the result's.
fn mix(hash: u64, word: u64) -> u64 {
    let mut z = hash.rotate_left(29).wrapping_add(word).wrapping_mul(SEED);
    z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ z >> 31
}
