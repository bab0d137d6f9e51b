//! The pages of a step's rows, layer by layer, on the device.
//!
//! From step to step few of them change: a row takes a page every so many tokens, or leaves. So the host keeps what the
//! device has, and brings only what differs. Lists have room to grow, that others need not move when one does.

use std::ops::Range;

use super::device::{Buffer, Device, Part};
use crate::step::{StepBatch, StepRow};
use crate::{Result, ZooError};

/// Pages by which a list's room grows.
const ROOM: usize = 8;
/// Words between two changes that are brought together: about what a copy of its own costs.
const GAP: usize = 1024;
/// Copies of a step, at most; beyond them one brings all.
const MOST_COPIES: usize = 24;
/// No page: of the host's words whose counterpart is not known.
const UNKNOWN: u32 = u32::MAX;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct PageTables {
    /// What the device has, but for `changed`.
    words: Vec<u32>,
    /// Ranges of words that the device does not have yet, in rising order.
    changed: Vec<Range<usize>>,
    /// Where the list of each row and layer begins, row by row.
    starts: Vec<u32>,
    /// Pages of the pool that `words` were checked against.
    num_pages: usize,
    buffer: Option<Buffer>,
}

/// Pages of a row that a step of `slots` slots reads and writes, `saved` pages fewer than slots take.
fn needed<'a>(
    row: &StepRow<'a>,
    layer: usize,
    [slots, saved]: [usize; 2],
    block_size: usize,
) -> Result<&'a [u32]> {
    let pages = &row.block_tables[layer];
    let count = slots.div_ceil(block_size).saturating_sub(saved);
    pages
        .get(..count)
        .ok_or_else(|| ZooError::Step(format!("layer {layer} has {} pages for {slots} slots", pages.len())))
}

/// Makes room for `bytes` bytes. Says whether the memory moved: nobody reads the old one any more then.
///
/// # Errors
/// [`ZooError::Device`].
pub(super) fn make_room(buffer: &mut Option<Buffer>, bytes: usize, device: &dyn Device) -> Result<bool> {
    let moves = buffer.as_ref().is_none_or(|buffer| buffer.len() < bytes);
    if moves {
        device.synchronize()?;
        *buffer = Some(device.alloc(bytes.next_power_of_two().max(1 << 16))?);
    }
    Ok(moves)
}

impl PageTables {
    /// Lays out the pages of all rows. `slots(row, layer)` are those that the row of this index has in a layer after the
    /// step, and the pages that packing them saves.
    ///
    /// # Errors
    /// [`ZooError::Step`] when a row has too few pages, or one outside the pool's `num_pages`.
    pub(super) fn lay(
        &mut self,
        batch: &StepBatch<'_>,
        (num_pages, block_size): (usize, usize),
        slots: impl Fn(usize, usize) -> [usize; 2],
    ) -> Result<()> {
        if num_pages < self.num_pages {
            self.words.fill(UNKNOWN);
        }
        self.num_pages = num_pages;
        self.starts.clear();
        let mut at = 0;
        for (index, row) in batch.rows.iter().enumerate() {
            for layer in 0..row.block_tables.len() {
                let pages = needed(row, layer, slots(index, layer), block_size)
                    .and_then(|pages| self.place(at, pages).map(|()| pages.len()));
                let pages = pages.map_err(|error| match error {
                    ZooError::Step(what) => ZooError::Step(format!("row {index}: {what}")),
                    other => other,
                })?;
                self.starts.push(at as u32);
                at += pages.next_multiple_of(ROOM);
            }
        }
        Ok(())
    }

    /// Puts `pages` at `at`, and notes the change where there is one.
    fn place(&mut self, at: usize, pages: &[u32]) -> Result<()> {
        let end = at + pages.len();
        if self.words.len() < end {
            self.words.resize(end.next_multiple_of(ROOM), UNKNOWN);
        }
        if self.words[at..end] == *pages {
            return Ok(());
        }
        if let Some(page) = pages.iter().find(|&&page| page as usize >= self.num_pages) {
            return Err(ZooError::Step(format!("page {page} is outside the pool")));
        }
        self.words[at..end].copy_from_slice(pages);
        match self.changed.last_mut() {
            Some(last) if last.start <= at && at <= last.end + GAP => last.end = last.end.max(end),
            _ => self.changed.push(at..end),
        }
        Ok(())
    }

    /// Brings what changed. Says whether the device's memory moved.
    ///
    /// # Errors
    /// [`ZooError::Device`].
    pub(super) fn upload(&mut self, device: &dyn Device) -> Result<bool> {
        let moved = make_room(&mut self.buffer, 4 * self.words.len(), device)?;
        if moved || self.changed.len() > MOST_COPIES {
            self.changed.clear();
            self.changed.push(0..self.words.len());
        }
        let all = self.part()?;
        for range in self.changed.drain(..) {
            let part = all.slice(4 * range.start, 4 * range.len())?;
            device.upload(part, bytemuck::cast_slice(&self.words[range]))?;
        }
        Ok(moved)
    }

    /// All of them, on the device.
    ///
    /// # Errors
    /// [`ZooError::Device`] before the first upload.
    pub(super) fn part(&self) -> Result<Part> {
        let missing = || ZooError::Device("no step was uploaded".into());
        self.buffer.as_ref().map(Part::all).ok_or_else(missing)
    }

    /// Where the list of a layer of a row begins; `layers` of a row.
    pub(super) fn start(&self, (row, layer): (usize, usize), layers: usize) -> u32 {
        self.starts[row * layers + layer]
    }
}
