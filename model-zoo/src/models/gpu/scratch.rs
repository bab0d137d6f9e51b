//! A step's memory on the device, kept from step to step.

use crate::Result;
use crate::config::DecoderConfig;
use crate::kernels::cuda::attention::decode_scratch;
use crate::kernels::cuda::device::{Buffer, Device, Part};
use crate::kernels::cuda::fused::FUSED_TOKENS;
use crate::kernels::cuda::ops::Heads;
use crate::kernels::cuda::tables::StepTables;

/// Blocks of attention that a multiprocessor runs at once, about.
const BLOCKS: usize = 2;
/// Blocks that share the slots of one token at most.
const MOST_SPLITS: usize = 32;

/// Widths of what a token needs.
#[derive(Debug, Clone, Copy)]
struct Widths {
    hidden: usize,
    queries: usize,
    wide: usize,
    ffn: usize,
    half: usize,
}

/// See the module. `[tokens, width]` each.
#[derive(Debug)]
pub(super) struct Scratch {
    widths: Widths,
    tokens: usize,
    /// The residual stream, f32.
    pub(super) x: Buffer,
    /// A product to be added to it, f32.
    pub(super) sum: Buffer,
    /// What it was before an FFN that tokens may leave out, f32 `[watched, hidden]`.
    pub(super) before: Buffer,
    /// bf16, so all that follow.
    pub(super) normed: Buffer,
    pub(super) q: Buffer,
    pub(super) mixed: Buffer,
    /// Outputs of the joint products.
    pub(super) wide: Buffer,
    pub(super) gated: Buffer,
    /// cos and sin, of global and of windowed layers, f32.
    pub(super) rotary: [Buffer; 2],
    /// Parts of split attention, f32, and its counters.
    pub(super) parts: [Buffer; 2],
    /// f32 `[rows, vocab]`
    pub(super) logits: Buffer,
    /// The stream of steps of few tokens, each value beside a flag.
    pub(super) links: Buffer,
    /// Room for a layer's largest quantized matrix in bf16.
    pub(super) whole: Buffer,
    draws: Buffer,
}

impl Scratch {
    pub(super) fn new(
        (device, whole): (&dyn Device, Buffer),
        config: &DecoderConfig,
        (heads, ffn): ([usize; 2], usize),
    ) -> Result<Self> {
        let d = config.head_dim;
        let widths = Widths {
            hidden: config.hidden_size,
            queries: heads[0] * d,
            wide: ((heads[0] + 2 * heads[1]) * d).max(2 * ffn),
            ffn,
            half: d / 2,
        };
        let none = || device.alloc(0);
        Ok(Self {
            widths,
            tokens: 0,
            x: none()?,
            sum: none()?,
            before: none()?,
            normed: none()?,
            q: none()?,
            mixed: none()?,
            wide: none()?,
            gated: none()?,
            rotary: [none()?, none()?],
            parts: [none()?, none()?],
            logits: none()?,
            links: device.alloc(8 * FUSED_TOKENS * config.hidden_size)?,
            whole,
            draws: none()?,
        })
    }

    /// Makes room for the step. Says whether something moved.
    pub(super) fn fit(
        &mut self,
        device: &dyn Device,
        (tables, heads): (&StepTables, Heads),
        vocab: usize,
    ) -> Result<bool> {
        let tokens = tables.num_tokens();
        let mut moved = false;
        if tokens > self.tokens {
            let n = tokens.next_power_of_two().max(32);
            let Widths { hidden, queries, wide, ffn, half } = self.widths;
            self.x = device.alloc(4 * n * hidden)?;
            self.sum = device.alloc(4 * n * hidden)?;
            self.normed = device.alloc(2 * n * hidden)?;
            self.q = device.alloc(2 * n * queries)?;
            self.mixed = device.alloc(2 * n * queries)?;
            self.wide = device.alloc(2 * n * wide)?;
            self.gated = device.alloc(2 * n * ffn)?;
            self.rotary = [device.alloc(8 * n * half)?, device.alloc(8 * n * half)?];
            self.tokens = n;
            moved = true;
        }
        let watched = 4 * tables.most_watched() * self.widths.hidden;
        if self.before.len() < watched {
            self.before = device.alloc(watched.next_power_of_two())?;
            moved = true;
        }
        // Fewer tokens are split further, and may need more.
        let needs = (1..=tables.most_single()).map(|n| decode_scratch(heads, n, splits(device, heads, n)));
        let need = needs.fold([0; 2], |most, need| [most[0].max(need[0]), most[1].max(need[1])]);
        for (part, need) in self.parts.iter_mut().zip(need) {
            if part.len() < need {
                *part = device.alloc(need.next_power_of_two())?;
                device.fill(Part::all(part), 0)?;
                moved = true;
            }
        }
        if tables.is_uniform() {
            moved |= self.fit_logits(device, tokens * vocab)?;
        }
        Ok(moved)
    }

    /// Makes room for so many logits. Says whether they moved.
    pub(super) fn fit_logits(&mut self, device: &dyn Device, values: usize) -> Result<bool> {
        let moved = self.logits.len() < 4 * values;
        if moved {
            self.logits = device.alloc(4 * values)?;
        }
        Ok(moved)
    }

    /// `len` bytes for draws and their tokens.
    pub(super) fn draws(&mut self, device: &dyn Device, len: usize) -> Result<Part> {
        if self.draws.len() < len {
            self.draws = device.alloc(len.next_power_of_two())?;
        }
        Part::of(&self.draws, 0, len)
    }
}

/// Blocks that share the slots of one token, where `items` tokens run: as many as fill the device.
pub(super) fn splits(device: &dyn Device, heads: Heads, items: usize) -> usize {
    let blocks = items * heads.kv * (heads.queries / heads.kv).div_ceil(16);
    (BLOCKS * device.multiprocessors() as usize).div_ceil(blocks.max(1)).clamp(1, MOST_SPLITS)
}

impl super::GpuDecoder {
    pub(super) fn splits(&self, heads: Heads, items: usize) -> usize {
        splits(&*self.device, heads, items)
    }
}
