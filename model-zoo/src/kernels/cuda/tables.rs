//! A step as kernels read it: one array of words on the device, uploaded once a step, and the pages of its rows.
//!
//! Every index that kernels follow is checked here, before it is uploaded: tokens against the vocabulary, pages against
//! the pool, slots against the pages of their row.

use std::ops::Range;

use super::attention::{ITEM_BYTES, Items, PACKED_BYTES};
use super::device::{Buffer, Device, Part};
use super::ffn::Watch;
use super::fused::FLAGS;
use super::ops::Tokens;
use super::page_tables::{PageTables, make_room};
use super::pruned::OBSERVED_WORDS;
use super::selections::Selections;
pub use super::step_rows::{Bounds, Pages, Prefix};
use super::step_rows::{Selected, check, num_observed, observed, shows};
use super::watch_tables::WatchTables;
use crate::compression::Sublayer;
use crate::compression::must_drop::step::{points, slots};
use crate::compression::route::{Active, Route, Watched};
use crate::step::{LogitRows, StepBatch};
use crate::{Result, ZooError};

/// In place of a row: the token is padding.
const NO_ROW: u32 = u32::MAX;

/// See the module.
#[derive(Debug)]
pub struct StepTables {
    words: Vec<u32>,
    buffer: Option<Buffer>,
    pages: PageTables,
    bounds: Bounds,
    /// Tokens, with padding.
    tokens: usize,
    rows: usize,
    num_logits: usize,
    uniform: bool,
    is_packed: bool,
    /// The first flag of the step.
    flags: u32,
    /// The layers' halves that are laid, attention and FFN in turn.
    part: Range<usize>,
    /// Where parts end (see [`StepTables::lay_next`]).
    ends: Vec<usize>,
    selections: Selections,
    /// Of each layer: where the rows whose queries are observed begin, and how many they are.
    observed: Vec<(usize, usize)>,
    /// Rows of the batch that are observed, by the place of their sums.
    observers: Vec<usize>,
    watch: WatchTables,
}

/// Arrays of one word a token before the arrays by layer: tokens, positions, rows, within, logits, and items of four.
const TOKEN_WORDS: usize = 5 + ITEM_BYTES / 4;
/// The array of tokens' indexes in their rows.
pub(super) const WITHIN: usize = 3;
/// The array of the items that stand for tokens of rows of one.
pub(super) const ITEMS: usize = 5;

impl StepTables {
    /// Tables without a step.
    pub fn new(bounds: Bounds) -> Self {
        Self {
            words: Vec::new(),
            buffer: None,
            pages: PageTables::default(),
            bounds,
            tokens: 0,
            rows: 0,
            num_logits: 0,
            uniform: false,
            is_packed: false,
            flags: 0,
            part: 0..0,
            ends: Vec::new(),
            selections: Selections::default(),
            observed: Vec::new(),
            observers: Vec::new(),
            watch: WatchTables::default(),
        }
    }

