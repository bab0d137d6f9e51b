//! The meter and its books as the engine thread, the timer and the governor share them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::ledger::{Ledger, Paid, Totals, Work};
use super::meter::{Meter, Reading};
use super::{EnergyConfig, Source};
use crate::telemetry::{EnergyMetrics, Metrics};

/// How often the timer looks.
const TICK: Duration = Duration::from_secs(1);

/// What the server's energy is metered by, or nothing.
pub struct Energy {
    metered: Option<Metered>,
}

struct Metered {
    source: Source,
    period: Duration,
    state: Mutex<State>,
    /// Bits of the watts between the last two ticks.
    watts: AtomicU64,
    metrics: EnergyMetrics,
}

struct State {
    meter: Box<dyn Meter>,
    ledger: Ledger,
    /// Steps run: the engine closes the windows.
    busy: bool,
    /// A reading that closed no window has seen a counter set back.
    reset: bool,
    ticked: Reading,
    shown: Totals,
    /// Images that were encoded.
    images: u64,
}

/// An image that is being encoded; dropping it ends it.
#[derive(Debug)]
pub struct ImageMeter<'a> {
    energy: &'a Energy,
    id: u64,
    ended: bool,
}

impl ImageMeter<'_> {
    /// What it was charged, without a meter 0; `None` where nobody knows.
    pub fn end(mut self) -> Option<f64> {
        self.ended = true;
        self.energy.encoded(self.id)
    }
}

impl Drop for ImageMeter<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.energy.encoded(self.id);
        }
    }
}

impl State {
    fn read(&mut self) -> Reading {
        let reading = self.meter.read();
        self.reset |= reading.reset;
        reading
    }

    fn close(&mut self, reading: Reading) -> &[Paid] {
        let reset = std::mem::take(&mut self.reset);
        self.ledger.close(Reading { reset, ..reading })
    }
}

impl Energy {
    /// Nothing is metered.
    pub fn off() -> Self {
        Self { metered: None }
    }

    /// Meters by `meter`, where there is one, and reports to `metrics`.
    pub fn new(meter: Option<Box<dyn Meter>>, config: &EnergyConfig, metrics: &Metrics) -> Self {
        let Some(mut meter) = meter else { return Self::off() };
        let source = meter.source();
        let first = meter.read();
        let idle = if source == Source::Estimate { Some(config.idle_watts()) } else { config.idle };
        // A GPU's counter knows nothing of the encoder, which runs on the processor.
        let encoder_share = if source == Source::Nvml { 0.0 } else { config.encoder_share };
        let state = State {
            meter,
            ledger: Ledger::new(first, idle, encoder_share),
            busy: false,
            reset: false,
            ticked: first,
            shown: Totals::default(),
            images: 0,
        };
        Self {
            metered: Some(Metered {
                source,
                period: config.period.unwrap_or(source.period()),
                state: Mutex::new(state),
                watts: AtomicU64::new(f64::NAN.to_bits()),
                metrics: metrics.energy(source),
            }),
        }
    }

    /// What it is metered by.
    pub fn source(&self) -> Option<Source> {
        self.metered.as_ref().map(|metered| metered.source)
    }

    /// Watts as of the last tick; `None` before the second, and without a meter.
    pub fn watts(&self) -> Option<f64> {
        let watts = f64::from_bits(self.metered.as_ref()?.watts.load(Ordering::Relaxed));
        watts.is_finite().then_some(watts)
    }

    /// Joules so far, and of them what was charged beyond what the meter has said.
    pub fn totals(&self) -> Option<(Totals, f64)> {
        let ledger = &self.metered.as_ref()?.state().ledger;
        Some((ledger.totals(), ledger.debt()))
    }

    /// Steps begin: what was used until now is nobody's.
    pub fn resume(&self) {
        let Some(metered) = &self.metered else { return };
        let mut state = metered.state();
        let reading = state.read();
        state.close(reading);
        state.busy = true;
        metered.show(&mut state);
    }

    /// No step runs any more.
    pub fn rest(&self) {
        if let Some(metered) = &self.metered {
            metered.state().busy = false;
        }
    }

    /// A step's rows did this. What they, and those of earlier steps, are charged is put into `paid`, once a window
    /// ends.
    pub fn step(&self, work: impl IntoIterator<Item = Work>, paid: &mut Vec<Paid>) {
        let Some(metered) = &self.metered else { return };
        let mut state = metered.state();
        state.ledger.add(work);
        if metered.period > Duration::ZERO && state.ledger.age(std::time::Instant::now()) < metered.period {
            return;
        }
        let reading = state.read();
        paid.extend_from_slice(state.close(reading));
        metered.show(&mut state);
    }

    /// `id` ends: what it is charged for what it did in the window that is open, prefill and decode; `None` where
    /// nobody knows.
    pub fn leave(&self, id: u64) -> Option<[f64; 2]> {
        match &self.metered {
            Some(metered) => metered.state().ledger.leave(id),
            None => Some([0.0; 2]),
        }
    }

    /// An image is being encoded from now on, until the answer is ended.
    pub fn encode(&self) -> ImageMeter<'_> {
        let id = self.metered.as_ref().map_or(0, |metered| {
            let mut state = metered.state();
            state.images += 1;
            let id = state.images;
            state.ledger.encode(id, std::time::Instant::now());
            id
        });
        ImageMeter { energy: self, id, ended: false }
    }

    fn encoded(&self, id: u64) -> Option<f64> {
        let Some(metered) = &self.metered else { return Some(0.0) };
        let mut state = metered.state();
        let reading = state.read();
        let (reset, busy) = (state.reset, state.busy);
        state.ledger.encoded(id, Reading { reset, ..reading }, busy)
    }

    /// Looks at the meter; while nothing runs, what was used is nobody's.
    pub fn tick(&self) {
        let Some(metered) = &self.metered else { return };
        let mut state = metered.state();
        let reading = state.read();
        let before = std::mem::replace(&mut state.ticked, reading);
        let seconds = (reading.at - before.at).as_secs_f64();
        if seconds > 0.0 && !reading.reset {
            let watts = (reading.joules - before.joules) / seconds;
            metered.watts.store(watts.to_bits(), Ordering::Relaxed);
            metered.metrics.watts(watts);
        }
        if !state.busy {
            state.close(reading);
        }
        metered.show(&mut state);
    }

    /// Ticks for ever.
    pub async fn run(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.tick();
        }
    }
}

impl Metered {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn show(&self, state: &mut State) {
        let totals = state.ledger.totals();
        self.metrics.totals(&std::mem::replace(&mut state.shown, totals), &totals);
    }
}

impl std::fmt::Debug for Energy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Energy").field("source", &self.source()).finish_non_exhaustive()
    }
}
