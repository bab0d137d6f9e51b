//! Stages 2 and 3: which image tokens go on after a layer, and what follows from it for the KV.

use std::ops::Range;
use std::sync::Arc;

/// What of a request's images goes on while its prompt is computed. Compiled once; what it decides is the row's
/// [`VisualOutcome`].
#[derive(Debug, Clone, PartialEq)]
pub struct VisualFilter {
    /// Token of the prompt at which the first image begins: from there on the prompt runs in one step.
    pub first: usize,
    /// Tokens of the prompt.
    pub prompt_len: usize,
    /// Layers after whose attention tokens are dropped, ascending; not empty.
    pub layers: Vec<usize>,
    /// Share of the text's attention below which a token may be dropped.
    pub alpha: f32,
    /// Attention of one text token below which a token may be dropped.
    pub beta: f32,
    /// Tokens of an image that go on at most, in the end.
    pub keep: Option<usize>,
    /// The images, in order.
    pub images: Vec<FilteredImage>,
}

/// An image that is filtered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilteredImage {
    /// Its tokens of the prompt, those that never run included.
    pub range: Range<usize>,
    /// Tokens of the prompt that run, ascending.
    pub tokens: Vec<usize>,
    /// `[tokens]`: place among the key tokens, the one that is looked at most first; `None` for others.
    pub keys: Vec<Option<usize>>,
}

/// What became of a row's image tokens when its prompt was computed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VisualOutcome {
    /// `[layer]`: KV slots that the prompt has less than without filters.
    pub dropped: Vec<usize>,
    /// `[layer]`: image tokens that ran its attention.
    pub ran: Vec<usize>,
    /// Image tokens that went on to the end, by their place in the prompt.
    pub survivors: Vec<usize>,
}

/// What the text after an image looks at, over some of the image's tokens.
#[derive(Debug, Clone, Copy)]
pub struct Gaze<'a> {
    /// Attention, mean of the heads, summed over the text tokens.
    pub sums: &'a [f32],
    /// Attention, mean of the heads, of the text token that looks at it most.
    pub maxima: &'a [f32],
}

impl VisualFilter {
    /// Index of the filter at `layer`.
    pub fn point(&self, layer: usize) -> Option<usize> {
        self.layers.binary_search(&layer).ok()
    }

    /// Tokens of an image of `num_tokens` that go on after filter `point` at most.
    pub fn cap(&self, point: usize, num_tokens: usize) -> usize {
        // Attention of early layers chooses coarsely, so that later ones still have a choice.
        let twice = if point + 1 == self.layers.len() { 2 } else { [6, 3].get(point).copied().unwrap_or(2) };
        self.keep.map_or(num_tokens, |keep| num_tokens.min(keep.saturating_mul(twice).div_ceil(2)))
    }

    /// Whether stage 3 leaves the KV of `layer` nothing but what went on to the end: the layers from the first filter
    /// to the last, and with a cap those before them too.
    pub fn compacts(&self, layer: usize) -> bool {
        let first = if self.keep.is_some() { Some(&0) } else { self.layers.first() };
        first.is_some_and(|&first| first <= layer) && self.layers.last().is_some_and(|&last| layer <= last)
    }

    /// Which of `alive`, tokens of the prompt that belong to `image`, go on after filter `point`.
    pub fn select(
        &self,
        point: usize,
        (image, alive): (&FilteredImage, &[usize]),
        gaze: Gaze<'_>,
    ) -> Vec<bool> {
        let total: f32 = gaze.sums.iter().sum();
        let key = |token: usize| image.tokens.binary_search(&token).ok().and_then(|index| image.keys[index]);
        let keys: Vec<Option<usize>> = alive.iter().map(|&token| key(token)).collect();
        let mut kept: Vec<bool> = (0..alive.len())
            .map(|j| {
                let unseen = gaze.sums[j] < self.alpha * total && gaze.maxima[j] < self.beta;
                keys[j].is_some() || !unseen
            })
            .collect();
        let cap = self.cap(point, image.tokens.len());
        if kept.iter().filter(|&&kept| kept).count() > cap {
            // Key tokens first, as far as half of the places go; then what is looked at most.
            let reserved = |j: usize| keys[j].filter(|&rank| rank < cap.div_ceil(2));
            let mut order: Vec<usize> = (0..alive.len()).filter(|&j| kept[j]).collect();
            order.sort_by(|&a, &b| {
                let rank = |j| reserved(j).unwrap_or(usize::MAX);
                rank(a).cmp(&rank(b)).then(gaze.sums[b].total_cmp(&gaze.sums[a])).then(a.cmp(&b))
            });
            order[cap..].iter().for_each(|&j| kept[j] = false);
        }
        kept
    }

    /// Image tokens that do not run `layer` at least, because of the caps of the filters before it.
    pub fn excess_before(&self, layer: usize) -> usize {
        let Some(point) = self.layers.partition_point(|&filter| filter < layer).checked_sub(1) else {
            return 0;
        };
        let excess = |image: &FilteredImage| image.tokens.len() - self.cap(point, image.tokens.len());
        self.images.iter().map(excess).sum()
    }

    /// What the page accounting has to know, for a model of `num_layers`.
    pub(in crate::compression) fn demand(&self, num_layers: usize) -> FilterDemand {
        let during: Vec<usize> = (0..num_layers).map(|layer| self.excess_before(layer)).collect();
        let finally = self.excess_before(num_layers);
        let after = (0..num_layers).map(|layer| if self.compacts(layer) { finally } else { during[layer] });
        FilterDemand {
            first: self.first,
            prompt_len: self.prompt_len,
            after: after.collect(),
            during: during.into(),
        }
    }
}

/// What the page accounting knows of a filter: what runs whole, and how many slots it drops at least.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilterDemand {
    pub(in crate::compression) first: usize,
    pub(in crate::compression) prompt_len: usize,
    /// `[layer]`: slots less than without filters, at least, while the prompt is computed.
    pub(in crate::compression) during: Arc<[usize]>,
    /// `[layer]`: the same once it is.
    pub(in crate::compression) after: Arc<[usize]>,
}

impl FilterDemand {
    /// Slots of `layer` that are dropped of the prompt at least, while it is computed and once it is.
    pub fn dropped_at_least(&self, layer: usize) -> [usize; 2] {
        [self.during[layer], self.after[layer]]
    }

    /// The tokens that have to run in one step.
    pub fn whole(&self) -> Range<usize> {
        self.first..self.prompt_len
    }
}