    /// Lays out `batch` on its way `route` and its first part (see [`StepTables::lay_next`]), whose decisions it opens and
    /// counts. A step of one token a row is padded to `bucket(rows)` tokens, so that steps of a bucket differ in their words
    /// alone.
    ///
    /// # Errors
    /// [`ZooError::Step`] when the batch is malformed or needs what this device has not; nothing was run then.
    pub fn lay(
        &mut self,
        (batch, route): (&mut StepBatch<'_>, &mut Route),
        pages: Pages<'_>,
        bucket: impl Fn(usize) -> usize,
    ) -> Result<()> {
        self.bounds.num_pages = pages.count;
        self.is_packed = pages.prefixes.iter().any(Option::is_some);
        self.bounds.block_size = pages.layout.block_size;
        for (index, row) in batch.rows.iter().enumerate() {
            let packed = pages.prefixes[index].as_ref();
            check(row, &self.bounds, packed)
                .map_err(|what| ZooError::Step(format!("row {index}: {what}")))?;
        }
        let sizes = (self.bounds.num_pages, self.bounds.block_size);
        self.pages.lay(batch, sizes, |index, layer| {
            let row = &batch.rows[index];
            [row.kv_len[layer] + slots(row, layer), pages.saved(index, row.kv_len[layer])]
        })?;
        self.ends.clear();
        self.ends.extend(points(&batch.rows).into_iter().map(|layer| 2 * layer + 1));
        self.ends.push(2 * self.bounds.layers);
        self.part = 0..self.ends[0];
        let count = batch.num_tokens();
        let rows = batch.rows.iter().enumerate();
        self.observers = rows.filter(|(_, row)| num_observed(row) > 0).map(|(index, _)| index).collect();
        let chosen = self.select(batch, route);
        self.uniform = batch.rows.iter().all(|row| row.tokens.len() == 1)
            && self.observers.is_empty()
            && self.ends.len() == 1
            && !batch.rows.iter().any(shows)
            && chosen.0.iter().flatten().all(|(active, _)| !matches!(active, Active::Gather(_)));
        self.tokens = if self.uniform { bucket(count).max(count) } else { count };
        self.rows = if self.uniform { self.tokens } else { batch.rows.len() };
        self.words.clear();
        self.words.resize(self.variable(), 0);
        self.flags =
            self.flags.checked_add(FLAGS).filter(|flags| *flags <= u32::MAX - FLAGS).unwrap_or(FLAGS);
        let flags_at = self.variable() - 1;
        self.words[flags_at] = self.flags;
        self.lay_tokens(batch, route);
        self.lay_pages(batch, pages);
        self.watch.begin();
        self.lay_part((batch, route), pages.prefixes, chosen)
    }

    /// Lays out the next part of the step, which has one more than there are layers after whose attention rows are filtered:
    /// once the part before it has run and `route` knows which tokens are left. Says whether there is one.
    ///
    /// # Errors
    /// As [`StepTables::lay`].
    pub fn lay_next(
        &mut self,
        (batch, route): (&mut StepBatch<'_>, &mut Route),
        prefixes: &[Option<Prefix>],
    ) -> Result<bool> {
        let from = self.part.end;
        let Some(&end) = self.ends.iter().find(|&&end| end > from) else { return Ok(false) };
        self.part = from..end;
        let chosen = self.select(batch, route);
        self.words.truncate(self.variable());
        self.lay_part((batch, route), prefixes, chosen)?;
        Ok(true)
    }

    /// Lays out what of a part has no fixed place.
    fn lay_part(
        &mut self,
        (batch, route): (&StepBatch<'_>, &Route),
        prefixes: &[Option<Prefix>],
        (actives, watched): (Vec<[Selected; 2]>, Vec<Vec<Watched>>),
    ) -> Result<()> {
        let runs: Vec<usize> = actives.iter().map(|[_, (active, _)]| active.count()).collect();
        let sizes = (self.tokens, self.uniform);
        self.watch.lay((batch, route), (watched, &runs), sizes, &mut self.words);
        let observed = observed(&self.observers, batch, &actives);
        self.selections.lay((batch, prefixes), &actives, sizes, &mut self.words)?;
        self.lay_observed(observed);
        Ok(())
    }

    /// Where the arrays by layer begin.
    fn by_layer(&self) -> usize {
        TOKEN_WORDS * self.tokens
    }

    /// Where it lies what of rows is packed.
    fn packed_at(&self) -> usize {
        self.by_layer() + 2 * self.bounds.layers * self.rows
    }

    /// Where what has no fixed place begins.
    fn variable(&self) -> usize {
        self.packed_at() + PACKED_BYTES / 4 * self.rows + 2
    }

    /// A word that is zero when a step begins, for blocks that count each other, and one that is higher by [`FLAGS`] from
    /// step to step.
    ///
    /// # Errors
    /// As [`StepTables::token_ids`].
    pub fn counter(&self) -> Result<Part> {
        self.part_of(self.variable() - 2, 2)
    }

    /// Whether flags began anew with this step: none of those before may be seen any more.
    pub fn restarts_flags(&self) -> bool {
        self.flags == FLAGS
    }

    /// What of the part runs where, and the spans of it; and which tokens may leave out the FFN of each layer.
    fn select(
        &self,
        batch: &mut StepBatch<'_>,
        route: &mut Route,
    ) -> (Vec<[Selected; 2]>, Vec<Vec<Watched>>) {
        let mut of = |layer, sublayer| {
            if !self.part.contains(&(2 * layer + sublayer as usize)) {
                return ((Active::None, Vec::new()), Vec::new());
            }
            let active = route.select(layer, sublayer, &mut batch.rows);
            ((active, route.spans().to_vec()), route.watched().to_vec())
        };
        let of_layer = |layer| {
            let ((attention, _), (ffn, watched)) = (of(layer, Sublayer::Attention), of(layer, Sublayer::Ffn));
            ([attention, ffn], watched)
        };
        (0..self.bounds.layers).map(of_layer).unzip()
    }

    /// The halves of layers that are laid: half `2 · layer` is a layer's attention, the next one its FFN.
    pub fn part(&self) -> Range<usize> {
        self.part.clone()
    }

    /// The layer after whose attention rows are filtered, where the part ends there.
    pub fn filtered(&self) -> Option<usize> {
        (self.part.end < 2 * self.bounds.layers).then_some(self.part.end / 2)
    }

    fn lay_tokens(&mut self, batch: &StepBatch<'_>, route: &Route) {
        let stride = self.tokens;
        let mut at = 0;
        for &row in route.order() {
            let own = &batch.rows[row];
            for (within, &token) in own.tokens.iter().enumerate() {
                // What stands for a part of an image is no token of the vocabulary.
                let token = if own.is_visual(within) { 0 } else { token };
                let values = [token, (own.first_pos + within) as u32, row as u32, within as u32];
                for (array, value) in values.into_iter().enumerate() {
                    self.words[array * stride + at] = value;
                }
                at += 1;
            }
        }
        self.words[2 * stride + at..3 * stride].fill(NO_ROW);
        let mut logits = Vec::new();
        for (index, row) in batch.rows.iter().enumerate() {
            let end = route.start(index) + row.tokens.len();
            let first = end
                - match row.logits {
                    LogitRows::None => 0,
                    LogitRows::Last => 1,
                    LogitRows::All => row.tokens.len(),
                };
            logits.extend((first..end).map(|token| token as u32));
        }
        self.num_logits = logits.len();
        // Padding has logits, too: nobody reads them.
        logits.resize(stride.max(logits.len()), at.min(stride.saturating_sub(1)) as u32);
        self.words[4 * stride..5 * stride].copy_from_slice(&logits[..stride]);
        if self.uniform {
            for token in 0..stride {
                let item = [token as u32, self.words[2 * stride + token], 0, 1];
                let place = ITEMS * stride + 4 * token;
                self.words[place..place + 4].copy_from_slice(&item);
            }
        }
    }

    fn lay_observed(&mut self, observed: Vec<Vec<[u32; OBSERVED_WORDS]>>) {
        self.observed.clear();
        for items in observed {
            self.observed.push((self.words.len(), items.len()));
            self.words.extend(items.into_iter().flatten());
        }
    }

    fn lay_pages(&mut self, batch: &StepBatch<'_>, pages: Pages<'_>) {
        let (layers, rows) = (self.bounds.layers, self.rows);
        let lens = self.by_layer();
        let starts = lens + layers * rows;
        for (index, row) in batch.rows.iter().enumerate() {
            for layer in 0..layers {
                let place = layer * rows + index;
                self.words[lens + place] = row.kv_len[layer] as u32;
                // Pages are found by their slots as if none were saved, in words that wrap around.
                let saved = pages.saved(index, row.kv_len[layer]) as u32;
                self.words[starts + place] = self.pages.start((index, layer), layers).wrapping_sub(saved);
            }
            if let Some(prefix) = pages.prefixes[index] {
                let address = prefix.channels.address();
                let words = [address as u32, (address >> 32) as u32, prefix.slots as u32, prefix.kept as u32];
                let at = self.packed_at() + PACKED_BYTES / 4 * index;
                self.words[at..at + 4].copy_from_slice(&words);
                self.words[at + 4] = prefix.saved as u32;
            }
        }
    }

    /// Brings the step to the device. Says whether its memory moved: nothing captured before holds then.
    ///
    /// # Errors
    /// [`ZooError::Device`].
    pub fn upload(&mut self, device: &dyn Device) -> Result<bool> {
        let bytes: &[u8] = bytemuck::cast_slice(&self.words);
        let moved = make_room(&mut self.buffer, bytes.len(), device)?;
        if let Some(buffer) = &self.buffer {
            device.upload(Part::all(buffer), bytes)?;
        }
        Ok(self.pages.upload(device)? || moved)
    }

    fn part_of(&self, start: usize, words: usize) -> Result<Part> {
        let buffer = self.buffer.as_ref().ok_or_else(|| ZooError::Device("no step was uploaded".into()))?;
        Part::of(buffer, 4 * start, 4 * words)
    }

    /// Tokens of the step, with padding.
    pub fn num_tokens(&self) -> usize {
        self.tokens
    }

    /// Rows of one token of a layer, at most.
    pub fn most_single(&self) -> usize {
        self.selections.most_single()
    }

    /// Logit rows that the step keeps, without padding.
    pub fn num_logits(&self) -> usize {
        self.num_logits
    }

    /// Whether the step has one token a row, none of which is gathered: its launches follow from
    /// [`StepTables::class`] alone.
    pub fn is_uniform(&self) -> bool {
        self.uniform
    }

    /// The number of tokens, and of each sublayer's.
    pub fn class(&self) -> Vec<u32> {
        [self.tokens as u32, u32::from(self.is_packed)]
            .into_iter()
            .chain(self.selections.class())
            .chain(self.watch.class())
            .collect()
    }

    /// The most tokens that may leave out the FFN of a layer, with padding.
    pub fn most_watched(&self) -> usize {
        self.watch.most()
    }

    /// Which tokens may leave out the FFN of `layer`, if there are any.
    ///
    /// # Errors
    /// As [`StepTables::token_ids`].
    pub fn watch(&self, layer: usize) -> Result<Option<Watch>> {
        self.watch.of(layer, |start, words| self.part_of(start, words))
    }

    /// Tells the rows which FFNs their tokens have left out, once the step has run.
    ///
    /// # Errors
    /// [`ZooError::Device`].
    pub fn tell(&mut self, device: &dyn Device, batch: &mut StepBatch<'_>, route: &Route) -> Result<()> {
        if !self.watch.watches() {
            return Ok(());
        }
        let (start, count) = self.watch.states();
        let mut states = vec![0u32; count];
        device.download(self.part_of(start, count)?, bytemuck::cast_slice_mut(&mut states))?;
        self.watch.tell(states, batch, route);
        Ok(())
    }

    /// Token ids, `[tokens]`.
    ///
    /// # Errors
    /// [`ZooError::Device`] before a step was uploaded; so for all that follow.
    pub fn token_ids(&self) -> Result<Part> {
        self.part_of(0, self.tokens)
    }

    /// Positions, `[tokens]`.
    ///
    /// # Errors
    /// As [`StepTables::token_ids`].
    pub fn positions(&self) -> Result<Part> {
        self.part_of(self.tokens, self.tokens)
    }

    /// Rows of tokens, and their indexes among those of them that run the attention of `layer`, `[tokens]` each.
    ///
    /// # Errors
    /// As [`StepTables::token_ids`].
    pub fn owners(&self, layer: usize) -> Result<[Part; 2]> {
        let within = self.selections.within(layer).unwrap_or(WITHIN * self.tokens);
        Ok([self.part_of(2 * self.tokens, self.tokens)?, self.part_of(within, self.tokens)?])
    }

    /// The step's tokens whose logits are wanted, those of `range`.
    ///
    /// # Errors
    /// As [`StepTables::token_ids`].
    pub fn logits(&self, range: Range<usize>) -> Result<Tokens> {
        let index = self.part_of(4 * self.tokens + range.start, range.len())?;
        Ok(Tokens { count: range.len(), index, skips: None })
    }

    /// The words of a list that [`StepTables::selected`] named; `None` for none.
    pub fn list(&self, index: Part) -> Option<&[u32]> {
        let first = index.address().checked_sub(self.buffer.as_ref()?.address())? as usize / 4;
        self.words.get(first..first + index.len() / 4).filter(|list| !list.is_empty())
    }

    /// KV lengths of a layer, and where its pages begin, `[rows]` each; and all pages.
    ///
    /// # Errors
    /// As [`StepTables::token_ids`].
    pub fn pages(&self, layer: usize) -> Result<[Part; 3]> {
        let lens = self.by_layer() + layer * self.rows;
        let starts = lens + self.bounds.layers * self.rows;
        let tables = self.pages.part()?;
        Ok([self.part_of(lens, self.rows)?, self.part_of(starts, self.rows)?, tables])
    }

    /// Whether some row has packed slots.
    pub fn is_packed(&self) -> bool {
        self.is_packed
    }

    /// What of rows is packed, `[rows]` of [`PACKED_BYTES`].
    ///
    /// # Errors
    /// As [`StepTables::token_ids`].
    pub fn packed(&self) -> Result<Part> {
        self.part_of(self.packed_at(), PACKED_BYTES / 4 * self.rows)
    }

    /// Rows of the batch whose queries are observed, by the place of their sums.
    pub fn observers(&self) -> &[usize] {
        &self.observers
    }

    /// Which queries of `layer` are observed, and of how many rows: see [`super::pruned::observe`].
    ///
    /// # Errors
    /// As [`StepTables::token_ids`].
    pub fn observed_in(&self, layer: usize) -> Result<(Part, usize)> {
        let (start, count) = self.observed[layer];
        Ok((self.part_of(start, OBSERVED_WORDS * count)?, count))
    }

    /// The tokens that run `sublayer` of `layer`.
    ///
    /// # Errors
    /// As [`StepTables::token_ids`].
    pub fn selected(&self, layer: usize, sublayer: Sublayer) -> Result<Tokens> {
        let watch = if sublayer == Sublayer::Ffn { self.watch(layer)? } else { None };
        let tokens = self.selections.tokens(layer, sublayer, |start, words| self.part_of(start, words))?;
        Ok(Tokens { skips: watch.map(|watch| watch.skips), ..tokens })
    }

    /// Items of the attention of `layer`: rows of one token, and rows of several.
    ///
    /// # Errors
    /// As [`StepTables::token_ids`].
    pub fn items(&self, layer: usize) -> Result<[Items; 2]> {
        self.selections.items(layer, |start, words| self.part_of(start, words))
    }
}
