//! Latencies since they were last looked at, for the governor: histograms keep everything since the start.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use super::SchedulerGauges;

/// Buckets an octave: a quantile is right within a tenth.
const PER_OCTAVE: f64 = 8.0;
/// From a microsecond to an hour.
const BUCKETS: usize = 256;

/// What the server is doing now.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Load {
    /// Sequences in the waiting queue.
    pub waiting: usize,
    /// Share of the KV pool that sequences use.
    pub kv_used: f64,
    /// Sequences that sampled their first token since the last look.
    pub first_tokens: u64,
    /// 90th percentile of their time since arrival; `None` when there was none.
    pub ttft_p90: Option<Duration>,
    /// Mean gap between two tokens of a sequence since the last look; `None` when there was none.
    pub inter_token_mean: Option<Duration>,
}

/// Counters that a look takes away. Lock-free; a sample that comes during a look is in it or in the next.
#[derive(Debug)]
pub(super) struct Recent {
    waiting: AtomicUsize,
    /// Bits of an `f64`.
    kv_used: AtomicU64,
    ttft: [AtomicU32; BUCKETS],
    gaps: AtomicU64,
    gap_micros: AtomicU64,
}

impl Default for Recent {
    fn default() -> Self {
        Self {
            waiting: AtomicUsize::default(),
            kv_used: AtomicU64::default(),
            ttft: std::array::from_fn(|_| AtomicU32::default()),
            gaps: AtomicU64::default(),
            gap_micros: AtomicU64::default(),
        }
    }
}

impl Recent {
    pub(super) fn scheduler(&self, now: &SchedulerGauges) {
        let pages = (now.pages_used + now.pages_cached + now.pages_free).max(1);
        self.waiting.store(now.waiting, Ordering::Relaxed);
        self.kv_used.store((now.pages_used as f64 / pages as f64).to_bits(), Ordering::Relaxed);
    }

    pub(super) fn first_token(&self, since_arrival: Duration) {
        let micros = (since_arrival.as_secs_f64() * 1e6).max(1.0);
        let bucket = ((micros.log2() * PER_OCTAVE) as usize).min(BUCKETS - 1);
        self.ttft[bucket].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn inter_token(&self, gap: Duration) {
        self.gaps.fetch_add(1, Ordering::Relaxed);
        self.gap_micros.fetch_add(u64::try_from(gap.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// What there was since the last look.
    pub(super) fn take(&self) -> Load {
        let counts: Vec<u64> =
            self.ttft.iter().map(|count| count.swap(0, Ordering::Relaxed).into()).collect();
        let (gaps, micros) =
            (self.gaps.swap(0, Ordering::Relaxed), self.gap_micros.swap(0, Ordering::Relaxed));
        Load {
            waiting: self.waiting.load(Ordering::Relaxed),
            kv_used: f64::from_bits(self.kv_used.load(Ordering::Relaxed)),
            first_tokens: counts.iter().sum(),
            ttft_p90: quantile(&counts, 0.9),
            inter_token_mean: micros.checked_div(gaps).map(Duration::from_micros),
        }
    }
}

/// The upper bound of the bucket that holds the quantile.
fn quantile(counts: &[u64], quantile: f64) -> Option<Duration> {
    let total: u64 = counts.iter().sum();
    let rank = (total as f64 * quantile).ceil() as u64;
    let mut seen = 0;
    let bucket = counts.iter().position(|count| {
        seen += count;
        seen >= rank
    });
    let micros = ((bucket? + 1) as f64 / PER_OCTAVE).exp2();
    (total > 0).then(|| Duration::from_secs_f64(micros / 1e6))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_sees_what_came_since_the_last_one() {
        let recent = Recent::default();
        for ms in 1..=100 {
            recent.first_token(Duration::from_millis(ms));
            recent.inter_token(Duration::from_millis(ms * 2));
        }
        recent.scheduler(&SchedulerGauges {
            waiting: 7,
            pages_used: 3,
            pages_cached: 1,
            pages_free: 8,
            ..SchedulerGauges::default()
        });
        let load = recent.take();
        assert_eq!((load.waiting, load.kv_used, load.first_tokens), (7, 0.25, 100));
        let p90 = load.ttft_p90.expect("samples").as_secs_f64();
        assert!((0.090..0.100).contains(&p90), "{p90}");
        assert_eq!(load.inter_token_mean, Some(Duration::from_millis(101)));
        let empty = recent.take();
        assert_eq!((empty.first_tokens, empty.ttft_p90, empty.inter_token_mean), (0, None, None));
        recent.first_token(Duration::from_secs(100_000));
        assert!(recent.take().ttft_p90.is_some());
    }
}
