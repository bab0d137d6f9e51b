//! A step as kernels read it: one array of words on the device, uploaded once a step, and the pages of its rows.
//!
//! Every index that kernels follow is checked here, before it is uploaded: tokens against the vocabulary, pages against
//! the pool, slots against the pages of their row.

use super::attention::{ITEM_BYTES, Items};
use super::device::{Buffer, Device, Part};
use super::ops::Tokens;
use super::page_tables::{PageTables, make_room};
use crate::compression::Sublayer;
use crate::compression::route::{Active, Route};
use crate::step::{LogitRows, StepBatch, StepRow};
use crate::{Result, ZooError};

/// In place of a row: the token is padding.
const NO_ROW: u32 = u32::MAX;

/// What indexes are checked against.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Decoder layers.
    pub layers: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Pages of the pool.
    pub num_pages: usize,
    /// KV slots of a page.
    pub block_size: usize,
}

/// The tokens that run one sublayer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Selection {
    /// How many.
    pub tokens: usize,
    /// Where their list begins, where they are not the first ones.
    index: Option<usize>,
    /// Rows of one token: where their items begin, and how many.
    single: (usize, usize),
    /// Rows of several tokens, and the most tokens of one.
    several: (usize, usize),
    longest: usize,
}

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
    selections: Vec<[Selection; 2]>,
}

/// Arrays of one word a token before the arrays by layer: tokens, positions, rows, within, logits, and items of four.
const TOKEN_WORDS: usize = 5 + ITEM_BYTES / 4;

impl StepTables {
    /// Tables without a step.
    pub fn new(bounds: Bounds) -> Self {
        let selections = vec![Default::default(); bounds.layers];
        Self {
            words: Vec::new(),
            buffer: None,
            pages: PageTables::default(),
            bounds,
            tokens: 0,
            rows: 0,
            num_logits: 0,
            uniform: false,
            selections,
        }
    }

    /// KV slots of a page of the steps to come.
    pub fn set_block_size(&mut self, block_size: usize) {
        self.bounds.block_size = block_size;
    }

