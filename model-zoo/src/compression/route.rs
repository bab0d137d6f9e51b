//! One step's way through the layers: in which order rows lie in memory, and which of their tokens run
//! which sublayer.
//!
//! Rows that run most come first. Where layer sets nest, as SkipDecode's and dropped layers' do, the
//! tokens that run a sublayer are then the first ones in memory: a slice, no gather. Image tokens that are absent, or
//! that a filter has dropped, are gathered around.

use super::ffn_skip::{FfnPolicy, FfnRule};
use super::{RowState, Sublayer};
use crate::step::StepRow;

/// Consecutive tokens of one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Index of the row in the step.
    pub row: usize,
    /// First token, counted in the row.
    pub first: usize,
    /// Number of tokens.
    pub len: usize,
    /// First token, counted among the tokens that run this sublayer.
    pub start: usize,
    /// First token, counted among all of the step in the order of memory.
    pub step_start: usize,
}

/// Which tokens run a sublayer. The spans themselves are [`Route::spans`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Active {
    /// None: the weights are not touched.
    None,
    /// The first so many in memory.
    Prefix(usize),
    /// So many, to be gathered.
    Gather(usize),
}

impl Active {
    /// How many.
    pub fn count(self) -> usize {
        match self {
            Self::None => 0,
            Self::Prefix(count) | Self::Gather(count) => count,
        }
    }
}

/// A token whose residual stream is to be compared before and after an FFN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watched {
    /// Index of the row in the step.
    row: usize,
    /// Its position.
    position: usize,
    /// Where it lies among the tokens that run the FFN.
    pub token: usize,
}

impl Watched {
    /// Index of its row in the step.
    pub fn row(&self) -> usize {
        self.row
    }

    /// Its position.
    pub fn position(&self) -> usize {
        self.position
    }
}

/// See the module.
#[derive(Debug)]
pub struct Route {
    /// Rows in the order of memory.
    order: Vec<usize>,
    /// `[row]`: its first token in memory.
    starts: Vec<usize>,
    runs_all: bool,
    spans: Vec<Span>,
    watched: Vec<Watched>,
    /// Where a fixed choice or a vote has just been made, so that spans can be laid: `[token of the row]`
    skips: Vec<bool>,
    /// `[row]`: which of its tokens are left, where that is not all of them.
    left: Vec<Option<Left>>,
}

/// The tokens of a row that are left, layer after layer.
#[derive(Debug)]
struct Left {
    /// Each with the first layer whose attention sees it; ascending tokens of the row.
    stages: Vec<(usize, Vec<usize>)>,
}

impl Left {
    /// Of a row with absent tokens or filters.
    fn of(row: &StepRow<'_>) -> Option<Self> {
        let range = row.first_pos..row.first_pos + row.tokens.len();
        let absent = row.plan.absent(range.clone());
        let filtered = row.plan.filter().is_some_and(|filter| range.start < filter.prompt_len);
        if absent.is_empty() && !filtered {
            return None;
        }
        let mut absent = absent.iter().copied().peekable();
        let present = range.filter(|position| absent.next_if_eq(position).is_none());
        Some(Self { stages: vec![(0, present.map(|position| position - row.first_pos).collect())] })
    }

    fn now(&self) -> &[usize] {
        self.stages.last().map_or(&[], |(_, tokens)| tokens)
    }
}

