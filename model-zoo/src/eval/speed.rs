//! Decode speed of batches, measured in turns so that a drifting machine meets all of them alike.

use std::time::Instant;

use super::runner::{Chunk, Runner, argmax};
use crate::Result;
use crate::compression::Plan;
use crate::step::LogitRows;

/// What is timed.
#[derive(Debug, Clone, Copy)]
pub struct Load<'a> {
    /// Prompt of every sequence; its prefill is not timed.
    pub prompt: &'a [u32],
    /// Tokens that each sequence decodes.
    pub tokens: usize,
    /// Rounds; in each, every batch has a turn.
    pub rounds: usize,
}

/// One turn of one batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timing {
    /// Wall-clock time of all decode steps, sampling included.
    pub seconds: f64,
    /// Attention and FFN sublayers run in them.
    pub sublayers_run: [u64; 2],
}

/// Timings, `[batch][round]`, of batches that have one plan a sequence.
///
/// # Errors
/// As [`Runner::step`].
pub fn decode(
    runner: &mut Runner<'_>,
    (batches, load): (&[Vec<Plan>], Load<'_>),
    mut progress: impl FnMut(usize, usize),
) -> Result<Vec<Vec<Timing>>> {
    let mut timings = vec![Vec::new(); batches.len()];
    for round in 0..load.rounds {
        for (index, plans) in batches.iter().enumerate() {
            timings[index].push(one_turn(runner, plans, load)?);
            progress(round * batches.len() + index + 1, load.rounds * batches.len());
        }
    }
    Ok(timings)
}

fn one_turn(runner: &mut Runner<'_>, plans: &[Plan], load: Load<'_>) -> Result<Timing> {
    let mut sequences: Vec<_> =
        plans.iter().enumerate().map(|(slot, plan)| runner.start(slot, plan.clone())).collect();
    let mut next = Vec::new();
    for sequence in &mut sequences {
        runner.step(&mut [Chunk { sequence, tokens: load.prompt, logits: LogitRows::Last }], None)?;
        sequence.state.sublayers_run = [0; 2];
        sequence.state.decode_from = Some(load.prompt.len());
        next.push([argmax(runner.logits(0..1)?)]);
    }
    let begin = Instant::now();
    for _ in 0..load.tokens {
        let chunks = sequences.iter_mut().zip(&next);
        let mut chunks: Vec<_> =
            chunks.map(|(sequence, tokens)| Chunk { sequence, tokens, logits: LogitRows::Last }).collect();
        runner.step(&mut chunks, None)?;
        let logits = runner.logits(0..plans.len())?;
        let vocab = logits.len() / plans.len();
        next = logits.chunks_exact(vocab).map(|logits| [argmax(logits)]).collect();
    }
    let seconds = begin.elapsed().as_secs_f64();
    let run = |half: usize| sequences.iter().map(|sequence| sequence.state.sublayers_run[half]).sum();
    Ok(Timing { seconds, sublayers_run: [run(0), run(1)] })
}
