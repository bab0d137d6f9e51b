//! The order of the stack: which block helps most.

use serde::{Deserialize, Serialize};

use super::dense::{eight_bit, sum_of};
use super::journal::{Journal, Levels};
use super::source::Source;
use super::{LinearId, Shape};
use crate::calibrate::Progress;
use crate::compression::Plan;
use crate::eval::Runner;
use crate::eval::score::{Score, add};
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::pool::Pool;
use crate::layers::linear::{Cpu, Linear};
use crate::models::decoder::CpuDecoder;
use crate::{Result, ZooError};

/// Levels at which a matrix is tried alone, to see how much the model minds its errors: few enough for an effect above
/// the noise.
const TRIED_LEVELS: usize = 2;

/// How a stack is sorted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// As published: level by level, and within a level by the perplexity of the model with everything at the level
    /// before and this one matrix at this (methods.md §1b, step 3). One measurement a block.
    Perplexity,
    /// The same by what a block lessens the loss a byte.
    PerplexityPerByte,
    /// By what a block is expected to lessen the model's divergence a byte: a matrix's error at a level times how much
    /// the model minds its errors, which is measured once a matrix.
    Sensitivity,
    /// By what a block lessens the error of its matrix's outputs, as a share of them, a byte. Nothing is measured.
    Error,
}

impl Order {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Perplexity => "perplexity",
            Self::PerplexityPerByte => "perplexity-per-byte",
            Self::Sensitivity => "sensitivity",
            Self::Error => "error",
        }
    }
}

/// Runs the model with changed matrices.
pub struct Judge<'a> {
    decoder: &'a mut CpuDecoder,
    windows: &'a [Vec<u32>],
    source: &'a Source,
    cpu: Cpu,
    plan: Plan,
    /// The dense model's logits, window by window.
    reference: Vec<Vec<f32>>,
}

impl<'a> Judge<'a> {
    /// A judge that scores every position of `windows`.
    ///
    /// # Errors
    /// [`ZooError::Step`] when there are none.
    pub fn new(decoder: &'a mut CpuDecoder, windows: &'a [Vec<u32>], source: &'a Source) -> Result<Self> {
        if windows.is_empty() {
            return Err(ZooError::Step("the text is too short to sort a stack by".into()));
        }
        let cpu = Cpu { pool: Pool::new(1), isa: Isa::detect() };
        let plan = Plan::dense(source.config.num_layers);
        Ok(Self { decoder, windows, source, cpu, plan, reference: Vec::new() })
    }

    /// The model as it stands now, beside the reference, where there is one.
    fn score(&mut self) -> Result<Score> {
        let mut score = Score::default();
        let mut runner = Runner::new(self.decoder, 1, self.windows[0].len())?;
        for (index, window) in self.windows.iter().enumerate() {
            let reference = self.reference.get(index);
            runner.teach_from(&self.plan, (window, 0), |position, logits| {
                let Some(&next) = window.get(position + 1) else { return };
                let at = position * logits.len();
                add(&mut score, reference.map_or(logits, |all| &all[at..at + logits.len()]), logits, next);
            })?;
        }
        Ok(score)
    }

    /// Makes the model as it stands now the reference.
    fn keep_reference(&mut self) -> Result<()> {
        let mut all = Vec::new();
        let mut runner = Runner::new(self.decoder, 1, self.windows[0].len())?;
        for window in self.windows {
            let mut kept = Vec::new();
            runner.teach_from(&self.plan, (window, 0), |_, logits| kept.extend_from_slice(logits))?;
            all.push(kept);
        }
        self.reference = all;
        Ok(())
    }

