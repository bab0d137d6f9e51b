//! Who pays for what the meter counts. Pure: readings and work in, joules out. The rule is in [`super`].

use std::time::{Duration, Instant};

use super::encodings::Encodings;
use super::meter::Reading;

/// An idle window of at least this long says what the machine draws when nothing runs.
const IDLE_WINDOW: Duration = Duration::from_millis(500);
/// Weight of the newest window in averages.
const NEWEST: f64 = 0.2;

/// What a row was doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Its prompt, or everything again after a preemption.
    Prefill,
    /// One token after the other.
    Decode,
}

/// What a row did in a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Work {
    /// Whose it is.
    pub id: u64,
    /// What it was doing.
    pub phase: Phase,
    /// How much, in any unit that is the same for all.
    pub amount: f64,
}

/// What a piece of work was charged.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Paid {
    /// Whose it was.
    pub id: u64,
    /// What it was doing.
    pub phase: Phase,
    /// Joules; `None` where a counter was set back meanwhile, so that nobody knows.
    pub joules: Option<f64>,
}

/// Joules since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Totals {
    /// Charged for prefill.
    pub prefill: f64,
    /// Charged for decode.
    pub decode: f64,
    /// Charged for encoding images.
    pub image: f64,
    /// Charged to nobody.
    pub idle: f64,
    /// What the meter said: the sum of the four, less what was charged too early and is still to be paid back.
    pub metered: f64,
    /// Times that a counter was set back.
    pub resets: u64,
}

/// The books.
#[derive(Debug)]
pub struct Ledger {
    last: Reading,
    /// Watts when nothing runs: as told, or learned.
    idle_watts: f64,
    learns_idle: Option<bool>,
    /// Work of the window that is open.
    open: Vec<Work>,
    /// Work and joules of those that left the open window.
    left: (f64, f64),
    encodings: Encodings,
    /// Means of joules and of work over the last windows with work: their ratio is what a unit of work costs.
    /// (The mean of ratios would be that of windows with little work.)
    means: Option<(f64, f64)>,
    /// Joules that were charged beyond what there was.
    debt: f64,
    totals: Totals,
    paid: Vec<Paid>,
}

impl Ledger {
    /// Books that begin with `first`. Where `idle_watts` is not told, it is learned. Images are encoded on
    /// `encoder_share` of as many threads as the model runs on; 0 where the meter does not see the encoder.
    pub fn new(first: Reading, idle_watts: Option<f64>, encoder_share: f64) -> Self {
        Self {
            last: first,
            idle_watts: idle_watts.unwrap_or(0.0),
            learns_idle: idle_watts.is_none().then_some(false),
            open: Vec::new(),
            left: (0.0, 0.0),
            encodings: Encodings::new(encoder_share),
            means: None,
            debt: 0.0,
            totals: Totals::default(),
            paid: Vec::new(),
        }
    }

    /// Joules so far.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Charged so far beyond what the meter has said: 0, or a part of a window.
    pub fn debt(&self) -> f64 {
        self.debt
    }

