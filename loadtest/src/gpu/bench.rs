//! Steps over sequences with their pages, timed.

use std::time::{Duration, Instant};

use model_zoo::compression::think::{self, SealMoves};
use model_zoo::compression::{Plan, RowState, Sublayer};
use model_zoo::kv_cache::{KvCache, PackedLayout, PageId, PageMove};
use model_zoo::loader::Target;
use model_zoo::models::{CausalLm, Draw};
use model_zoo::step::{LogitRows, StepBatch, StepRow};

use super::shape::SKIP_HORIZON;

pub(super) const BLOCK_SIZE: usize = 16;

/// How long steps are run at least where their energy is metered.
const METERED: Duration = Duration::from_secs(1);

/// How much is run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    /// Tokens before decode steps.
    pub(super) context: usize,
    /// Tokens of the prefill.
    pub(super) prefill: usize,
    /// Prompt tokens of a step at most.
    pub(super) chunk: usize,
    /// Steps that warm a batch up, the two until its class is captured among them.
    pub(super) warm: usize,
    /// Steps that are timed.
    pub(super) steps: usize,
}

pub(super) const SIZES: Sizes = Sizes { context: 1024, prefill: 2048, chunk: 2048, warm: 8, steps: 64 };

/// Sequences with their pages.
pub(super) struct Bench {
    pub(super) model: Box<dyn CausalLm>,
    pub(super) kv: KvCache,
    pub(super) plan: Plan,
    /// The pages of each sequence, and those that are left where some of them were packed.
    pub(super) pages: Vec<Vec<Vec<PageId>>>,
    pub(super) tables: Vec<Vec<Vec<PageId>>>,
    pub(super) lens: Vec<usize>,
    pub(super) states: Vec<RowState>,
    pub(super) sizes: Sizes,
}

