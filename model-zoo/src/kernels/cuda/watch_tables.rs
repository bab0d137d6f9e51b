//! Which tokens of a step may leave out which FFNs, as the kernels read it, and what they decided.

use super::device::Part;
use super::ffn::{RULE_WORDS, STATE_WORDS, Skips, TALLY_WORDS, WATCHED_WORDS, Watch};
use crate::Result;
use crate::compression::ffn_skip::FfnRule;
use crate::compression::route::{Route, Watched};
use crate::step::{StepBatch, StepRow};

/// No token, or no layer.
const NONE: u32 = u32::MAX;

/// See the module. All of it lies at one place of the step's words.
#[derive(Debug, Default)]
pub(super) struct WatchTables {
    /// Of each layer: the tokens that are watched there.
    watched: Vec<Vec<Watched>>,
    /// Tokens in the list of a layer that has one.
    listed: Vec<usize>,
    /// Where the rules, the tallies, the states and the lists begin.
    at: [usize; 4],
    /// Words of a token's state.
    stride: usize,
    tokens: usize,
    /// States of the step's tokens when the part before this one had run; nothing in its first part.
    carried: Vec<u32>,
}

impl WatchTables {
    /// Begins a step.
    pub(super) fn begin(&mut self) {
        self.carried.clear();
    }