    /// Puts the first `levels` of a matrix into the model; returns what was there.
    fn put(&mut self, linear: LinearId, levels: usize, journal: &Journal) -> Result<Linear> {
        let blocks = (0..levels).map(|level| journal.block(linear, level)).collect::<Result<Vec<_>>>()?;
        let size = linear.projection.size(&self.source.config);
        let rank = blocks.first().map_or(1, |block| block.u.len() / size[0]);
        let shape = Shape { rows: size[0], cols: size[1], rank };
        let weight = eight_bit(&sum_of(&blocks, shape), size);
        let bias = self.source.bias(linear)?;
        let linear_new = Linear::new(&self.cpu, &weight, bias.as_ref())?;
        Ok(self.decoder.swap_linear(linear, linear_new))
    }
}

/// The blocks above the base in the order `order`. Measurements go into the journal.
///
/// # Errors
/// [`ZooError::Step`] when the model fails, [`ZooError::Compression`] when it gives no numbers, and the journal's.
pub fn stack(
    order: Order,
    (linears, levels): (&[LinearId], usize),
    mut judge: Judge<'_>,
    (journal, progress): (&mut Journal, &mut dyn FnMut(Progress)),
) -> Result<Vec<(LinearId, usize)>> {
    match order {
        Order::Error => {
            let share = |levels: &Levels| levels.errors[0].max(f64::MIN_POSITIVE).recip();
            by_loss(linears, journal, |_, levels| share(levels))
        }
        Order::Sensitivity => {
            let minds = sensitivities((linears, levels), &mut judge, (journal, progress))?;
            by_loss(linears, journal, |index, _| minds[index])
        }
        Order::Perplexity | Order::PerplexityPerByte => {
            let per_byte = order == Order::PerplexityPerByte;
            by_perplexity((linears, levels, per_byte), &mut judge, (journal, progress))
        }
    }
}

/// What the model's divergence grows by with a matrix's error: for each matrix, the divergence with its first levels
/// alone ÷ their error.
fn sensitivities(
    (linears, levels): (&[LinearId], usize),
    judge: &mut Judge<'_>,
    (journal, progress): (&mut Journal, &mut dyn FnMut(Progress)),
) -> Result<Vec<f64>> {
    let tried = TRIED_LEVELS.min(levels);
    let mut minds = Vec::new();
    for (index, &linear) in linears.iter().enumerate() {
        let key = format!("divergence {index}");
        let divergence = match journal.score(&key) {
            Some(known) => known,
            None => {
                if judge.reference.is_empty() {
                    judge.keep_reference()?;
                }
                let before = judge.put(linear, tried, journal)?;
                let divergence = judge.score()?.mean_kl();
                judge.decoder.swap_linear(linear, before);
                if !divergence.is_finite() {
                    return Err(ZooError::Compression(format!(
                        "the model gives no numbers without {linear}"
                    )));
                }
                journal.add_score(&key, divergence)?;
                divergence
            }
        };
        let error = journal.levels(linear).map_or(1.0, |levels: &Levels| levels.errors[tried]);
        minds.push(divergence / error.max(f64::MIN_POSITIVE));
        progress(Progress { stage: "sensitivity", done: index + 1, total: linears.len() });
    }
    Ok(minds)
}

/// Greedy by the loss that blocks take away a byte, where a matrix's loss is its error times its weight. Of every
/// matrix the run of next levels that takes away most a byte is looked at, so that a level that only its successors
/// make useful is not in their way.
fn by_loss(
    linears: &[LinearId],
    journal: &Journal,
    weight: impl Fn(usize, &Levels) -> f64,
) -> Result<Vec<(LinearId, usize)>> {
    let missing = |linear| ZooError::Compression(format!("{linear} is not decomposed"));
    let levels = linears.iter().map(|&linear| journal.levels(linear).ok_or_else(|| missing(linear)));
    let levels = levels.collect::<Result<Vec<_>>>()?;
    let runs = |index: usize, held: usize| {
        let of = levels[index];
        let a_byte = weight(index, of) / of.shape.block_bytes() as f64;
        let gain = move |to: usize| a_byte * (of.errors[held] - of.errors[to]) / (to - held) as f64;
        (held + 1..of.errors.len()).map(move |to| (gain(to), index, to))
    };
    let mut held = vec![1; linears.len()];
    let mut stack = Vec::new();
    // Of equals, the first matrix and the shortest run.
    while let Some((_, index, to)) = (0..linears.len())
        .flat_map(|index| runs(index, held[index]))
        .max_by(|a, b| a.0.total_cmp(&b.0).then((b.1, b.2).cmp(&(a.1, a.2))))
    {
        stack.extend((held[index]..to).map(|level| (linears[index], level)));
        held[index] = to;
    }
    Ok(stack)
}

