//! What images put in the place of embeddings.

use crate::Result;
use crate::compression::route::Route;
use crate::kernels::cuda::device::{Buffer, Device, Part};
use crate::kernels::cuda::ops::put_rows;
use crate::step::StepBatch;

/// Rows of the step's images on the device.
#[derive(Debug, Default)]
pub(super) struct Images {
    /// `[count, hidden_size]` f32, then `[count]` u32: the tokens that they stand for.
    buffer: Option<Buffer>,
    count: usize,
}

impl Images {
    /// Brings the rows that `batch` shows, whose tokens lie as `route` says.
    ///
    /// # Errors
    /// [`crate::ZooError::Device`].
    pub(super) fn bring(
        &mut self,
        device: &dyn Device,
        (batch, route): (&StepBatch<'_>, &Route),
        width: usize,
    ) -> Result<()> {
        let (mut rows, mut tokens) = (Vec::new(), Vec::new());
        for (index, row) in batch.rows.iter().enumerate().filter(|(_, row)| !row.images.is_empty()) {
            for within in 0..row.tokens.len() {
                if !row.is_visual(within) {
                    continue;
                }
                match row.image_row(within) {
                    Some(image) => rows.extend_from_slice(image),
                    // It runs nowhere.
                    None => rows.resize(rows.len() + width, 0.0),
                }
                tokens.push((route.start(index) + within) as u32);
            }
        }
        self.count = tokens.len();
        if self.count == 0 {
            return Ok(());
        }
        let bytes = 4 * (rows.len() + self.count);
        if self.buffer.as_ref().is_none_or(|buffer| buffer.len() < bytes) {
            self.buffer = Some(device.alloc(bytes.next_power_of_two())?);
        }
        let [own, places] = self.parts(width)?;
        device.upload(own, bytemuck::cast_slice(&rows))?;
        device.upload(places, bytemuck::cast_slice(&tokens))
    }

    fn parts(&self, width: usize) -> Result<[Part; 2]> {
        let all = self.buffer.as_ref().map_or(Part::NONE, Part::all);
        let rows = 4 * self.count * width;
        Ok([all.slice(0, rows)?, all.slice(rows, 4 * self.count)?])
    }

    /// Puts them into the residual stream.
    ///
    /// # Errors
    /// [`crate::ZooError::Device`].
    pub(super) fn put(&self, device: &dyn Device, (x, width): (Part, usize)) -> Result<()> {
        if self.count == 0 {
            return Ok(());
        }
        let [rows, tokens] = self.parts(width)?;
        put_rows(device, (rows, tokens, self.count), (x, width))
    }
}
