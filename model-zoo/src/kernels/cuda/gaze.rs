//! How much text tokens look at the slots of images (see `gaze.cuh`), on a device.

use std::ops::Range;

use super::attention::Attention;
use super::device::{Device, Part};
use super::ops::{Places, need, run};
use super::params::GazeParams;
use crate::Result;

/// Words of `Onlookers` in `gaze.cuh`.
const WORDS: usize = 8;
/// Warps of a block.
const WARPS: usize = 4;

/// Tokens of a row that look at slots of its images. *Places* count the row's tokens that run the attention, whose slots
/// follow those that it held before the step.
#[derive(Debug, Clone)]
pub struct Onlookers {
    /// Its row of the step.
    pub row: usize,
    /// Its first token, among those that run the attention.
    pub first: usize,
    /// Places of the tokens that look at something, ascending.
    pub text: Vec<usize>,
    /// Of each image: which of `text` look at it, and the places of its tokens, which all come before theirs.
    pub sights: Vec<[Range<usize>; 2]>,
}

/// What rows look at, as the kernels read it.
#[derive(Debug, Default)]
pub struct Gazes {
    /// The rows, the images, then the places of the text.
    words: Vec<u32>,
    /// Rows and images.
    counts: [usize; 2],
    /// Tokens that look in all, in a row at most, and at an image at most.
    text: [usize; 3],
    /// Tokens of images in all, and of one at most.
    seen: [usize; 2],
    /// Attention weights of all images.
    weights: usize,
    /// Tokens of the step that have to have a query.
    tokens: usize,
    /// Where the sums of each image lie.
    found: Vec<Range<usize>>,
}

impl Gazes {
    /// Lays out what `rows` look at.
    pub fn of(rows: &[Onlookers]) -> Self {
        let mut gazes = Self::default();
        let (mut of_rows, mut of_images, mut places) = (Vec::new(), Vec::new(), Vec::new());
        for Onlookers { row, first, text, sights } in rows {
            let at = places.len();
            of_rows.push([*first, *row, at, text.len(), 0, 0, 0, 0]);
            for [looking, seen] in sights {
                let found = gazes.seen[0]..gazes.seen[0] + seen.len();
                let place = [gazes.weights, found.start];
                let [text, slots] = [at + looking.start, seen.start];
                of_images.push([*first, *row, text, looking.len(), slots, seen.len(), place[0], place[1]]);
                gazes.weights += looking.len() * seen.len();
                gazes.seen = [found.end, gazes.seen[1].max(seen.len())];
                gazes.text[2] = gazes.text[2].max(looking.len());
                gazes.found.push(found);
            }
            gazes.tokens = gazes.tokens.max(text.last().map_or(0, |last| first + last + 1));
            gazes.text[1] = gazes.text[1].max(text.len());
            places.extend_from_slice(text);
        }
        gazes.text[0] = places.len();
        gazes.counts = [of_rows.len(), of_images.len()];
        let lists = of_rows.as_flattened().iter().chain(of_images.as_flattened()).chain(&places);
        gazes.words = lists.map(|&word| word as u32).collect();
        gazes
    }

    /// Bytes that [`Gazes::run`] needs, where `heads` query heads are of this device.
    pub fn bytes(&self, heads: usize) -> usize {
        4 * self.sizes(heads).iter().sum::<usize>()
    }

    /// Words, logs of sums of exponentials, attention weights, and what is found.
    fn sizes(&self, heads: usize) -> [usize; 4] {
        [self.words.len(), self.text[0] * heads, self.weights, 2 * self.seen[0]]
    }

