//! A meter's counter as the hardware has it, made into energy that only grows.

use std::time::{Duration, Instant};

/// No package, memory or GPU draws more than this: what looks like more is a counter that was reset.
const MOST_WATTS: f64 = 5000.0;
/// Counters are updated now and then: what came in one reading may be of this much longer a time.
const SLACK: Duration = Duration::from_secs(1);

/// What a reading of a counter means.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Advance {
    /// Joules since the reading before.
    Joules(f64),
    /// The counter was set back: nobody knows how much was used since the reading before.
    Reset,
}

/// A counter of energy.
#[derive(Debug, Clone)]
pub(super) struct Counter {
    /// Joules of one count.
    unit: f64,
    /// The counter begins at zero again after so many counts; 0 for one that never does.
    range: u64,
    last: u64,
    at: Instant,
}

impl Counter {
    /// A counter that shows `count` now.
    pub(super) fn new(unit: f64, range: u64, (count, at): (u64, Instant)) -> Self {
        Self { unit, range, last: count, at }
    }

    /// Takes a later reading.
    pub(super) fn advance(&mut self, count: u64, at: Instant) -> Advance {
        let before = std::mem::replace(&mut self.last, count);
        let elapsed = at.saturating_duration_since(std::mem::replace(&mut self.at, at)) + SLACK;
        let counts = match count.checked_sub(before) {
            Some(counts) => counts,
            None if self.range > before => self.range - before + count,
            None => return Advance::Reset,
        };
        let joules = counts as f64 * self.unit;
        if joules > MOST_WATTS * elapsed.as_secs_f64() {
            return Advance::Reset;
        }
        Advance::Joules(joules)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wraps_are_counted_through_and_resets_are_known() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        // RAPL: microjoules, up to 262 J here.
        let range = 262_000_000;
        let mut rapl = Counter::new(1e-6, range, (261_000_000, start));
        let joules = |advance| match advance {
            Advance::Joules(joules) => joules,
            Advance::Reset => f64::NAN,
        };
        assert!((joules(rapl.advance(261_500_000, at(1))) - 0.5).abs() < 1e-9);
        assert!((joules(rapl.advance(1_500_000, at(2))) - 2.0).abs() < 1e-9, "over the end and on");
        assert!((joules(rapl.advance(1_500_000, at(3)))).abs() < 1e-9);
        // NVML: millijoules, never over its end.
        let mut nvml = Counter::new(1e-3, 0, (5_000_000, start));
        assert!((joules(nvml.advance(5_300_000, at(1))) - 300.0).abs() < 1e-9);
        assert_eq!(nvml.advance(10, at(2)), Advance::Reset, "the driver was loaded again");
        assert!((joules(nvml.advance(300_010, at(3))) - 300.0).abs() < 1e-9, "and counts on from there");
        // A counter of a large range that was set back would be a wrap of impossible power.
        let mut large = Counter::new(1e-6, 262_143_328_850, (5_000_000_000, start));
        assert_eq!(large.advance(1_000, at(1)), Advance::Reset);
    }
}
