//! What is sent and when: a function of a seed, so that a run can be repeated and two servers get the same.

mod lengths;
mod mix;
mod trace;

use std::time::Duration;

pub use lengths::Lengths;
pub use mix::Share;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
pub use trace::{Entry, read as read_trace};

/// Streams of random numbers below this one are the requests'.
const ARRIVALS: u64 = u64::MAX;

/// Common words, each one token with its space in the vocabularies of today's models. A text of them has
/// about the length asked for in anybody's tokens; reports say what the server counted.
const WORDS: [&str; 64] = [
    "the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with", "his",
    "they", "at", "be", "this", "from", "have", "or", "by", "one", "had", "not", "but", "what", "all",
    "were", "when", "we", "there", "can", "an", "your", "which", "their", "said", "if", "do", "will", "each",
    "about", "how", "up", "out", "them", "then", "she", "many", "some", "so", "these", "would", "other",
    "into", "has", "more", "her", "two", "like", "him", "see",
];

/// A request to send.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// The prompt's text.
    pub prompt: String,
    /// Tokens to generate.
    pub max_tokens: usize,
    /// Index of its [`Share`].
    pub share: usize,
    /// Seed of its sampling.
    pub seed: u32,
}

/// A request and when it is to be sent, from the start of the run.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    /// When.
    pub due: Duration,
    /// What.
    pub call: Call,
}

/// A repeatable stream of requests.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Everything random follows from it.
    pub seed: u64,
    /// Lengths of prompts.
    pub prompt: Lengths,
    /// Lengths of outputs.
    pub output: Lengths,
    /// At least one.
    pub shares: Vec<Share>,
    /// Requests that were recorded, used in turn; empty when all are drawn.
    pub trace: Vec<Entry>,
}

impl Workload {
    /// Request number `index`. It depends on no other.
    pub fn call(&self, index: u64) -> Call {
        let mut rng = self.rng(index);
        let recorded = usize::try_from(index).ok().and_then(|i| self.trace.get(i % self.trace.len().max(1)));
        let recorded = recorded.cloned().unwrap_or_default();
        let words = recorded.prompt_tokens.unwrap_or_else(|| self.prompt.draw(&mut rng));
        let max_tokens = recorded.output_tokens.unwrap_or_else(|| self.output.draw(&mut rng));
        let share = mix::draw(&self.shares, &mut rng);
        let seed = rng.random();
        let prompt = recorded.prompt.unwrap_or_else(|| {
            let words = (0..words.max(1)).map(|_| WORDS[rng.random_range(0..WORDS.len())]);
            words.collect::<Vec<_>>().join(" ")
        });
        Call { prompt, max_tokens: max_tokens.max(1), share, seed }
    }

    /// The requests of an open loop: at the times of the trace where it has them, else a Poisson process of
    /// `per_second`; those due before `duration`, `most` at most.
    pub fn open_loop(&self, per_second: f64, (duration, most): (Duration, usize)) -> Vec<Planned> {
        let mut rng = self.rng(ARRIVALS);
        let mut clock = 0.0;
        let poisson = std::iter::repeat_with(move || {
            clock += -(1.0 - rng.random::<f64>()).ln() / per_second;
            clock
        });
        let recorded: Vec<f64> = self.trace.iter().filter_map(|entry| entry.at).collect();
        let times: Box<dyn Iterator<Item = f64>> =
            if recorded.is_empty() { Box::new(poisson) } else { Box::new(recorded.into_iter()) };
        let times = times.map(|at| Duration::try_from_secs_f64(at).unwrap_or(Duration::MAX));
        let planned = times.take_while(|&due| due < duration).take(most).zip(0..);
        planned.map(|(due, index)| Planned { due, call: self.call(index) }).collect()
    }

    fn rng(&self, stream: u64) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(stream);
        rng
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(seed: u64) -> Workload {
        let shares = ["eco=3", "dense"].map(|text| text.parse().expect("a share")).to_vec();
        let (prompt, output) = (Lengths::Uniform { low: 5, high: 50 }, Lengths::Fixed(9));
        Workload { seed, prompt, output, shares, trace: Vec::new() }
    }

    #[test]
    fn a_run_can_be_repeated() {
        let minute = (Duration::from_secs(60), usize::MAX);
        let first = workload(1).open_loop(20.0, minute);
        assert_eq!(first, workload(1).open_loop(20.0, minute));
        assert_ne!(first, workload(2).open_loop(20.0, minute));
        // A longer run begins as the shorter one did, and a closed loop sends the same requests.
        assert_eq!(first, workload(1).open_loop(20.0, (Duration::from_secs(90), first.len())));
        assert_eq!(first[7].call, workload(1).call(7));
    }

    #[test]
    fn arrivals_are_poisson_and_shares_are_kept() {
        let all = workload(1).open_loop(50.0, (Duration::from_secs(100), usize::MAX));
        // 5,000 are expected; three standard deviations are 212.
        assert!((4788..=5212).contains(&all.len()), "{}", all.len());
        let gaps: Vec<f64> = all.windows(2).map(|w| (w[1].due - w[0].due).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.05, "an exponential's deviation is its mean");
        let eco = all.iter().filter(|planned| planned.call.share == 0).count() as f64;
        assert!((eco / all.len() as f64 - 0.75).abs() < 0.02);
    }

    #[test]
    fn a_trace_gives_times_texts_and_lengths() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let lines = "{\"at\": 0.5, \"prompt\": \"Hello\", \"output_tokens\": 3}\n\n{\"at\": 2, \"prompt_tokens\": 4}\n";
        std::fs::write(file.path(), lines).expect("written");
        let trace = read_trace(file.path()).expect("a trace");
        let planned = Workload { trace, ..workload(1) }.open_loop(1.0, (Duration::from_secs(9), 9));
        assert_eq!(planned.len(), 2);
        assert_eq!((planned[0].due.as_millis(), &*planned[0].call.prompt), (500, "Hello"));
        assert_eq!(planned[0].call.max_tokens, 3);
        assert_eq!((planned[1].call.prompt.split(' ').count(), planned[1].call.max_tokens), (4, 9));
        for (text, says) in [
            ("", "no requests"),
            ("{\"at\": -1}", "line 1"),
            ("{\"at\": 1}\n{}", "every line"),
            ("{\"x\": 1}", "`x`"),
        ] {
            std::fs::write(file.path(), text).expect("written");
            assert!(read_trace(file.path()).is_err_and(|e| e.contains(says)), "{text}");
        }
    }
}