/// Joules a token, where there is a meter.
pub(super) fn shown(joules: Option<f64>) -> String {
    joules.map_or("no meter".into(), |joules| format!("{joules:.4}"))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

impl Bench {
    pub(super) fn new(model: Box<dyn CausalLm>, sequences: usize, sizes: Sizes) -> model_zoo::Result<Self> {
        let layers = model.dims().num_layers;
        // The first sequence also holds the long prompt.
        let pages = |sequence: usize| {
            let prompt = if sequence == 0 { sizes.prefill.max(sizes.context) } else { sizes.context };
            let len = prompt + (sizes.warm + sizes.steps).max(SKIP_HORIZON);
            len.div_ceil(BLOCK_SIZE)
        };
        let all: usize = (0..sequences).map(|sequence| layers * pages(sequence)).sum();
        let kv = model.new_kv(model.dims().kv_layout(BLOCK_SIZE), all)?;
        // A step that is prime scatters neighbours.
        let mut ids = (0..all).map(|i| ((i * 10_000_019) % all) as PageId);
        let pages: Vec<Vec<Vec<PageId>>> = (0..sequences)
            .map(|sequence| (0..layers).map(|_| ids.by_ref().take(pages(sequence)).collect()).collect())
            .collect();
        let (lens, states) = (vec![0; sequences], vec![RowState::default(); sequences]);
        Ok(Self { plan: Plan::dense(layers), model, kv, tables: pages.clone(), pages, lens, states, sizes })
    }

    /// Forgets a sequence.
    pub(super) fn restart(&mut self, sequence: usize) {
        self.lens[sequence] = 0;
        self.states[sequence] = RowState::default();
        self.tables[sequence].clone_from(&self.pages[sequence]);
    }

    /// Packs a prompt that is computed, where the plan says so, into the first of its own pages: one after the other none
    /// is written that has not been read.
    pub(super) fn seal(&mut self, sequence: usize) -> model_zoo::Result<()> {
        let Some(pruning) = self.plan.pruning().filter(|own| own.prompt_len == self.lens[sequence]) else {
            return Ok(());
        };
        let layout = PackedLayout { layout: self.model.dims().kv_layout(BLOCK_SIZE), kept: pruning.kept };
        let slots = pruning.num_packed(BLOCK_SIZE);
        let (blocks, packed) = (slots / BLOCK_SIZE, layout.num_pages(slots));
        let mut moves = SealMoves { old: self.tables[sequence].clone(), moves: Vec::new() };
        for (layer, table) in self.tables[sequence].iter_mut().enumerate() {
            for (block, &page) in table.iter().enumerate().take(blocks) {
                let first = block * BLOCK_SIZE;
                let packed = table[layout.pages_of(first, BLOCK_SIZE)].to_vec();
                moves.moves.push(PageMove::Pack { layer, page, first, packed });
            }
            table.drain(packed..blocks);
        }
        think::seal(&mut self.kv, &moves, (pruning, &mut self.states[sequence].pruning))
    }

    /// Runs `tokens` of each of these sequences, and returns each one's next token.
    pub(super) fn step(&mut self, rows: &[(usize, Vec<u32>)]) -> model_zoo::Result<Vec<u32>> {
        let layers = self.model.dims().num_layers;
        let held = |layer, len| self.plan.active_len(layer, Sublayer::Attention, (0, len));
        let lens: Vec<Vec<_>> = rows
            .iter()
            .map(|(sequence, _)| (0..layers).map(|layer| held(layer, self.lens[*sequence])).collect())
            .collect();
        let mut states: Vec<RowState> =
            rows.iter().map(|(sequence, _)| std::mem::take(&mut self.states[*sequence])).collect();
        let mut batch = StepBatch::default();
        for (((sequence, tokens), kv_len), state) in rows.iter().zip(&lens).zip(&mut states) {
            batch.rows.push(StepRow {
                tokens,
                first_pos: self.lens[*sequence],
                images: &[],
                kv_len,
                block_tables: &self.tables[*sequence],
                logits: LogitRows::Last,
                plan: &self.plan,
                state,
            });
        }
        self.model.forward(&mut batch, &mut self.kv)?;
        for ((sequence, tokens), state) in rows.iter().zip(states) {
            self.lens[*sequence] += tokens.len();
            self.states[*sequence] = state;
        }
        let greedy = |row| Draw { row, top_k: 0, temperature: 0.0, top_p: 1.0, min_p: 0.0, uniform: 0.0 };
        let draws: Vec<Draw> = (0..rows.len()).map(greedy).collect();
        let tokens = self.model.choose(&draws)?.unwrap_or_default();
        rows.iter().try_for_each(|(sequence, _)| self.seal(*sequence))?;
        Ok(tokens)
    }

    pub(super) fn prompt(&self, sequence: usize, len: usize) -> Vec<u32> {
        let vocab = self.model.dims().vocab_size;
        (0..len).map(|i| ((i * 7919 + sequence * 104_729 + 11) % vocab) as u32).collect()
    }

    /// Median seconds of a step of `batch` rows after their contexts, and joules a token.
    pub(super) fn decode(&mut self, batch: usize, target: &Target) -> model_zoo::Result<(f64, Option<f64>)> {
        let (times, joules) = self.steps(batch, target)?;
        Ok((median(times), joules))
    }

    /// Mean seconds of a step of one row, for plans whose steps differ, and joules a token.
    pub(super) fn decode_mean(&mut self, target: &Target) -> model_zoo::Result<(f64, Option<f64>)> {
        let (times, joules) = self.steps(1, target)?;
        Ok((times.iter().sum::<f64>() / times.len() as f64, joules))
    }

    /// Seconds of each step of `batch` rows after their contexts, and joules a token.
    pub(super) fn steps(
        &mut self,
        batch: usize,
        target: &Target,
    ) -> model_zoo::Result<(Vec<f64>, Option<f64>)> {
        let Sizes { context, chunk, warm, steps, .. } = self.sizes;
        let mut next = Vec::new();
        for sequence in 0..batch {
            self.restart(sequence);
            let prompt = self.prompt(sequence, context);
            let mut token = Vec::new();
            for tokens in prompt.chunks(chunk) {
                token = self.step(&[(sequence, tokens.to_vec())])?;
            }
            next.extend(token);
        }
        let mut times = Vec::new();
        for _ in 0..warm {
            next = self.next(&next)?;
        }
        let (lens, states, first) = (self.lens.clone(), self.states.clone(), next.clone());
        let before = target.joules();
        let (begin, mut tokens) = (Instant::now(), 0);
        loop {
            for _ in 0..steps {
                let begin = Instant::now();
                next = self.next(&next)?;
                times.push(begin.elapsed().as_secs_f64());
            }
            tokens += steps * batch;
            // The same steps again, until the meter, which moves ten times a second, has moved often.
            if before.is_none() || begin.elapsed() >= METERED {
                break;
            }
            (self.lens, self.states, next) = (lens.clone(), states.clone(), first.clone());
        }
        times.truncate(steps);
        let joules = before.zip(target.joules()).map(|(before, after)| (after - before) / tokens as f64);
        Ok((times, joules))
    }

    /// A step of one token of each of the first sequences.
    fn next(&mut self, tokens: &[u32]) -> model_zoo::Result<Vec<u32>> {
        let rows: Vec<_> =
            tokens.iter().enumerate().map(|(sequence, &token)| (sequence, vec![token])).collect();
        self.step(&rows)
    }

    /// Median seconds of a prefill to its first token.
    pub(super) fn prefill(&mut self) -> model_zoo::Result<f64> {
        let prompt = self.prompt(0, self.sizes.prefill);
        let mut times = Vec::new();
        for _ in 0..7 {
            self.restart(0);
            let begin = Instant::now();
            for chunk in prompt.chunks(self.sizes.chunk) {
                self.step(&[(0, chunk.to_vec())])?;
            }
            times.push(begin.elapsed().as_secs_f64());
        }
        Ok(median(times.split_off(2)))
    }
}
