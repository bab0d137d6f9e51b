//! Questions about images, answered under plans that drop image tokens.

use super::runner::{Chunk, Runner, Running, argmax};
use crate::Result;
use crate::compression::{Plan, RowState, Sublayer};
use crate::models::ModelDims;
use crate::step::LogitRows;
use crate::vision::PromptImage;

/// A prompt with images.
#[derive(Debug, Clone)]
pub struct Question {
    /// Its tokens; those of images mean nothing.
    pub tokens: Vec<u32>,
    /// Its images.
    pub images: Vec<PromptImage>,
    /// The plan, compiled for it.
    pub plan: Plan,
}

/// What became of a question.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Tokens sampled greedily, without the one that ended them.
    pub tokens: Vec<u32>,
    /// What its prompt cost.
    pub cost: Cost,
}

/// What a prompt costs, by closed form from what ran.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Cost {
    /// Image tokens that went through to the last layer.
    pub kept: f64,
    /// Image tokens that ran a layer, mean of the layers.
    pub mean_kept: f64,
    /// Bytes of the image tokens' K and V once the prompt is computed.
    pub image_kv_bytes: f64,
    /// Floating-point operations of the decoder's layers for the prompt, two a multiplication: weights, scores and
    /// weighted sums.
    pub flops: f64,
}

/// Answers questions about the same images. Those of plans without filters share the computation of what their prompts
/// have in common; a row has the same bits however its prompt was cut.
///
/// # Errors
/// As [`Runner::step`].
pub fn answer(
    runner: &mut Runner<'_>,
    questions: &[Question],
    (max_tokens, ends): (usize, &[u32]),
) -> Result<Vec<Answer>> {
    let Some(first) = questions.first() else { return Ok(Vec::new()) };
    let shares = questions.iter().all(|question| question.plan.filter().is_none());
    let common = if shares { common_prefix(questions) } else { 0 };
    let mut sequence = start(runner, first);
    if common > 0 {
        run(runner, &mut sequence, (&first.tokens[..common], LogitRows::None))?;
    }
    let mut answers = Vec::new();
    for question in questions {
        if common == 0 {
            sequence = start(runner, question);
        }
        sequence.rewind(common);
        run(runner, &mut sequence, (&question.tokens[common..], LogitRows::Last))?;
        let cost = cost(runner.dims(), question, &sequence.state);
        let mut tokens = Vec::new();
        loop {
            let token = argmax(runner.logits(0..1)?);
            if ends.contains(&token) || tokens.len() == max_tokens {
                break;
            }
            tokens.push(token);
            run(runner, &mut sequence, (&[token], LogitRows::Last))?;
        }
        answers.push(Answer { tokens, cost });
    }
    Ok(answers)
}

/// Computes a question's prompt from an empty cache, up to its logits.
///
/// # Errors
/// As [`Runner::step`].
pub fn prefill(runner: &mut Runner<'_>, question: &Question) -> Result<()> {
    let mut sequence = start(runner, question);
    run(runner, &mut sequence, (&question.tokens, LogitRows::Last))?;
    runner.logits(0..1).map(drop)
}

fn start(runner: &Runner<'_>, question: &Question) -> Running {
    runner.start(0, question.plan.clone()).showing(question.images.clone())
}

fn run(runner: &mut Runner<'_>, sequence: &mut Running, (tokens, logits): (&[u32], LogitRows)) -> Result<()> {
    runner.step(&mut [Chunk { sequence, tokens, logits }], None)
}

/// Tokens that all prompts begin with; each has at least one more.
fn common_prefix(questions: &[Question]) -> usize {
    let Some((first, others)) = questions.split_first() else { return 0 };
    let shared =
        |other: &Question| first.tokens.iter().zip(&other.tokens).take_while(|(a, b)| a == b).count();
    let least = questions.iter().map(|question| question.tokens.len() - 1).min().unwrap_or(0);
    others.iter().map(shared).min().unwrap_or(0).min(least)
}

fn cost(dims: &ModelDims, question: &Question, state: &RowState) -> Cost {
    let (plan, len) = (&question.plan, question.tokens.len());
    let layers = plan.num_layers();
    let images: usize = question.images.iter().map(|image| image.embeddings.num_tokens()).sum();
    let text = len - images;
    let ran = |layer: usize, sublayer: Sublayer| {
        let rows = plan.active_len(layer, sublayer, (0, len)) - plan.absent(0..len).len();
        let Some(outcome) = &state.visual else { return rows };
        // An FFN runs what goes on to the next layer.
        let after = layer + usize::from(sublayer == Sublayer::Ffn);
        text + outcome.ran.get(after).copied().unwrap_or(outcome.survivors.len())
    };
    let mut flops = 0.0;
    for layer in 0..layers {
        for sublayer in [Sublayer::Attention, Sublayer::Ffn] {
            let weights = dims.sublayer_weights[sublayer as usize];
            flops += 2.0 * (ran(layer, sublayer) * weights) as f64;
        }
        let rows = ran(layer, Sublayer::Attention) as f64;
        flops += 4.0 * (dims.num_heads * dims.head_dim) as f64 * rows * (rows + 1.0) / 2.0;
    }
    let slots: usize = (0..layers).map(|layer| plan.kv_len(layer, len, state) - text).sum();
    let slot_bytes = dims.kv_layout(1).page_bytes();
    let visual = plan.visual_use(state).unwrap_or_default();
    Cost {
        kept: visual.kept as f64,
        mean_kept: f64::from(visual.mean),
        image_kv_bytes: (slots * slot_bytes) as f64,
        flops,
    }
}
