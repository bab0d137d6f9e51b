//! Which tokens run each sublayer of a step, as the kernels read it: lists of those that are gathered, and what attention
//! goes over.

use super::attention::{ITEM_BYTES, Items};
use super::device::Part;
use super::ops::Tokens;
use super::step_rows::{Prefix, Selected};
use super::tables::{ITEMS, WITHIN};
use crate::compression::Sublayer;
use crate::compression::must_drop::step::slots;
use crate::compression::route::{Active, Span};
use crate::step::StepBatch;
use crate::{Result, ZooError};

/// The tokens that run one sublayer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Selection {
    /// How many.
    tokens: usize,
    /// Where their list begins, where they are not the first ones.
    index: Option<usize>,
    /// Where it begins at which of its row's each token is, where some of a row are left out before others; attention's.
    within: Option<usize>,
    /// Rows of one token: where their items begin, and how many.
    single: (usize, usize),
    /// Rows of several tokens, and the most tokens of one.
    several: (usize, usize),
    longest: usize,
}

impl Selection {
    fn lists<'a>(&self, words: &'a [u32]) -> [&'a [u32]; 3] {
        let index = self.index.map_or(0..0, |start| start..start + self.tokens);
        let items = |(start, count): (usize, usize)| start..start + 4 * count;
        [index, items(self.single), items(self.several)].map(|range| &words[range])
    }
}

/// See the module. What they consist of lies among the step's words.
#[derive(Debug, Default)]
pub(super) struct Selections {
    /// Tokens of the step, with padding, and whether each is a row's only one.
    tokens: usize,
    uniform: bool,
    of: Vec<[Selection; 2]>,
}

