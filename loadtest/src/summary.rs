//! From records to figures.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::drive::{Record, Timing, failures};

/// Significant digits of a recorded latency.
const DIGITS: u8 = 3;

/// A distribution of latencies, in milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Percentiles {
    /// Samples.
    pub count: u64,
    /// Arithmetic mean.
    pub mean: f64,
    /// Half of the samples are at most this.
    pub p50: f64,
    /// Nine in ten.
    pub p90: f64,
    /// 99 in a hundred.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

impl Percentiles {
    /// Of `samples`; `None` when there are none.
    pub fn of(samples: impl Iterator<Item = Duration>) -> Option<Self> {
        let mut histogram = Histogram::<u64>::new(DIGITS).ok()?;
        for sample in samples {
            // Microseconds; the histogram resizes itself and takes any of them.
            histogram.record(u64::try_from(sample.as_micros()).unwrap_or(u64::MAX)).ok()?;
        }
        let ms = |micros: u64| micros as f64 / 1000.0;
        let at = |quantile| ms(histogram.value_at_quantile(quantile));
        (!histogram.is_empty()).then(|| Self {
            count: histogram.len(),
            mean: histogram.mean() / 1000.0,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            max: ms(histogram.max()),
        })
    }
}

/// What counts as good enough. A target that is not set is met; one that cannot be measured, because answers
/// are not streamed or have a single token, is met too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Targets {
    /// Milliseconds to the first token at most.
    pub ttft_ms: Option<f64>,
    /// Milliseconds per further token at most, as a request's mean.
    pub tpot_ms: Option<f64>,
    /// Milliseconds to the end at most.
    pub e2e_ms: Option<f64>,
}

impl Targets {
    /// Whether any is set.
    pub fn any(&self) -> bool {
        *self != Self::default()
    }

    /// Whether an answer met them all.
    pub fn met_by(&self, timing: &Timing) -> bool {
        let within = |target: Option<f64>, value: Option<Duration>| match (target, value) {
            (Some(target), Some(value)) => value.as_secs_f64() * 1000.0 <= target,
            _ => true,
        };
        within(self.ttft_ms, timing.first_token)
            && within(self.tpot_ms, timing.per_token)
            && within(self.e2e_ms, Some(timing.total))
    }
}

/// Requests that met every target. A failed request met none.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Goodput {
    /// What was asked for.
    pub targets: Targets,
    /// Of all requests that were due.
    pub share: f64,
    /// A second.
    pub requests_per_second: f64,
}

/// A run in figures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Requests that were due, those of the warm-up apart.
    pub requests: usize,
    /// Of those, answered.
    pub completed: usize,
    /// The others, by kind.
    pub errors: BTreeMap<String, usize>,
    /// From the first request that was due to the last answer, in seconds.
    pub seconds: f64,
    /// Answered requests a second.
    pub requests_per_second: f64,
    /// Generated tokens a second.
    pub output_tokens_per_second: f64,
    /// Prompt tokens a second.
    pub prompt_tokens_per_second: f64,
    /// Mean tokens of an answered request's prompt and output.
    pub tokens_per_request: [f64; 2],
    /// From when a request was due to its first text, in milliseconds.
    pub ttft_ms: Option<Percentiles>,
    /// Time per token after the first, one sample a request, in milliseconds.
    pub tpot_ms: Option<Percentiles>,
    /// From when a request was due to the end of its answer, in milliseconds.
    pub e2e_ms: Option<Percentiles>,
    /// Where targets were given.
    pub goodput: Option<Goodput>,
    /// Joules per generated token, where the server reports energy.
    pub joules_per_token: Option<f64>,
    /// Where the joules come from.
    pub joules_source: Option<String>,
    /// How late this program itself sent requests, at the 99th percentile, in milliseconds. Part of the
    /// latencies; more than a few mean that the client is too slow for the load.
    pub send_delay_p99_ms: f64,
    /// Answers by the profile that the server says it ran.
    pub profiles: BTreeMap<String, usize>,
}