    /// Attention weights, means over the heads of all devices, of each image's tokens: `[sums over the tokens that look,
    /// maxima of one of them]`. `attention` is that of the layer, whose queries and keys are in their places, and `scratch`
    /// has [`Gazes::bytes`]. Waits for the device.
    ///
    /// # Errors
    /// [`crate::ZooError::Device`].
    pub fn run(
        &self,
        device: &dyn Device,
        attention: &Attention,
        scratch: Part,
    ) -> Result<Vec<[Vec<f32>; 2]>> {
        let heads = attention.places.heads.queries;
        let mut at = 0;
        let mut parts = [Part::NONE; 4];
        for (part, size) in parts.iter_mut().zip(self.sizes(heads)) {
            *part = scratch.slice(at, 4 * size)?;
            at += 4 * size;
        }
        let [words, lse, weights, found] = parts;
        device.upload(words, bytemuck::cast_slice(&self.words))?;
        self.launch(device, attention, [words, lse, weights, found])?;
        let mut values = vec![0f32; 2 * self.seen[0]];
        device.download(found, bytemuck::cast_slice_mut(&mut values))?;
        let (sums, maxima) = values.split_at(self.seen[0]);
        Ok(self.found.iter().map(|own| [sums, maxima].map(|all| all[own.clone()].to_vec())).collect())
    }

    fn launch(&self, device: &dyn Device, attention: &Attention, parts: [Part; 4]) -> Result<()> {
        let [words, _, weights, _] = parts;
        let Places { q, heads, .. } = attention.places;
        need("queries", q, 2 * self.tokens * heads.queries * heads.dim)?;
        let images = words.slice(4 * WORDS * self.counts[0], 4 * WORDS * self.counts[1])?;
        let places = words.slice(4 * WORDS * (self.counts[0] + self.counts[1]), 4 * self.text[0])?;
        let [rows, images] = [words, images].map(|own| params(device, attention, (own, places), parts));
        let lse =
            ["gaze_lse_16", "gaze_lse_32", "gaze_lse_64", "gaze_lse_96", "gaze_lse_128", "gaze_lse_256"];
        let tiles = |count: usize| count.div_ceil(16);
        let grid = [tiles(self.text[1]), heads.queries, self.counts[0]].map(|blocks| blocks as u32);
        run(device, (attention.kernel(lse)?, 32 * WARPS as u32, 8 * 16 * WARPS), grid, &rows)?;
        let each = [
            "gaze_weights_16",
            "gaze_weights_32",
            "gaze_weights_64",
            "gaze_weights_96",
            "gaze_weights_128",
            "gaze_weights_256",
        ];
        // Tokens that begin in the middle of a unit of sixteen slots are in one unit more.
        let grid = [tiles(self.seen[1]) + 1, tiles(self.text[2]).div_ceil(WARPS), self.counts[1]];
        run(device, (attention.kernel(each)?, 32 * WARPS as u32, 0), grid.map(|n| n as u32), &images)?;
        device.all_reduce(weights)?;
        let grid = [self.seen[1].div_ceil(128) as u32, 1, self.counts[1] as u32];
        run(device, ("gaze_find", 128, 0), grid, &images)
    }
}

fn params(
    device: &dyn Device,
    attention: &Attention,
    (onlookers, places): (Part, Part),
    [_, lse, weights, found]: [Part; 4],
) -> GazeParams {
    let Places { q, pages, kv_len, starts, tables, heads, .. } = attention.places;
    GazeParams {
        q: q.pointer(),
        pages: pages.pointer(),
        kv_len: kv_len.pointer(),
        starts: starts.pointer(),
        tables: tables.pointer(),
        onlookers: onlookers.pointer(),
        places: places.pointer(),
        lse: lse.pointer(),
        weights: weights.pointer(),
        sums: found.pointer(),
        maxima: found.pointer() + found.len() as u64 / 2,
        heads: heads.queries as u32,
        kv_heads: heads.kv as u32,
        block_size: heads.block_size as u32,
        window: attention.window.unwrap_or(0) as u32,
        scale: attention.scale * std::f32::consts::LOG2_E,
        share: 1.0 / (heads.queries * device.shard().size) as f32,
    }
}