    /// Lays out `batch` on its way `route`, and opens and counts its decisions. A step of one token a row is padded to
    /// `bucket(rows)` tokens, so that steps of a bucket differ in their words alone.
    ///
    /// # Errors
    /// [`ZooError::Step`] when the batch is malformed or needs what this device has not; nothing was run then.
    pub fn lay(
        &mut self,
        (batch, route): (&mut StepBatch<'_>, &mut Route),
        num_pages: usize,
        bucket: impl Fn(usize) -> usize,
    ) -> Result<()> {
        self.bounds.num_pages = num_pages;
        for (index, row) in batch.rows.iter().enumerate() {
            check(row, &self.bounds).map_err(|what| ZooError::Step(format!("row {index}: {what}")))?;
        }
        let sizes = (self.bounds.num_pages, self.bounds.block_size);
        self.pages.lay(batch, sizes, |row, layer| row.kv_len[layer] + active(row, layer))?;
        let count = batch.num_tokens();
        let actives = self.select(batch, route);
        self.uniform = batch.rows.iter().all(|row| row.tokens.len() == 1)
            && actives.iter().flatten().all(|(active, _)| !matches!(active, Active::Gather(_)));
        self.tokens = if self.uniform { bucket(count).max(count) } else { count };
        self.rows = if self.uniform { self.tokens } else { batch.rows.len() };
        self.words.clear();
        self.words.resize(self.variable(), 0);
        self.lay_tokens(batch, route);
        for (layer, [attention, ffn]) in actives.into_iter().enumerate() {
            let before = layer.checked_sub(1).map(|before| self.selections[before]);
            let own = [self.selection(attention, count), self.selection(ffn, count)];
            // Equal choices share their lists, which is the rule: rows of one plan, and all that is dense.
            self.selections[layer] = own;
            if let Some(before) = before {
                self.share(before, layer);
            }
        }
        self.lay_pages(batch);
        Ok(())
    }

    /// Where the arrays by layer begin.
    fn by_layer(&self) -> usize {
        TOKEN_WORDS * self.tokens
    }

    /// Where what has no fixed place begins.
    fn variable(&self) -> usize {
        self.by_layer() + 2 * self.bounds.layers * self.rows + 1
    }

    /// A word that is zero when a step begins, for blocks that count each other.
    ///
    /// # Errors
    /// As [`StepTables::token_ids`].
    pub fn counter(&self) -> Result<Part> {
        self.part(self.variable() - 1, 1)
    }

    /// What runs where, and the spans of it.
    #[allow(clippy::type_complexity)]
    fn select(
        &self,
        batch: &mut StepBatch<'_>,
        route: &mut Route,
    ) -> Vec<[(Active, Vec<crate::compression::route::Span>); 2]> {
        let mut of = |layer, sublayer| {
            let active = route.select(layer, sublayer, &mut batch.rows);
            (active, route.spans().to_vec())
        };
        (0..self.bounds.layers)
            .map(|layer| [of(layer, Sublayer::Attention), of(layer, Sublayer::Ffn)])
            .collect()
    }

    fn lay_tokens(&mut self, batch: &StepBatch<'_>, route: &Route) {
        let stride = self.tokens;
        let mut at = 0;
        for &row in route.order() {
            let own = &batch.rows[row];
            for (within, &token) in own.tokens.iter().enumerate() {
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
                let place = 5 * stride + 4 * token;
                self.words[place..place + 4].copy_from_slice(&item);
            }
        }
    }

    fn selection(
        &mut self,
        (active, spans): (Active, Vec<crate::compression::route::Span>),
        count: usize,
    ) -> Selection {
        let tokens = match active {
            Active::None => return Selection::default(),
            Active::Prefix(tokens) | Active::Gather(tokens) => tokens,
        };
        if self.uniform {
            // All rows take the padding with them.
            let tokens = if tokens == count { self.tokens } else { tokens };
            let single = (5 * self.tokens, tokens);
            return Selection { tokens, single, ..Selection::default() };
        }
        let mut selection = Selection { tokens, ..Selection::default() };
        if let Active::Gather(_) = active {
            selection.index = Some(self.words.len());
            let tokens = spans.iter().flat_map(|span| span.step_start..span.step_start + span.len);
            self.words.extend(tokens.map(|token| token as u32));
        }
        for several in [false, true] {
            let start = self.words.len();
            let own = spans.iter().filter(|span| (span.len > 1) == several);
            let items = own.map(|span| [span.start, span.row, span.first, span.len].map(|word| word as u32));
            self.words.extend(items.flatten());
            let list = (start, (self.words.len() - start) / 4);
            *(if several { &mut selection.several } else { &mut selection.single }) = list;
        }
        selection.longest = spans.iter().map(|span| span.len).max().unwrap_or(0);
        selection
    }

    /// Lets the layer's selections use the lists of the layer before, where they are equal, and drops their own.
    fn share(&mut self, before: [Selection; 2], layer: usize) {
        let list = |words: &[u32], selection: &Selection| -> Vec<u32> {
            let index = selection.index.map_or(0..0, |start| start..start + selection.tokens);
            let items = |(start, count): (usize, usize)| start..start + 4 * count;
            [index, items(selection.single), items(selection.several)]
                .into_iter()
                .flat_map(|range| words[range].to_vec())
                .collect()
        };
        let own = self.selections[layer];
        let equal = |a: &Selection, b: &Selection| {
            a.tokens == b.tokens
                && a.index.is_some() == b.index.is_some()
                && list(&self.words, a) == list(&self.words, b)
        };
        if !self.uniform && equal(&own[0], &before[0]) && equal(&own[1], &before[1]) {
            let begin = own.iter().filter(|selection| selection.tokens > 0);
            let begin = begin.map(|s| s.index.unwrap_or(s.single.0)).min().unwrap_or(self.words.len());
            self.words.truncate(begin);
            self.selections[layer] = before;
        }
    }

    fn lay_pages(&mut self, batch: &StepBatch<'_>) {
        let (layers, rows) = (self.bounds.layers, self.rows);
        let lens = self.by_layer();
        let starts = lens + layers * rows;
        for (index, row) in batch.rows.iter().enumerate() {
            for layer in 0..layers {
                let place = layer * rows + index;
                self.words[lens + place] = row.kv_len[layer] as u32;
                self.words[starts + place] = self.pages.start((index, layer), layers);
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

    fn part(&self, start: usize, words: usize) -> Result<Part> {
        let buffer = self.buffer.as_ref().ok_or_else(|| ZooError::Device("no step was uploaded".into()))?;
        Part::of(buffer, 4 * start, 4 * words)
    }

    /// Tokens of the step, with padding.
    pub fn num_tokens(&self) -> usize {
        self.tokens
    }

    /// Rows of one token of a layer, at most.
    pub fn most_single(&self) -> usize {
        self.selections.iter().map(|[attention, _]| attention.single.1).max().unwrap_or(0)
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
        let of_layers = self.selections.iter().flatten().map(|selection| selection.tokens as u32);
        std::iter::once(self.tokens as u32).chain(of_layers).collect()
    }

    /// Token ids, `[tokens]`.
    ///
    /// # Errors
    /// [`ZooError::Device`] before a step was uploaded; so for all that follow.
    pub fn token_ids(&self) -> Result<Part> {
        self.part(0, self.tokens)
    }

    /// Positions, `[tokens]`.
    ///
    /// # Errors
    /// As [`StepTables::token_ids`].
    pub fn positions(&self) -> Result<Part> {
        self.part(self.tokens, self.tokens)
    }

    /// Rows of tokens and their indexes in them, `[tokens]` each.
    ///
    /// # Errors
    /// As [`StepTables::token_ids`].
    pub fn owners(&self) -> Result<[Part; 2]> {
        Ok([self.part(2 * self.tokens, self.tokens)?, self.part(3 * self.tokens, self.tokens)?])
    }

    /// The step's tokens whose logits are wanted, those of `range`.
    ///
    /// # Errors
    /// As [`StepTables::token_ids`].
    pub fn logits(&self, range: std::ops::Range<usize>) -> Result<Tokens> {
        let index = self.part(4 * self.tokens + range.start, range.len())?;
        Ok(Tokens { count: range.len(), index })
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
        Ok([self.part(lens, self.rows)?, self.part(starts, self.rows)?, tables])
    }

    /// The tokens that run `sublayer` of `layer`.
    ///
    /// # Errors
    /// As [`StepTables::token_ids`].
    pub fn selected(&self, layer: usize, sublayer: Sublayer) -> Result<Tokens> {
        let selection = self.selections[layer][sublayer as usize];
        let index = match selection.index {
            Some(start) => self.part(start, selection.tokens)?,
            None => Part::NONE,
        };
        Ok(Tokens { count: selection.tokens, index })
    }

    /// Items of the attention of `layer`: rows of one token, and rows of several.
    ///
    /// # Errors
    /// As [`StepTables::token_ids`].
    pub fn items(&self, layer: usize) -> Result<[Items; 2]> {
        let Selection { single, several, longest, .. } = self.selections[layer][Sublayer::Attention as usize];
        let items = |(start, count): (usize, usize), longest| -> Result<Items> {
            Ok(Items { items: self.part(start, 4 * count)?, count, longest })
        };
        Ok([items(single, 1)?, items(several, longest)?])
    }
}

/// Tokens of the row that write KV in `layer`.
fn active(row: &StepRow<'_>, layer: usize) -> usize {
    row.plan.active_len(layer, Sublayer::Attention, (row.first_pos, row.tokens.len()))
}

/// What of a row cannot be run, as a sentence's end.
fn check(row: &StepRow<'_>, bounds: &Bounds) -> Result<(), String> {
    if row.tokens.is_empty() {
        return Err("no tokens".into());
    }
    if row.plan.ffn().is_some() || row.plan.pruning().is_some() {
        return Err("its plan has a method that the GPU's engine does not run".into());
    }
    if !row.images.is_empty() {
        return Err("images are not shown to models on a GPU".into());
    }
    if let Some(token) = row.tokens.iter().find(|&&token| token as usize >= bounds.vocab) {
        return Err(format!("token {token} is outside the vocabulary"));
    }
    let layers = bounds.layers;
    if row.kv_len.len() != layers || row.block_tables.len() != layers || row.plan.num_layers() != layers {
        return Err(format!("block tables of {} layers, not {layers}", row.block_tables.len()));
    }
    Ok(())
}