impl Summary {
    /// Of records whose requests were due from `warmup` on.
    pub fn of(records: &[Record], warmup: Duration, targets: Targets) -> Self {
        let counted: Vec<&Record> = records.iter().filter(|record| record.due >= warmup).collect();
        let timings: Vec<&Timing> =
            counted.iter().filter_map(|record| record.outcome.as_ref().ok()).collect();
        let first = counted.iter().map(|record| record.due).min().unwrap_or_default();
        let last = counted.iter().map(|record| record.end).max().unwrap_or_default();
        let seconds = last.saturating_sub(first).as_secs_f64();
        let rate = |count: f64| if seconds > 0.0 { count / seconds } else { 0.0 };
        let sum = |of: fn(&Timing) -> u64| timings.iter().map(|timing| of(timing)).sum::<u64>() as f64;
        let (prompt, output) = (sum(|t| t.usage.prompt_tokens), sum(|t| t.usage.completion_tokens));
        let good = timings.iter().filter(|timing| targets.met_by(timing)).count() as f64;
        let mean = |total: f64| total / timings.len().max(1) as f64;
        let mut profiles = BTreeMap::new();
        for profile in timings.iter().filter_map(|timing| timing.usage.profile.clone()) {
            *profiles.entry(profile).or_default() += 1;
        }
        let delays = Percentiles::of(counted.iter().map(|record| record.sent.saturating_sub(record.due)));
        Self {
            requests: counted.len(),
            completed: timings.len(),
            errors: failures(counted.iter().copied()),
            seconds,
            requests_per_second: rate(timings.len() as f64),
            output_tokens_per_second: rate(output),
            prompt_tokens_per_second: rate(prompt),
            tokens_per_request: [mean(prompt), mean(output)],
            ttft_ms: Percentiles::of(timings.iter().filter_map(|timing| timing.first_token)),
            tpot_ms: Percentiles::of(timings.iter().filter_map(|timing| timing.per_token)),
            e2e_ms: Percentiles::of(timings.iter().map(|timing| timing.total)),
            goodput: targets.any().then(|| Goodput {
                targets,
                share: good / counted.len().max(1) as f64,
                requests_per_second: rate(good),
            }),
            joules_per_token: joules(&timings).filter(|_| output > 0.0).map(|joules| joules / output),
            joules_source: timings.iter().find_map(|timing| timing.usage.joules_source.clone()),
            send_delay_p99_ms: delays.map_or(0.0, |delays| delays.p99),
            profiles,
        }
    }
}

/// Their sum, if every answer has them: a sum over some would be too small.
fn joules(timings: &[&Timing]) -> Option<f64> {
    timings.iter().map(|timing| timing.usage.joules).sum()
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::client::{Failure, Usage};

    #[test]
    fn percentiles_are_those_of_the_sorted_samples() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        // From 10 µs to 100 s, evenly in the logarithm.
        let mut micros: Vec<u64> =
            (0..20_001).map(|_| 10f64.powf(rng.random_range(1.0..8.0)) as u64).collect();
        let found = Percentiles::of(micros.iter().map(|&us| Duration::from_micros(us))).expect("samples");
        micros.sort_unstable();
        let exact = |quantile: f64| micros[(quantile * 20_000.0) as usize] as f64 / 1000.0;
        for (got, expected) in [
            (found.p50, exact(0.5)),
            (found.p90, exact(0.9)),
            (found.p99, exact(0.99)),
            (found.max, exact(1.0)),
        ] {
            assert!((got / expected - 1.0).abs() < 0.002, "{got} for {expected}");
        }
        assert_eq!(found.count, 20_001);
        assert_eq!(Percentiles::of(std::iter::empty()), None);
    }

    fn record(due_ms: u64, outcome: Result<[u64; 3], Failure>) -> Record {
        let ms = Duration::from_millis;
        let end = ms(due_ms) + outcome.as_ref().map_or(ms(0), |[_, _, total]| ms(*total));
        let outcome = outcome.map(|[first, token, total]| Timing {
            first_token: Some(ms(first)),
            per_token: Some(ms(token)),
            total: ms(total),
            usage: Usage { prompt_tokens: 10, completion_tokens: 5, joules: Some(0.5), ..Usage::default() },
        });
        Record { share: 0, due: ms(due_ms), sent: ms(due_ms + 1), end, outcome }
    }

    #[test]
    fn goodput_counts_every_request_that_was_due() {
        let records = [
            record(0, Ok([900, 90, 9000])),
            record(1000, Ok([100, 10, 150])),
            record(2000, Ok([100, 30, 200])),
            record(2500, Err(Failure::Timeout)),
            record(2900, Ok([201, 10, 2100])),
        ];
        let targets = Targets { ttft_ms: Some(200.0), tpot_ms: Some(20.0), e2e_ms: None };
        let summary = Summary::of(&records, Duration::from_secs(1), targets);
        assert_eq!((summary.requests, summary.completed), (4, 3), "the warm-up is left out");
        assert_eq!(summary.errors["timeout"], 1);
        assert_eq!(summary.seconds, 4.0);
        assert_eq!((summary.output_tokens_per_second, summary.prompt_tokens_per_second), (3.75, 7.5));
        let goodput = summary.goodput.expect("targets are set");
        assert_eq!((goodput.share, goodput.requests_per_second), (0.25, 0.25));
        assert_eq!(summary.joules_per_token, Some(0.1));
        assert!((summary.send_delay_p99_ms - 1.0).abs() < 0.01);
    }

    #[test]
    fn joules_that_some_answers_lack_are_not_summed() {
        let mut records = [record(0, Ok([1, 1, 1])), record(1, Ok([1, 1, 1]))];
        if let Ok(timing) = &mut records[1].outcome {
            timing.usage.joules = None;
        }
        let summary = Summary::of(&records, Duration::ZERO, Targets::default());
        assert_eq!((summary.joules_per_token, summary.goodput), (None, None));
    }
}