impl Route {
    /// Lays out the step, and opens the decisions of its rows.
    pub fn begin(rows: &mut [StepRow<'_>]) -> Self {
        let runs_all = rows.iter().all(|row| row.plan.runs_all());
        let mut order: Vec<usize> = (0..rows.len()).collect();
        if !runs_all {
            let work: Vec<_> = rows.iter().map(work_per_token).collect();
            order.sort_by_key(|&row| std::cmp::Reverse(work[row]));
            for row in rows.iter_mut() {
                if let Some(policy) = row.plan.ffn() {
                    row.state.ffn.begin(policy, row.plan.num_layers(), row.first_pos + row.tokens.len());
                }
            }
        }
        let mut route = Self {
            starts: vec![0; rows.len()],
            order,
            runs_all,
            spans: Vec::with_capacity(rows.len()),
            watched: Vec::new(),
            skips: Vec::new(),
            left: rows.iter().map(Left::of).collect(),
        };
        let mut start = 0;
        for &row in &route.order {
            route.starts[row] = start;
            start += rows[row].tokens.len();
        }
        route.lay_all(rows);
        route
    }

    /// Rows in the order of memory.
    pub fn order(&self) -> &[usize] {
        &self.order
    }

    /// Where the tokens of `row` begin in memory.
    pub fn start(&self, row: usize) -> usize {
        self.starts[row]
    }

    /// The spans of the sublayer that was last selected, in the order of memory.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// The tokens of that sublayer to be compared before and after it, for [`Route::observe`].
    pub fn watched(&self) -> &[Watched] {
        &self.watched
    }

    /// The tokens of `row` that run the attention of `layer`, ascending, where those are not all. Layers up to the next
    /// one only.
    pub fn left(&self, row: usize, layer: usize) -> Option<&[usize]> {
        let stages = &self.left[row].as_ref()?.stages;
        stages.iter().rev().find(|(first, _)| *first <= layer).map(|(_, tokens)| tokens.as_slice())
    }

    /// Drops the tokens of `row` that are not in `tokens`, ascending, after the attention of `layer`.
    pub fn retain(&mut self, row: usize, layer: usize, tokens: Vec<usize>) {
        if let Some(left) = &mut self.left[row] {
            left.stages.push((layer + 1, tokens));
        }
    }

    /// Decides which tokens run `sublayer` of `layer`, and counts them.
    pub fn select(&mut self, layer: usize, sublayer: Sublayer, rows: &mut [StepRow<'_>]) -> Active {
        if !self.runs_all {
            self.spans.clear();
            self.watched.clear();
            let agreed = sublayer == Sublayer::Attention || votes_agree(layer, rows);
            for index in 0..self.order.len() {
                let row = self.order[index];
                self.lay(row, (layer, sublayer), &mut rows[row], agreed);
            }
        }
        for span in &self.spans {
            rows[span.row].state.sublayers_run[sublayer as usize] += span.len as u64;
        }
        let total = self.spans.last().map_or(0, |span| span.start + span.len);
        let in_place = self.spans.iter().all(|span| span.start == span.step_start);
        match (total, in_place) {
            (0, _) => Active::None,
            (_, true) => Active::Prefix(total),
            (_, false) => Active::Gather(total),
        }
    }

    /// Tells how an FFN changed the stream of a watched token: the cosine of before and after.
    pub fn observe(watched: Watched, cosine: f32, rows: &mut [StepRow<'_>]) {
        let row = &mut rows[watched.row];
        if let Some(policy) = row.plan.ffn() {
            row.state.ffn.observe(policy, watched.position, cosine);
        }
    }

    /// Tells that a watched token has left out the FFN of `layer` after all: where it runs decides, and not
    /// [`Route::select`].
    pub fn skipped(watched: Watched, layer: usize, rows: &mut [StepRow<'_>]) {
        let state = &mut rows[watched.row].state;
        state.ffn.skip(layer, watched.position);
        state.sublayers_run[Sublayer::Ffn as usize] -= 1;
        state.ffns_skipped += 1;
    }

    /// Of the rows that decide together about the FFN of `layer`, if there are any: the share of all rows that run it
    /// whose votes it takes, and how many these are.
    pub fn quorum(layer: usize, rows: &[StepRow<'_>]) -> Option<(f32, usize)> {
        let (mut quorum, mut voters) = (None, 0);
        for row in rows.iter().filter(|row| row.plan.runs(layer, Sublayer::Ffn, row.first_pos)) {
            voters += 1;
            let Some(FfnRule::Adaptive { quorum: Some(own), .. }) = row.plan.ffn().map(|policy| &policy.rule)
            else {
                continue;
            };
            // The strictest row's quorum holds for all.
            quorum = Some(quorum.map_or(*own, |other: f32| other.max(*own)));
        }
        quorum.map(|quorum| (quorum, voters))
    }

    /// Records what was decided. A step that failed before it is decided anew.
    pub fn finish(&self, rows: &mut [StepRow<'_>]) {
        if !self.runs_all {
            rows.iter_mut().for_each(|row| row.state.ffn.finish());
        }
    }

    fn lay_all(&mut self, rows: &[StepRow<'_>]) {
        for &row in &self.order {
            let (start, len) = (self.starts[row], rows[row].tokens.len());
            self.spans.push(Span { row, first: 0, len, start, step_start: start });
        }
    }

    /// Lays the spans of one row: its first active tokens, less those that are not left or whose FFN is skipped.
    fn lay(
        &mut self,
        index: usize,
        (layer, sublayer): (usize, Sublayer),
        row: &mut StepRow<'_>,
        agreed: bool,
    ) {
        let active = row.plan.active_len(layer, sublayer, (row.first_pos, row.tokens.len()));
        let policy = row.plan.ffn().filter(|_| sublayer == Sublayer::Ffn);
        let policy = policy.filter(|policy| policy.may_skip(layer, row.first_pos + active));
        if policy.is_none() && self.left[index].is_none() {
            return self.push(index, 0, active);
        }
        self.skips.clear();
        self.skips.resize(active, self.left[index].is_some());
        if let Some(left) = &self.left[index] {
            let here = left.now().iter().take_while(|&&token| token < active);
            let count = here.map(|&token| self.skips[token] = false).count();
            row.state.visual_left_out += (active - count) as u64;
        }
        if let Some(policy) = policy {
            for token in (0..active).filter(|&token| !self.skips[token]).collect::<Vec<_>>() {
                let skips = decide(policy, row.state, (layer, row.first_pos + token), agreed);
                self.skips[token] = skips;
                row.state.ffns_skipped += u64::from(skips);
            }
        }
        let mut first = 0;
        while first < active {
            let skips = self.skips[first];
            let len = self.skips[first..].iter().take_while(|&&other| other == skips).count();
            if !skips {
                self.push(index, first, len);
                if let Some(policy) = policy {
                    self.watch(index, (layer, policy), (first, len), row);
                }
            }
            first += len;
        }
    }

    fn push(&mut self, row: usize, first: usize, len: usize) {
        if len == 0 {
            return;
        }
        let start = self.spans.last().map_or(0, |span| span.start + span.len);
        self.spans.push(Span { row, first, len, start, step_start: self.starts[row] + first });
    }

    fn watch(
        &mut self,
        index: usize,
        (layer, policy): (usize, &FfnPolicy),
        (first, len): (usize, usize),
        row: &StepRow<'_>,
    ) {
        let start = self.spans.last().map_or(0, |span| span.start);
        for token in 0..len {
            let position = row.first_pos + first + token;
            let is_open = policy.fixed(layer, position).is_none();
            if is_open && row.state.ffn.recorded(layer, position).is_none() {
                self.watched.push(Watched { row: index, position, token: start + token });
            }
        }
    }
}

/// Whether the token at `position` leaves out the FFN of `layer`.
fn decide(policy: &FfnPolicy, state: &mut RowState, (layer, position): (usize, usize), agreed: bool) -> bool {
    if let Some(fixed) = policy.fixed(layer, position) {
        return fixed;
    }
    if let Some(recorded) = state.ffn.recorded(layer, position) {
        return recorded;
    }
    let aligned = matches!(policy.rule, FfnRule::Adaptive { quorum: Some(_), .. });
    let skips = state.ffn.votes(policy, position) && (agreed || !aligned);
    if skips {
        state.ffn.skip(layer, position);
    }
    skips
}

/// The vote of the rows that decide together: enough of the step's rows would skip. A row of another
/// plan needs the block's weights, and so votes against, unless it does not run the block anyway.
fn votes_agree(layer: usize, rows: &[StepRow<'_>]) -> bool {
    let Some((quorum, voters)) = Route::quorum(layer, rows) else { return false };
    let votes = |row: &&StepRow<'_>| {
        let last = row.first_pos + row.tokens.len() - 1;
        let Some(policy) = row.plan.ffn() else { return false };
        row.plan.runs(layer, Sublayer::Ffn, row.first_pos)
            && policy.fixed(layer, last).is_none()
            && row.state.ffn.recorded(layer, last).is_none()
            && row.tokens.len() == 1
            && row.state.ffn.votes(policy, last)
    };
    rows.iter().filter(votes).count() as f32 >= quorum * voters as f32
}

/// Sublayers that a row runs, in thousandths of its tokens.
fn work_per_token(row: &StepRow<'_>) -> usize {
    let range = (row.first_pos, row.tokens.len());
    let halves = [Sublayer::Attention, Sublayer::Ffn];
    let of_layer = |layer| halves.iter().map(|&half| row.plan.active_len(layer, half, range)).sum::<usize>();
    (0..row.plan.num_layers()).map(of_layer).sum::<usize>() * 1000 / row.tokens.len()
}