    /// How long the open window has been open.
    pub fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.last.at)
    }

    /// Of `joules` that were drawn within `elapsed`, what the machine draws when nothing runs.
    fn idle_of(&self, joules: f64, elapsed: Duration) -> f64 {
        joules.min(self.idle_watts * elapsed.as_secs_f64())
    }

    /// Adds work that was done in the open window.
    pub fn add(&mut self, work: impl IntoIterator<Item = Work>) {
        self.open.extend(work);
    }

    /// `id` ends before the window does: what it is charged for its work in it, prefill and decode. `None` where no
    /// window has said yet what work costs.
    pub fn leave(&mut self, id: u64) -> Option<[f64; 2]> {
        let mut joules = [0.0; 2];
        if self.open.iter().all(|work| work.id != id) {
            return Some(joules);
        }
        // Without means its work stays in the window, and its share is charged to somebody who is gone.
        let (mean_joules, mean_work) = self.means?;
        // The deeper in debt, the less is charged early.
        let rate = mean_joules / mean_work * mean_joules / (mean_joules + self.debt).max(f64::MIN_POSITIVE);
        let left = &mut self.left;
        self.open.retain(|work| {
            if work.id == id {
                joules[work.phase as usize] += work.amount * rate;
                left.0 += work.amount;
            }
            work.id != id
        });
        left.1 += joules.iter().sum::<f64>();
        self.totals.prefill += joules[Phase::Prefill as usize];
        self.totals.decode += joules[Phase::Decode as usize];
        Some(joules)
    }

    /// The image `id` is being encoded from now on.
    pub fn encode(&mut self, id: u64, at: Instant) {
        self.encodings.begin(id, at);
    }

    /// The image `id` has been encoded, while steps run or not: what it is charged in all, of the open window what
    /// `reading` says. `None` where a counter was set back meanwhile.
    pub fn encoded(&mut self, id: u64, reading: Reading, steps_run: bool) -> Option<f64> {
        let window = (self.last.at, reading.at);
        let joules = (reading.joules - self.last.joules).max(0.0);
        let idle = self.idle_of(joules, self.age(reading.at));
        let active = (joules - idle - self.left.1 - self.encodings.left()).max(0.0);
        let part = self.encodings.part(window, steps_run);
        let active = (!reading.reset).then_some(active);
        let (all, newest) = self.encodings.end(id, (active, part), window);
        self.totals.image += newest;
        all
    }

    /// Ends the window with `reading` and charges its work.
    pub fn close(&mut self, reading: Reading) -> &[Paid] {
        let (window, elapsed) = ((self.last.at, reading.at), self.age(reading.at));
        let joules = (reading.joules - self.last.joules).max(0.0);
        self.last = reading;
        self.paid.clear();
        let (left_work, left_joules) = std::mem::take(&mut self.left);
        let work: f64 = self.open.iter().map(|work| work.amount).sum();
        if reading.reset {
            self.lose(left_joules);
            return &self.paid;
        }
        self.totals.metered += joules;
        let has_steps = work + left_work > 0.0;
        let is_idle = !has_steps && !self.encodings.any();
        if is_idle && elapsed >= IDLE_WINDOW {
            self.learn_idle(joules / elapsed.as_secs_f64());
        }
        let idle = if is_idle { joules } else { self.idle_of(joules, elapsed) };
        let (active, images_left) = (joules - idle, self.encodings.left());
        // What is left after those that were charged before the window ended.
        let rest = self.settle(active - left_joules - images_left);
        let images = rest * self.encodings.part(window, has_steps);
        self.encodings.close(images, window);
        self.totals.image += images;
        if has_steps {
            let newest = ((active - images_left - images).max(0.0), work + left_work);
            let mean = |old: f64, new: f64| old + NEWEST * (new - old);
            self.means =
                Some(self.means.map_or(newest, |old| (mean(old.0, newest.0), mean(old.1, newest.1))));
        }
        let rest = rest - images;
        let (rest, idle) = if work > 0.0 { (rest, idle) } else { (0.0, idle + rest) };
        self.totals.idle += self.settle(idle);
        self.pay(rest, work);
        &self.paid
    }

    /// What of `joules` can be charged now: debts come first, and what is below zero becomes one.
    fn settle(&mut self, joules: f64) -> f64 {
        let rest = joules - self.debt;
        self.debt = (-rest).max(0.0);
        rest.max(0.0)
    }

    fn pay(&mut self, joules: f64, work: f64) {
        for Work { id, phase, amount } in self.open.drain(..) {
            let own = joules * amount / work;
            match phase {
                Phase::Prefill => self.totals.prefill += own,
                Phase::Decode => self.totals.decode += own,
            }
            self.paid.push(Paid { id, phase, joules: Some(own) });
        }
    }

    /// A window whose energy nobody knows. Those that left it early were charged; the meter is taken to have said
    /// as much.
    fn lose(&mut self, left_joules: f64) {
        self.totals.resets += 1;
        self.totals.metered += left_joules + self.encodings.left();
        self.encodings.lose();
        let lost = |work: Work| Paid { id: work.id, phase: work.phase, joules: None };
        self.paid.extend(self.open.drain(..).map(lost));
    }

    fn learn_idle(&mut self, watts: f64) {
        if let Some(has_learned) = &mut self.learns_idle {
            let known = std::mem::replace(has_learned, true);
            self.idle_watts =
                if known { self.idle_watts + NEWEST * (watts - self.idle_watts) } else { watts };
        }
    }
}
