//! Rows whose older keys are pruned (ThinK): the channels of those that are packed, on the device, and the queries of
//! those that are to be.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Weak};

use crate::compression::think::Pruning;
use crate::kernels::cuda::device::{Buffer, Device, Part};
use crate::kernels::cuda::ops::Heads;
use crate::kernels::cuda::pruned::observe;
use crate::kernels::cuda::tables::{Prefix, StepTables};
use crate::kv_cache::{KvLayout, PrunedKeys};
use crate::step::{StepBatch, StepRow};
use crate::{Result, ZooError};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Pruned {
    /// By the address of the host's channels: while a weak reference is here nothing else can have it.
    channels: HashMap<usize, (Weak<PrunedKeys>, Buffer)>,
    /// Σ q² of the rows that are observed, `[rows, layers, num_kv_heads, head_dim]` f32.
    sums: Option<Buffer>,
    /// Layers, and values of each.
    widths: [usize; 2],
}

impl Pruned {
    /// What is packed of each row, whose channels are brought to the device where it does not have them.
    ///
    /// # Errors
    /// [`ZooError::Step`] for channels that do not fit the layout; [`ZooError::Device`].
    pub(super) fn prefixes(
        &mut self,
        device: &dyn Device,
        batch: &StepBatch<'_>,
        layout: KvLayout,
    ) -> Result<Vec<Option<Prefix>>> {
        // What no sequence needs any more goes first.
        self.channels.retain(|_, (keys, _)| keys.strong_count() > 0);
        let of_row = |(index, row): (usize, &StepRow<'_>)| {
            let Some((pruning, keys)) = sealed(row) else { return Ok(None) };
            let slots = pruning.num_packed(layout.block_size);
            if slots == 0 {
                return Ok(None);
            }
            let wrong = |what: String| ZooError::Step(format!("row {index}: {what}"));
            check(keys, row, layout).map_err(wrong)?;
            let channels = match self.channels.entry(Arc::as_ptr(keys).addr()) {
                Entry::Occupied(own) => own.into_mut(),
                // There are thousands of them, which do not change: they are looked at when they are brought.
                Entry::Vacant(room) => {
                    check_channels(keys, layout).map_err(wrong)?;
                    room.insert((Arc::downgrade(keys), upload_channels(device, keys, layout)?))
                }
            };
            Ok(Some(Prefix::new(slots, (keys.kept, Part::all(&channels.1)), layout)))
        };
        batch.rows.iter().enumerate().map(of_row).collect()
    }

    /// Makes room for the sums of `rows` rows of a model of so many layers, zeros.
    ///
    /// # Errors
    /// [`ZooError::Device`].
    pub(super) fn clear_sums(
        &mut self,
        device: &dyn Device,
        (rows, layers): (usize, usize),
        layout: KvLayout,
    ) -> Result<()> {
        self.widths = [layers, layout.num_kv_heads * layout.head_dim];
        let bytes = rows * self.row_bytes();
        if bytes == 0 {
            return Ok(());
        }
        if self.sums.as_ref().is_none_or(|sums| sums.len() < bytes) {
            self.sums = Some(device.alloc(bytes)?);
        }
        device.fill(self.sums_of(rows)?, 0)
    }

    fn row_bytes(&self) -> usize {
        4 * self.widths[0] * self.widths[1]
    }

    fn sums_of(&self, rows: usize) -> Result<Part> {
        let missing = || ZooError::Device("no room for sums of queries".into());
        self.sums.as_ref().map(Part::all).ok_or_else(missing)?.slice(0, rows * self.row_bytes())
    }

    /// Looks at the queries of `layer` that choose channels.
    ///
    /// # Errors
    /// [`ZooError::Device`].
    pub(super) fn observe(
        &self,
        device: &dyn Device,
        (q, heads): (Part, Heads),
        (tables, layer): (&StepTables, usize),
    ) -> Result<()> {
        let items = tables.observed_in(layer)?;
        if items.1 == 0 {
            return Ok(());
        }
        let sums = self.sums_of(tables.observers().len())?;
        observe(device, (q, heads), items, (sums, layer, self.widths[0]))
    }

    /// Adds what the step has seen to the rows' sums.
    ///
    /// # Errors
    /// [`ZooError::Device`].
    pub(super) fn take_sums(
        &self,
        device: &dyn Device,
        observers: &[usize],
        batch: &mut StepBatch<'_>,
    ) -> Result<()> {
        if observers.is_empty() {
            return Ok(());
        }
        let width = self.widths[0] * self.widths[1];
        let mut seen = vec![0f32; observers.len() * width];
        device.download(self.sums_of(observers.len())?, bytemuck::cast_slice_mut(&mut seen))?;
        for (seen, &row) in seen.chunks_exact(width).zip(observers) {
            let sums = &mut batch.rows[row].state.pruning.query_sums;
            sums.resize(width, 0.0);
            sums.iter_mut().zip(seen).for_each(|(sum, seen)| *sum += seen);
        }
        Ok(())
    }
}

/// What a row's plan prunes, and the channels that it kept, once it is sealed.
fn sealed<'a>(row: &'a StepRow<'_>) -> Option<(&'a Pruning, &'a Arc<PrunedKeys>)> {
    let keys = row.state.pruning.keys.as_ref().filter(|_| row.state.pruning.sealed);
    row.plan.pruning().zip(keys)
}

/// What of the keys does not fit a row, as a sentence's end.
fn check(keys: &PrunedKeys, row: &StepRow<'_>, layout: KvLayout) -> Result<(), String> {
    let all = layout.num_kv_heads * keys.kept;
    let fits = |(layer, &len): (usize, &usize)| {
        len == 0 || keys.channels.get(layer).is_some_and(|channels| channels.len() == all)
    };
    if row.kv_len.iter().enumerate().all(fits) { Ok(()) } else { Err(OF_ANOTHER.into()) }
}

/// What of their channels no row can have, as a sentence's end.
fn check_channels(keys: &PrunedKeys, layout: KvLayout) -> Result<(), String> {
    let head_dim = layout.head_dim;
    if !keys.kept.is_multiple_of(8) || keys.kept > head_dim {
        return Err(format!("{} channels of {head_dim} are no kept ones", keys.kept));
    }
    let outside = |&channel: &u8| usize::from(channel) >= head_dim;
    if keys.channels.iter().flatten().any(outside) { Err(OF_ANOTHER.into()) } else { Ok(()) }
}

const OF_ANOTHER: &str = "the channels of its packed keys are not of this model";

/// The channels of all layers, `[layers, num_kv_heads, kept]`; those of layers that have none are not looked at.
///
/// # Errors
/// [`ZooError::Device`].
pub(super) fn upload_channels(device: &dyn Device, keys: &PrunedKeys, layout: KvLayout) -> Result<Buffer> {
    let width = layout.num_kv_heads * keys.kept;
    let mut bytes = vec![0u8; keys.channels.len() * width];
    for (own, channels) in bytes.chunks_exact_mut(width).zip(&keys.channels) {
        let len = channels.len().min(width);
        own[..len].copy_from_slice(&channels[..len]);
    }
    let buffer = device.alloc(bytes.len())?;
    device.upload(Part::all(&buffer), &bytes)?;
    Ok(buffer)
}
