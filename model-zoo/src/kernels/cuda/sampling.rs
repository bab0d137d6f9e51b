//! Choosing tokens on the device; see [`super::ops`] for what is checked where.

use super::device::{Device, Part};
use super::ops::{need, run};
use super::params::{DrawParams, SampleParams};
use crate::Result;
use crate::models::Draw;

/// Threads of a block, and tokens that it gathers in its memory.
const THREADS: usize = 1024;
const HEAVIER: usize = 4096;

/// Bytes of `draws` on the device.
pub fn draw_bytes(draws: &[Draw]) -> Vec<u8> {
    let params = draws.iter().map(|draw| DrawParams {
        row: draw.row as u32,
        top_k: draw.top_k,
        temperature: draw.temperature,
        top_p: draw.top_p,
        min_p: draw.min_p,
        uniform: draw.uniform,
    });
    params.flat_map(|params| bytemuck::bytes_of(&params).to_vec()).collect()
}

/// Draws `count` tokens from `logits`, `[rows, vocab]` f32, by the `draws` uploaded from [`draw_bytes`]; u32::MAX
/// where logits are not numbers.
///
/// # Errors
/// [`crate::ZooError::Device`].
pub fn sample(
    device: &dyn Device,
    (logits, vocab): (Part, usize),
    draws: (Part, &[Draw]),
    tokens: Part,
) -> Result<()> {
    let (part, draws) = draws;
    let rows = draws.iter().map(|draw| draw.row + 1).max().unwrap_or(0);
    need("logits", logits, 4 * rows * vocab)?;
    need("draws", part, size_of::<DrawParams>() * draws.len())?;
    need("tokens", tokens, 4 * draws.len())?;
    let (logits, vocab) = (logits.pointer(), vocab as u32);
    let params = SampleParams { logits, draws: part.pointer(), tokens: tokens.pointer(), vocab, pad: 0 };
    run(
        device,
        ("sample", THREADS as u32, 4 * (64 + 2 * THREADS + 2 * HEAVIER)),
        [draws.len() as u32, 1, 1],
        &params,
    )
}
