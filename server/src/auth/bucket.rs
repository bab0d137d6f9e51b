//! A token bucket: an amount that flows in at a steady rate, up to a burst, and is taken out by requests.

use std::time::{Duration, Instant};

/// How much may be taken from a bucket.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// What flows in during a minute, in the bucket's unit (tokens or joules).
    pub per_minute: f64,
    /// What the bucket holds at most, in its unit.
    pub burst: f64,
}

/// A bucket at some moment. Every question says when it is asked, so that the bucket has no clock.
#[derive(Debug, Clone)]
pub(super) struct Bucket {
    rate: Rate,
    /// What is in it at `at`; below zero after requests that took more than was set aside for them.
    level: f64,
    at: Instant,
}

impl Bucket {
    /// A full bucket.
    pub(super) fn new(rate: Rate, now: Instant) -> Self {
        Self { rate, level: rate.burst, at: now }
    }

    /// Goes on at another rate with what is in it, as far as the new burst holds that.
    pub(super) fn set_rate(&mut self, rate: Rate, now: Instant) {
        self.refill(now);
        self.rate = rate;
        self.level = self.level.min(rate.burst);
    }

    /// Takes `amount` and says how much that was. More than the burst is never in the bucket: a request
    /// that wants more needs a full bucket, and [`Bucket::settle`] takes the rest.
    ///
    /// # Errors
    /// How long it takes until that much is there, if nobody else takes anything.
    pub(super) fn take(&mut self, amount: f64, now: Instant) -> Result<f64, Duration> {
        self.refill(now);
        let needed = amount.clamp(0.0, self.rate.burst);
        if self.level < needed {
            let seconds = (needed - self.level) / self.rate.per_minute * 60.0;
            return Err(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX));
        }
        self.level -= needed;
        Ok(needed)
    }

    /// Corrects what a request `took` to what it `used`.
    pub(super) fn settle(&mut self, took: f64, used: f64, now: Instant) {
        self.refill(now);
        self.level = (self.level + took - used).min(self.rate.burst);
    }

    fn refill(&mut self, now: Instant) {
        let seconds = now.saturating_duration_since(self.at).as_secs_f64();
        self.level = (self.level + seconds / 60.0 * self.rate.per_minute).min(self.rate.burst);
        self.at = self.at.max(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_flows_in_again_and_debts_are_paid_first() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut bucket = Bucket::new(Rate { per_minute: 60.0, burst: 100.0 }, start);
        assert_eq!(bucket.take(70.0, at(0)), Ok(70.0));
        assert_eq!(bucket.take(40.0, at(0)), Err(Duration::from_secs(10)), "30 of 40 are there");
        assert_eq!(bucket.take(40.0, at(10)), Ok(40.0), "the promise is kept");
        // The first used a tenth of what it took.
        bucket.settle(70.0, 7.0, at(10));
        assert_eq!(bucket.take(63.0, at(10)), Ok(63.0));
        // More than the burst needs a full bucket, and what it used beyond that is a debt.
        assert_eq!(bucket.take(250.0, at(60)), Err(Duration::from_secs(50)));
        assert_eq!(bucket.take(250.0, at(110)), Ok(100.0));
        bucket.settle(100.0, 250.0, at(110));
        assert_eq!(bucket.take(0.0, at(110)), Err(Duration::from_secs(150)), "nothing, while in debt");
        assert_eq!(bucket.take(0.0, at(260)), Ok(0.0));
        // Time that goes backwards adds nothing.
        assert_eq!(bucket.take(1.0, at(200)), Err(Duration::from_secs(1)));
        // A lower burst spills, a higher one does not fill.
        bucket.set_rate(Rate { per_minute: 60.0, burst: 10.0 }, at(1000));
        bucket.set_rate(Rate { per_minute: 60.0, burst: 50.0 }, at(1000));
        assert_eq!(bucket.take(20.0, at(1000)), Err(Duration::from_secs(10)));
    }
}