/// What a selection is made of: the step, and what of its rows is packed.
type Rows<'a, 'b> = (&'a StepBatch<'b>, &'a [Option<Prefix>]);

impl Selections {
    /// Lays out what runs where, `[layer]`, behind the arrays by token.
    ///
    /// # Errors
    /// [`ZooError::Step`] when more of a row's tokens run an attention than have slots.
    pub(super) fn lay(
        &mut self,
        rows: Rows<'_, '_>,
        actives: &[[Selected; 2]],
        (tokens, uniform): (usize, bool),
        words: &mut Vec<u32>,
    ) -> Result<()> {
        (self.tokens, self.uniform) = (tokens, uniform);
        self.of.clear();
        for (layer, [attention, ffn]) in actives.iter().enumerate() {
            let begin = words.len();
            let mut own =
                [attention, ffn].map(|(active, spans)| self.listed((*active, spans), rows.0, words));
            if !uniform {
                self.lay_items((layer, &attention.1), rows, &mut own[0], words)?;
            }
            // Equal choices share their lists, which is the rule: rows of one plan, and all that is dense.
            if let Some(before) = self.of.last().filter(|before| !uniform && equal(&own, before, words)) {
                own = *before;
                words.truncate(begin);
            }
            self.of.push(own);
        }
        Ok(())
    }

    /// The tokens of a sublayer, and their list where they are gathered.
    fn listed(
        &self,
        (active, spans): (Active, &[Span]),
        batch: &StepBatch<'_>,
        words: &mut Vec<u32>,
    ) -> Selection {
        let mut selection = Selection { tokens: active.count(), ..Selection::default() };
        if self.uniform && selection.tokens > 0 {
            // All rows take the padding with them.
            let all = selection.tokens == batch.num_tokens();
            selection.tokens = if all { self.tokens } else { selection.tokens };
            selection.single = (ITEMS * self.tokens, selection.tokens);
        } else if let Active::Gather(_) = active {
            selection.index = Some(words.len());
            let tokens = spans.iter().flat_map(|span| span.step_start..span.step_start + span.len);
            words.extend(tokens.map(|token| token as u32));
        }
        selection
    }

    /// What the attention of `layer` goes over. The slots of a row's tokens lie side by side, whatever of the row lies
    /// between them.
    fn lay_items(
        &self,
        (layer, spans): (usize, &[Span]),
        (batch, prefixes): Rows<'_, '_>,
        selection: &mut Selection,
        words: &mut Vec<u32>,
    ) -> Result<()> {
        let rows = || {
            let by_row = spans.chunk_by(|a, b| a.row == b.row);
            by_row.map(|own| (own[0].row, own[0].start, own.iter().map(|span| span.len).sum::<usize>()))
        };
        for (row, _, len) in rows() {
            let room = slots(&batch.rows[row], layer);
            if len > room {
                let what =
                    format!("row {row}: {len} tokens run the attention of layer {layer}, {room} have slots");
                return Err(ZooError::Step(what));
            }
        }
        self.lay_within(spans, selection, words);
        // Tokens over packed slots are computed one by one, like the tokens that they stand for.
        let is_single = |&(row, _, len): &(usize, usize, usize)| len == 1 || prefixes[row].is_some();
        let start = words.len();
        for (row, start, len) in rows().filter(is_single) {
            words.extend((0..len).flat_map(|i| [start + i, row, i, 1]).map(|word| word as u32));
        }
        selection.single = (start, (words.len() - start) / 4);
        let several = || rows().filter(|row| !is_single(row));
        selection.several = (words.len(), several().count());
        let items = several().flat_map(|(row, start, len)| [start, row, 0, len]);
        words.extend(items.map(|word| word as u32));
        selection.longest = several().map(|(_, _, len)| len).max().unwrap_or(0);
        Ok(())
    }

    /// Counts the tokens of rows anew where some of them are left out before others.
    fn lay_within(&self, spans: &[Span], selection: &mut Selection, words: &mut Vec<u32>) {
        let by_row = || spans.chunk_by(|a, b| a.row == b.row);
        if by_row().all(|own| own.len() == 1 && own[0].first == 0) {
            return;
        }
        let at = words.len();
        selection.within = Some(at);
        words.extend_from_within(WITHIN * self.tokens..(WITHIN + 1) * self.tokens);
        for own in by_row() {
            let tokens = own.iter().flat_map(|span| span.step_start..span.step_start + span.len);
            tokens.enumerate().for_each(|(within, token)| words[at + token] = within as u32);
        }
    }

    /// Rows of one token of a layer, at most.
    pub(super) fn most_single(&self) -> usize {
        self.of.iter().map(|[attention, _]| attention.single.1).max().unwrap_or(0)
    }

    /// The number of tokens of each sublayer.
    pub(super) fn class(&self) -> impl Iterator<Item = u32> {
        self.of.iter().flatten().map(|selection| selection.tokens as u32)
    }

    /// Where it lies at which of its row's tokens each one is in the attention of `layer`, if not as in the step.
    pub(super) fn within(&self, layer: usize) -> Option<usize> {
        self.of[layer][Sublayer::Attention as usize].within
    }

    /// The tokens that run `sublayer` of `layer`, where `part(start, words)` are the step's words.
    pub(super) fn tokens(
        &self,
        layer: usize,
        sublayer: Sublayer,
        part: impl Fn(usize, usize) -> Result<Part>,
    ) -> Result<Tokens> {
        let Selection { tokens: count, index, .. } = self.of[layer][sublayer as usize];
        let index = index.map_or(Ok(Part::NONE), |start| part(start, count))?;
        Ok(Tokens { count, index, skips: None })
    }

    /// Items of the attention of `layer`: rows of one token, and rows of several.
    pub(super) fn items(
        &self,
        layer: usize,
        part: impl Fn(usize, usize) -> Result<Part>,
    ) -> Result<[Items; 2]> {
        let Selection { single, several, longest, .. } = self.of[layer][Sublayer::Attention as usize];
        let items = |(start, count): (usize, usize), longest| -> Result<Items> {
            Ok(Items { items: part(start, ITEM_BYTES / 4 * count)?, count, longest })
        };
        Ok([items(single, 1)?, items(several, longest)?])
    }
}

/// Whether two layers' selections have the same lists.
fn equal(a: &[Selection; 2], b: &[Selection; 2], words: &[u32]) -> bool {
    let same = |(a, b): (&Selection, &Selection)| {
        a.tokens == b.tokens && a.index.is_some() == b.index.is_some() && a.lists(words) == b.lists(words)
    };
    a.iter().zip(b).all(same)
}
