//! Images that are being encoded beside the steps: their part in the [`super::ledger`]. The rule is in [`super`].

use std::time::{Duration, Instant};

/// An image that is being encoded.
#[derive(Debug)]
struct Encoding {
    id: u64,
    since: Instant,
    /// `None` where a counter was set back meanwhile.
    joules: Option<f64>,
}

/// The images that are being encoded, and those that left the open window.
#[derive(Debug)]
pub(super) struct Encodings {
    /// The encoder's threads as a share of the model's.
    share: f64,
    running: Vec<Encoding>,
    /// Joules of those that ended in the open window.
    left: f64,
    /// One was encoded in the open window.
    any: bool,
}

impl Encodings {
    /// Of an encoder that runs on `share` of as many threads as the model; on 0 where the meter does not see it.
    pub(super) fn new(share: f64) -> Self {
        Self { share, running: Vec::new(), left: 0.0, any: false }
    }

    /// `id` begins.
    pub(super) fn begin(&mut self, id: u64, at: Instant) {
        self.any |= self.share > 0.0;
        self.running.push(Encoding { id, since: at, joules: Some(0.0) });
    }

    /// Whether the energy of the open window is partly an image's.
    pub(super) fn any(&self) -> bool {
        self.any
    }

    /// Joules of the open window that images took when they ended in it.
    pub(super) fn left(&self) -> f64 {
        self.left
    }

    /// What part of a window's energy the running images have, from `start` to `end`, in which steps run or not.
    pub(super) fn part(&self, (start, end): (Instant, Instant), steps_run: bool) -> f64 {
        let own = self.weights((start, end));
        let steps = if steps_run { end.saturating_duration_since(start) } else { Duration::ZERO };
        if own > 0.0 { own / (own + steps.as_secs_f64()) } else { 0.0 }
    }

    fn weights(&self, window: (Instant, Instant)) -> f64 {
        self.running.iter().map(|one| self.weight(one, window)).sum()
    }

    fn weight(&self, one: &Encoding, (start, end): (Instant, Instant)) -> f64 {
        self.share * end.saturating_duration_since(one.since.max(start)).as_secs_f64()
    }

    /// Divides `joules` of `window`, which closes, among the running images.
    pub(super) fn close(&mut self, joules: f64, window: (Instant, Instant)) {
        let all = self.weights(window);
        for index in 0..self.running.len() {
            let own = self.weight(&self.running[index], window);
            if let Some(sum) = self.running[index].joules.as_mut().filter(|_| all > 0.0) {
                *sum += joules * own / all;
            }
        }
        self.next_window();
    }

    /// The window that closes has lost its figures.
    pub(super) fn lose(&mut self) {
        self.running.iter_mut().for_each(|one| one.joules = None);
        self.next_window();
    }

    fn next_window(&mut self) {
        self.left = 0.0;
        self.any = self.share > 0.0 && !self.running.is_empty();
    }

    /// `id` ends inside `window`, at its end, of whose `joules` all running images have `part`. Returns
    /// what it was charged over all windows, and what of this one.
    pub(super) fn end(
        &mut self,
        id: u64,
        (joules, part): (Option<f64>, f64),
        window: (Instant, Instant),
    ) -> (Option<f64>, f64) {
        let all = self.weights(window);
        let Some(index) = self.running.iter().position(|one| one.id == id) else { return (None, 0.0) };
        let one = self.running.swap_remove(index);
        let own = if all > 0.0 { part * self.weight(&one, window) / all } else { 0.0 };
        let newest = joules.map(|joules| joules * own);
        self.left += newest.unwrap_or(0.0);
        (one.joules.zip(newest).map(|(before, newest)| before + newest), newest.unwrap_or(0.0))
    }
}
