//! Whole products: which tokens go which way, and how the work is shared between threads.

use std::ops::Range;

use super::columns::{Columns, WIDTH};
use super::reconstruct::{Block, Factors, quantize};
use super::{Level, signed};
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::packed::{GROUP, RowGroup, Write};
use crate::kernels::cpu::pool::{Disjoint, Pool};
use crate::kernels::cpu::quantize::{BLOCK, QuantizedRows};

/// Tokens that share a pass over the signs: bounds the memory of their columns.
const TILE: usize = 16;

/// One matrix's part in [`matmul_many`].
#[derive(Debug)]
pub struct StackProduct<'a> {
    /// Its levels, all of one shape and rank; at least as many as any token uses.
    pub levels: &'a [Level],
    /// For each token, the levels that it is served with, at least 1.
    pub used: &'a [usize],
    /// What happens with the result.
    pub write: Write,
    /// `[n, rows]`
    pub out: &'a mut [f32],
}

/// The rows of activations that several matrices are applied to.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// `[n, channels]`
    pub x: &'a [f32],
    /// Channels of a row.
    pub channels: usize,
    /// Tokens that take the way of signed sums, those with most levels first.
    pub few: &'a [usize],
    /// Tokens that take the way of reconstruction, in order.
    pub many: &'a [usize],
}

/// A matrix's shape, levels and result while threads share it.
struct Part<'a, 'b> {
    levels: &'a [Level],
    used: &'a [usize],
    write: Write,
    out: Disjoint<'b, f32>,
}

/// The columns of one level of one matrix, for the first `tokens` of a tile of tokens.
struct Segment {
    part: usize,
    level: usize,
    tokens: usize,
    /// `tokens · rank`
    columns: usize,
    /// Their tiles among those of all segments.
    tiles: Range<usize>,
}

impl Part<'_, '_> {
    fn rows(&self) -> usize {
        self.levels[0].shape().rows
    }

    fn groups(&self) -> usize {
        self.levels[0].shape().groups()
    }

    /// Stores or adds a token's sums of a group.
    ///
    /// # Safety
    /// No other thread has the same token and group of this matrix.
    unsafe fn put(&self, (token, group): (usize, usize), sums: &[f32; GROUP]) {
        let lanes = GROUP.min(self.rows() - group * GROUP);
        // SAFETY: by the caller's promise.
        let out = unsafe { self.out.part(token * self.rows() + group * GROUP, lanes) };
        match self.write {
            Write::Store => out.copy_from_slice(&sums[..lanes]),
            Write::Add => out.iter_mut().zip(sums).for_each(|(o, s)| *o += s),
        }
    }
}