/// The published order, see [`Order::Perplexity`].
fn by_perplexity(
    (linears, levels, per_byte): (&[LinearId], usize, bool),
    judge: &mut Judge<'_>,
    (journal, progress): (&mut Journal, &mut dyn FnMut(Progress)),
) -> Result<Vec<(LinearId, usize)>> {
    let total = linears.len() * levels.saturating_sub(1);
    let mut losses = vec![Vec::new(); levels.saturating_sub(1)];
    let mut before = Vec::new();
    for level in 1..levels {
        // Everything at this level, and then one matrix after the other at the next.
        let mut placed = Placed { judge: &mut *judge, linears, level, is_placed: false };
        before.push(placed.loss(None, journal)?);
        for index in 0..linears.len() {
            losses[level - 1].push(placed.loss(Some(index), journal)?);
            progress(Progress { stage: "perplexity", done: (level - 1) * linears.len() + index + 1, total });
        }
    }
    fill_gaps(&mut losses)?;
    let mut stack = Vec::with_capacity(total);
    for (below, losses) in losses.iter().enumerate() {
        let worth = |index: usize| {
            let bytes = journal.levels(linears[index]).map_or(1, |levels| levels.shape.block_bytes());
            if per_byte { (before[below] - losses[index]) / bytes as f64 } else { -losses[index] }
        };
        let mut order: Vec<_> = (0..linears.len()).map(|index| (worth(index), index)).collect();
        order.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        stack.extend(order.into_iter().map(|(_, index)| (linears[index], below + 1)));
    }
    Ok(stack)
}

/// A model with every matrix at one level.
struct Placed<'p, 'a> {
    judge: &'p mut Judge<'a>,
    linears: &'p [LinearId],
    level: usize,
    is_placed: bool,
}

impl Placed<'_, '_> {
    /// The loss, in nats, with the matrix `above` at the level after.
    fn loss(&mut self, above: Option<usize>, journal: &mut Journal) -> Result<f64> {
        let key = format!("loss {} {above:?}", self.level);
        if let Some(known) = journal.score(&key) {
            return Ok(known);
        }
        if !self.is_placed {
            self.linears.iter().try_for_each(|&all| self.judge.put(all, self.level, journal).map(|_| ()))?;
            self.is_placed = true;
        }
        let score = match above.map(|index| self.linears[index]) {
            None => self.judge.score()?,
            Some(linear) => {
                let before = self.judge.put(linear, self.level + 1, journal)?;
                let score = self.judge.score()?;
                self.judge.decoder.swap_linear(linear, before);
                score
            }
        };
        let loss = score.nll / score.tokens.max(1) as f64;
        journal.add_score(&key, loss)?;
        Ok(loss)
    }
}

/// A loss that is no number becomes the next level's plus the largest of its own.
fn fill_gaps(losses: &mut [Vec<f64>]) -> Result<()> {
    for level in (0..losses.len()).rev() {
        let most = losses[level].iter().copied().filter(|loss| loss.is_finite()).fold(0.0, f64::max);
        for index in 0..losses[level].len() {
            if !losses[level][index].is_finite() {
                let Some(above) = losses.get(level + 1) else {
                    return Err(ZooError::Compression("the model gives no numbers with all levels".into()));
                };
                losses[level][index] = above[index] + most;
            }
        }
    }
    Ok(())
}