    /// What the route watches in each layer's FFN, and how many tokens run it.
    pub(super) fn lay(
        &mut self,
        (batch, route): (&StepBatch<'_>, &Route),
        (watched, runs): (Vec<Vec<Watched>>, &[usize]),
        (tokens, is_uniform): (usize, bool),
        words: &mut Vec<u32>,
    ) {
        self.watched = watched;
        self.tokens = tokens;
        self.listed.clear();
        if !self.watches() {
            return;
        }
        let layers = self.watched.len();
        self.stride = STATE_WORDS + layers.div_ceil(32);
        self.at[0] = words.len();
        words.extend(batch.rows.iter().flat_map(rule));
        // Rows are padded like tokens, so that steps of a class have all else at the same place.
        let rows = if is_uniform { tokens } else { batch.rows.len() };
        words.resize(self.at[0] + RULE_WORDS * rows, 0);
        self.at[1] = words.len();
        let votes = self.votes(batch, route);
        let tally = |layer: usize| [votes[layer], needed(layer, &batch.rows), runs[layer] as u32];
        words.extend((0..layers).flat_map(tally));
        self.at[2] = words.len();
        words.extend_from_slice(&self.carried);
        words.resize(self.at[2] + self.stride * tokens, 0);
        self.at[3] = words.len();
        let nexts = self.nexts(batch, route);
        for (watched, nexts) in self.watched.iter().zip(nexts) {
            let listed = match watched.len() {
                0 => 0,
                _ if is_uniform => tokens,
                count => count,
            };
            for (token, next) in watched.iter().zip(nexts) {
                words.extend([step_token(token, batch, route), token.row() as u32, next]);
            }
            words.resize(words.len() + WATCHED_WORDS * (listed - watched.len()), NONE);
            self.listed.push(listed);
        }
    }

    /// For each watched token of each layer, the next layer in which it is watched, found from the last layer on.
    fn nexts(&self, batch: &StepBatch<'_>, route: &Route) -> Vec<Vec<u32>> {
        let mut later = vec![NONE; self.tokens];
        let mut of_layer = |(layer, tokens): (usize, &Vec<Watched>)| -> Vec<u32> {
            let own = tokens.iter().map(|token| step_token(token, batch, route) as usize);
            own.map(|token| std::mem::replace(&mut later[token], layer as u32)).collect()
        };
        let mut nexts: Vec<_> = self.watched.iter().enumerate().rev().map(&mut of_layer).collect();
        nexts.reverse();
        nexts
    }

    /// Votes that tokens have cast, when the part before this one had run, for the first layer of this one that watches
    /// them: `[layer]`.
    fn votes(&self, batch: &StepBatch<'_>, route: &Route) -> Vec<u32> {
        let mut votes = vec![0; self.watched.len()];
        if self.carried.is_empty() {
            return votes;
        }
        let mut seen = vec![false; self.tokens];
        for (votes, tokens) in votes.iter_mut().zip(&self.watched) {
            for watched in tokens {
                let token = step_token(watched, batch, route) as usize;
                if !std::mem::replace(&mut seen[token], true) {
                    let [_, _, cap, _, has_vote] = rule(&batch.rows[watched.row()]);
                    // Blocks that it may leave out now, and those that it left out.
                    let [left, count] = [0, 1].map(|word| self.carried[self.stride * token + word]);
                    *votes += u32::from(has_vote == 1 && left > 0 && count < cap);
                }
            }
        }
        votes
    }

    /// Whether some token may leave out some FFN.
    pub(super) fn watches(&self) -> bool {
        self.watched.iter().any(|tokens| !tokens.is_empty())
    }

    /// What launches depend on.
    pub(super) fn class(&self) -> impl Iterator<Item = u32> {
        self.listed.iter().map(|&count| count as u32)
    }

    /// The most tokens that are watched in a layer, with padding.
    pub(super) fn most(&self) -> usize {
        self.listed.iter().copied().max().unwrap_or(0)
    }

    /// Who is watched in `layer`, of which `part(start, words)` are the step's words.
    pub(super) fn of(
        &self,
        layer: usize,
        part: impl Fn(usize, usize) -> Result<Part>,
    ) -> Result<Option<Watch>> {
        let Some(&count) = self.listed.get(layer).filter(|&&count| count > 0) else { return Ok(None) };
        let before: usize = self.listed[..layer].iter().sum();
        let [rules, tallies, states, lists] = self.at;
        let skips = Skips {
            tally: part(tallies + TALLY_WORDS * layer, TALLY_WORDS)?,
            states: part(states, self.stride * self.tokens)?,
            stride: self.stride,
            layer,
        };
        Ok(Some(Watch {
            watched: part(lists + WATCHED_WORDS * before, WATCHED_WORDS * count)?,
            count,
            rules: part(rules, tallies - rules)?,
            tallies: part(tallies, states - tallies)?,
            skips,
        }))
    }

    /// Where the states begin, and how many words they are.
    pub(super) fn states(&self) -> (usize, usize) {
        (self.at[2], self.stride * self.tokens)
    }

    /// Tells the rows what was decided in this part of the step, after which `states` are the words.
    pub(super) fn tell(&mut self, states: Vec<u32>, batch: &mut StepBatch<'_>, route: &Route) {
        for (layer, tokens) in self.watched.iter().enumerate() {
            for token in tokens {
                let state = step_token(token, batch, route) as usize * self.stride + STATE_WORDS;
                if states[state + layer / 32] >> (layer % 32) & 1 == 1 {
                    Route::skipped(*token, layer, &mut batch.rows);
                }
            }
        }
        self.carried = states;
    }
}

fn step_token(token: &Watched, batch: &StepBatch<'_>, route: &Route) -> u32 {
    (route.start(token.row()) + token.position() - batch.rows[token.row()].first_pos) as u32
}

fn rule(row: &StepRow<'_>) -> [u32; RULE_WORDS] {
    let Some(policy) = row.plan.ffn() else { return [0; RULE_WORDS] };
    let FfnRule::Adaptive { threshold, max_skip, quorum } = policy.rule else { return [0; RULE_WORDS] };
    let (aligned, votes) = (u32::from(quorum.is_some()), u32::from(row.tokens.len() == 1));
    [threshold.to_bits(), max_skip as u32, policy.cap as u32, aligned, votes]
}

/// Votes that it takes for the rows that decide together to leave out the FFN of `layer`.
fn needed(layer: usize, rows: &[StepRow<'_>]) -> u32 {
    let Some((quorum, voters)) = Route::quorum(layer, rows) else { return NONE };
    (0..=voters).find(|&votes| votes as f32 >= quorum * voters as f32).map_or(NONE, |votes| votes as u32)
}
