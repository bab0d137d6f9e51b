//! Quantized tensors on their way to a device: codes stay codes.

use std::ops::Range;

use super::{Linear, Reader, Source};
use crate::Result;
use crate::kernels::cpu::quantize::BLOCK;
use crate::kernels::cuda::quantized::{Format, QuantizedPart};
use crate::models::gpu::Weight;
use crate::weights::RawTensor;
use crate::weights::blocks::BlockFormat;

/// Rows that are packed together: a tile.
const TILE: usize = 16;

/// A tensor that stays as it is.
struct Codes<'a> {
    tensor: RawTensor<'a>,
    stored: BlockFormat,
    format: Format,
    row_bytes: usize,
}

impl<'a> Codes<'a> {
    /// `None` where it is not quantized, or its columns are no whole blocks.
    fn of(tensor: RawTensor<'a>, cols: usize) -> Option<Self> {
        let (stored, format) = (BlockFormat::of(tensor.dtype)?, Format::of(tensor.dtype)?);
        let row_bytes = stored.stored_len(cols);
        let whole = cols.is_multiple_of(stored.stored_columns())
            && tensor.data.len() == tensor.shape.first().copied().unwrap_or(0) * row_bytes;
        whole.then_some(Self { tensor, stored, format, row_bytes })
    }
}

/// Runs of rows that are of one format, in whole tiles; `None` where they are not.
fn parts(rows: &[Source], codes: &[Codes<'_>]) -> Option<Vec<QuantizedPart>> {
    let runs = rows.chunk_by(|a, b| codes[a.0].format == codes[b.0].format);
    let parts: Vec<QuantizedPart> =
        runs.map(|run| QuantizedPart { format: codes[run[0].0].format, rows: run.len() }).collect();
    let (_, first) = parts.split_last()?;
    (parts.len() <= 3 && first.iter().all(|part| part.rows.is_multiple_of(TILE))).then_some(parts)
}

impl Reader<'_> {
    /// The matrix whose rows are `rows` of `tensors` (names and shapes), its columns `columns` of theirs, in codes; `None`
    /// where that cannot be: one of them is not quantized, formats change within a tile, or columns cut a block.
    pub(super) fn quantized(
        &mut self,
        tensors: &[(String, [usize; 2])],
        rows: &[Source],
        columns: &Range<usize>,
    ) -> Result<Option<Linear>> {
        let source = self.source;
        let mut codes = Vec::new();
        for (name, shape) in tensors {
            let tensor = source.tensor(&format!("{name}.weight"))?;
            // Whoever reads it as values says what is wrong with it.
            let Some(found) = Codes::of(tensor, shape[1]).filter(|codes| codes.tensor.shape == *shape) else {
                return Ok(None);
            };
            codes.push(found);
        }
        let whole = columns.start.is_multiple_of(BLOCK) && columns.len().is_multiple_of(BLOCK);
        let Some(parts) = parts(rows, &codes).filter(|_| whole) else { return Ok(None) };
        let cols = columns.len();
        let bytes = pack((rows, &codes), &parts, columns);
        let bias = self.biases(tensors, rows)?;
        let units = self.upload(&bytes)?;
        Ok(Some(Linear { weight: Weight::Quantized { units, parts }, bias, rows: rows.len(), cols }))
    }
}

/// The matrix as it lies on a device, packed by all cores.
fn pack(
    (rows, codes): (&[Source], &[Codes<'_>]),
    parts: &[QuantizedPart],
    columns: &Range<usize>,
) -> Vec<u8> {
    let cols = columns.len();
    let mut bytes = vec![0u8; parts.iter().map(|part| part.format.bytes(part.rows, cols)).sum()];
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (mut rest, mut first) = (bytes.as_mut_slice(), 0);
    for part in parts {
        let (own, others) = rest.split_at_mut(part.format.bytes(part.rows, cols));
        let (tile_bytes, rows) = (part.format.tile_bytes(cols), &rows[first..first + part.rows]);
        let share = rows.len().div_ceil(TILE).div_ceil(threads);
        std::thread::scope(|scope| {
            for (tiles, rows) in own.chunks_mut(share * tile_bytes).zip(rows.chunks(share * TILE)) {
                scope.spawn(move || {
                    for (tile, rows) in tiles.chunks_mut(tile_bytes).zip(rows.chunks(TILE)) {
                        pack_tile((tile, part.format), (rows, codes), columns);
                    }
                });
            }
        });
        (rest, first) = (others, first + part.rows);
    }
    bytes
}

fn pack_tile(
    (tile, format): (&mut [u8], Format),
    (rows, codes): (&[Source], &[Codes<'_>]),
    columns: &Range<usize>,
) {
    for (row, &(tensor, of)) in rows.iter().enumerate() {
        let codes = &codes[tensor];
        let stored = &codes.tensor.data[of * codes.row_bytes..][..codes.row_bytes];
        for index in 0..columns.len() / BLOCK {
            let block = codes.stored.block(stored, columns.start / BLOCK + index);
            format.put(tile, (row, index), &block);
        }
    }
}