/// Multiplies rows with several matrices. `quantized` are all of `rows.x`, where any goes the way of
/// reconstruction; `scratch` keeps memory between calls.
pub fn matmul_many(
    (pool, isa): (&Pool, Isa),
    rows: Rows<'_>,
    (quantized, scratch): (&QuantizedRows, &mut Columns),
    products: &mut [StackProduct<'_>],
) {
    let tokens = rows.x.len() / rows.channels;
    for p in &*products {
        let shape = p.levels[0].shape();
        assert!(p.levels.iter().all(|level| level.shape() == shape) && shape.cols == rows.channels);
        assert!(p.used.len() == tokens && p.out.len() == tokens * shape.rows);
        assert!(p.used.iter().all(|used| (1..=p.levels.len()).contains(used)));
    }
    let parts = products.iter_mut().map(|p| {
        let StackProduct { levels, used, write, out } = p;
        Part { levels, used, write: *write, out: Disjoint::new(out) }
    });
    let parts: Vec<_> = parts.collect();
    for tile in rows.few.chunks(TILE) {
        signed_tile((pool, isa), rows, (tile, scratch), &parts);
    }
    if !rows.many.is_empty() {
        assert!(quantized.rows() == tokens && quantized.channels() == rows.channels);
        reconstructed((pool, isa), (rows.many, quantized), &parts);
    }
}

/// Runs `body(part, group)` for every group of rows of every matrix, in parallel. `body` gets memory of `new` that
/// is kept from group to group.
fn for_each_group<T>(
    pool: &Pool,
    parts: &[Part<'_, '_>],
    new: impl Fn() -> T + Sync,
    body: impl Fn(&mut T, usize, usize) + Sync,
) {
    let groups: usize = parts.iter().map(Part::groups).sum();
    let per_chunk = groups.div_ceil(8 * pool.threads()).max(1);
    pool.run(groups.div_ceil(per_chunk), |chunk| {
        let mut memory = new();
        for index in chunk * per_chunk..((chunk + 1) * per_chunk).min(groups) {
            let mut group = index;
            for (part, matrix) in parts.iter().enumerate() {
                if group < matrix.groups() {
                    body(&mut memory, part, group);
                    break;
                }
                group -= matrix.groups();
            }
        }
    });
}

/// The columns that a tile of tokens needs: matrix by matrix, level by level, token by token.
fn segments(tile: &[usize], parts: &[Part<'_, '_>]) -> Vec<Segment> {
    let mut segments = Vec::new();
    let mut first = 0;
    for (index, part) in parts.iter().enumerate() {
        for (level, data) in part.levels.iter().enumerate() {
            let tokens = tile.iter().take_while(|&&token| part.used[token] > level).count();
            if tokens == 0 {
                break;
            }
            let columns = tokens * data.shape().rank;
            let tiles = first..first + columns.div_ceil(WIDTH);
            first = tiles.end;
            segments.push(Segment { part: index, level, tokens, columns, tiles });
        }
    }
    segments
}

fn signed_tile(
    (pool, isa): (&Pool, Isa),
    rows: Rows<'_>,
    (tile, scratch): (&[usize], &mut Columns),
    parts: &[Part<'_, '_>],
) {
    let segments = segments(tile, parts);
    let count = segments.last().map_or(0, |segment| segment.tiles.end);
    let channels = rows.channels;
    scratch.fill((pool, isa), [count, channels], |index, i| {
        let segment = &segments[segments.partition_point(|segment| segment.tiles.end <= index)];
        let level = &parts[segment.part].levels[segment.level];
        let (column, rank) = ((index - segment.tiles.start) * WIDTH + i, level.shape().rank);
        let (token, c) = (*tile.get(column / rank).filter(|_| column < segment.columns)?, column % rank);
        Some((
            &rows.x[token * channels..(token + 1) * channels],
            &level.right()[c * channels..(c + 1) * channels],
        ))
    });
    let columns = &*scratch;
    for_each_group(
        pool,
        parts,
        || [[0f32; GROUP]; TILE],
        |sums, part, group| {
            sums.fill([0.0; GROUP]);
            for segment in segments.iter().filter(|segment| segment.part == part) {
                let level = parts[part].levels[segment.level].group(group);
                let sums = &mut sums[..segment.tokens];
                let tiles = columns.tiles(segment.tiles.clone());
                signed::accumulate(isa, level, (tiles, segment.columns), sums);
            }
            for (&token, sums) in tile.iter().zip(&*sums) {
                // SAFETY: a (matrix, token, group) triple is computed by one chunk.
                unsafe { parts[part].put((token, group), sums) };
            }
        },
    );
}

/// The tokens that use so many levels, as ranges.
struct Served {
    levels: usize,
    tokens: Vec<Range<usize>>,
}

/// Tokens by the levels that they use, fewest first.
fn by_levels(many: &[usize], used: &[usize]) -> Vec<Served> {
    let mut served: Vec<Served> = Vec::new();
    for &token in many {
        let at = served.partition_point(|other| other.levels < used[token]);
        if served.get(at).is_none_or(|other| other.levels != used[token]) {
            served.insert(at, Served { levels: used[token], tokens: Vec::new() });
        }
        match served[at].tokens.last_mut() {
            Some(last) if last.end == token => last.end += 1,
            _ => served[at].tokens.push(token..token + 1),
        }
    }
    served
}

fn reconstructed(
    (pool, isa): (&Pool, Isa),
    (many, quantized): (&[usize], &QuantizedRows),
    parts: &[Part<'_, '_>],
) {
    let served: Vec<_> = parts.iter().map(|part| by_levels(many, part.used)).collect();
    let most = served.iter().map(Vec::len).max().unwrap_or(0);
    let cols = quantized.channels();
    let new = || (Factors::new(), (0..most).map(|_| RowGroup::new(cols)).collect::<Vec<_>>());
    for_each_group(pool, parts, new, |(factors, memory), part, group| {
        let (matrix, served) = (&parts[part], &served[part]);
        factors.load(isa, &matrix.levels[..served.last().map_or(0, |last| last.levels)], group);
        for b in 0..cols / BLOCK {
            let mut block: Block = [[0.0; GROUP]; BLOCK];
            let mut done = 0;
            for (served, rows) in served.iter().zip(memory.iter_mut()) {
                for index in done..served.levels {
                    factors.add_level(isa, (&matrix.levels[index], index), (group, b), &mut block);
                }
                done = served.levels;
                let (values, scales) = rows.block_mut(b);
                quantize(isa, &block, values, scales);
            }
        }
        for (served, rows) in served.iter().zip(memory.iter()) {
            for tokens in &served.tokens {
                rows.product(isa, quantized, tokens.clone(), |token, sums| {
                    // SAFETY: a (matrix, token, group) triple is computed by one chunk.
                    unsafe { matrix.put((token, group), sums) };
                });
            }
        }
    });
}
