//! Filters of image tokens: steps that have some run in parts, between which what the text looks at is brought to the host,
//! and decided there.

use super::{GpuDecoder, Step};
use crate::Result;
use crate::compression::must_drop::step::{Filtering, filterings};
use crate::compression::route::Route;
use crate::kernels::cuda::device::{Buffer, Part};
use crate::kernels::cuda::gaze::{Gazes, Onlookers};
use crate::kernels::cuda::tables::Prefix;
use crate::step::StepBatch;

/// Memory of what is looked at, on the device.
#[derive(Debug, Default)]
pub(super) struct Visual {
    buffer: Option<Buffer>,
}

impl GpuDecoder {
    /// Filters the image tokens of the rows that have a filter where the part of the step that has run ends, and lays out
    /// what follows. Says whether something does.
    pub(super) fn filter(
        &mut self,
        step: &Step,
        (batch, route): (&mut StepBatch<'_>, &mut Route),
        prefixes: &[Option<Prefix>],
    ) -> Result<bool> {
        let Some(layer) = self.tables.filtered() else { return Ok(false) };
        let filterings = filterings(&batch.rows, route.spans(), layer);
        let mut gazes = self.gaze((step, layer), &filterings, route)?.into_iter();
        for filtering in filterings {
            let own: Vec<_> = gazes.by_ref().take(filtering.sights.len()).collect();
            route.retain(filtering.row, layer, filtering.left(&own));
        }
        self.tables.lay_next((batch, route), prefixes)
    }

    /// What the text looks at, of each image of `filterings`, in order: sums and maxima over the text.
    fn gaze(
        &mut self,
        (step, layer): (&Step, usize),
        filterings: &[Filtering<'_>],
        route: &Route,
    ) -> Result<Vec<[Vec<f32>; 2]>> {
        let onlookers = |filtering: &Filtering<'_>| {
            let first = route.spans().iter().find(|span| span.row == filtering.row);
            Onlookers {
                row: filtering.row,
                first: first.map_or(0, |span| span.start),
                text: filtering.text.clone(),
                sights: filtering
                    .sights
                    .iter()
                    .map(|sight| [sight.text.clone(), sight.seen.clone()])
                    .collect(),
            }
        };
        let onlookers: Vec<Onlookers> = filterings.iter().map(onlookers).collect();
        if onlookers.is_empty() {
            return Ok(Vec::new());
        }
        let gazes = Gazes::of(&onlookers);
        let bytes = gazes.bytes(step.heads.queries);
        let buffer = &mut self.visual.buffer;
        if buffer.as_ref().is_none_or(|buffer| buffer.len() < bytes) {
            *buffer = Some(self.device.alloc(bytes.next_power_of_two())?);
        }
        let scratch = buffer.as_ref().map_or(Part::NONE, Part::all);
        gazes.run(&*self.device, &self.attention_of(step, layer)?, scratch)
    }
}
