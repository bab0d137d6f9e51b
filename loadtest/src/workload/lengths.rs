//! How long prompts and outputs are.

use std::fmt;
use std::str::FromStr;

use rand::Rng;

/// A distribution of lengths in tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Lengths {
    /// Always the same.
    Fixed(usize),
    /// Any of `low..=high` alike.
    Uniform {
        /// The shortest.
        low: usize,
        /// The longest.
        high: usize,
    },
    /// The logarithm is normal: many short ones and a long tail, as real traffic has.
    LogNormal {
        /// Half are shorter.
        median: f64,
        /// Standard deviation of the logarithm.
        sigma: f64,
        /// Longer ones are cut to this.
        most: usize,
    },
}

impl Lengths {
    /// Draws one, at least 1.
    pub fn draw(&self, rng: &mut impl Rng) -> usize {
        let drawn = match *self {
            Self::Fixed(tokens) => tokens,
            Self::Uniform { low, high } => rng.random_range(low..=high),
            Self::LogNormal { median, sigma, most } => {
                // Box and Muller's transform; 1 − u is never 0.
                let (u, v): (f64, f64) = (rng.random(), rng.random());
                let normal = (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos();
                ((median * (sigma * normal).exp()).round() as usize).min(most)
            }
        };
        drawn.max(1)
    }
}

impl fmt::Display for Lengths {
    /// As it is parsed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(tokens) => write!(f, "{tokens}"),
            Self::Uniform { low, high } => write!(f, "uniform:{low}-{high}"),
            Self::LogNormal { median, sigma, most } => write!(f, "lognormal:{median},{sigma},{most}"),
        }
    }
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fail = || {
            format!(
                "`{text}` is no length: write TOKENS, uniform:LOW-HIGH, or lognormal:MEDIAN,SIGMA,MOST, for instance lognormal:128,0.6,1024"
            )
        };
        let (kind, numbers) = text.split_once(':').unwrap_or(("fixed", text));
        let count = |text: &str| text.trim().parse::<usize>().ok().filter(|&n| n > 0).ok_or_else(fail);
        let real = |text: &str| text.trim().parse::<f64>().ok().filter(|n| n.is_finite()).ok_or_else(fail);
        match kind {
            "fixed" => Ok(Self::Fixed(count(numbers)?)),
            "uniform" => {
                let (low, high) = numbers.split_once('-').ok_or_else(fail)?;
                let (low, high) = (count(low)?, count(high)?);
                if low <= high { Ok(Self::Uniform { low, high }) } else { Err(fail()) }
            }
            "lognormal" => {
                let parts: Vec<_> = numbers.split(',').collect();
                let [median, sigma, most] = parts[..] else { return Err(fail()) };
                let (median, sigma) = (real(median)?, real(sigma)?);
                if median < 1.0 || sigma < 0.0 {
                    return Err(fail());
                }
                Ok(Self::LogNormal { median, sigma, most: count(most)? })
            }
            _ => Err(fail()),
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn draws(text: &str) -> Vec<usize> {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let lengths: Lengths = text.parse().expect(text);
        let mut all: Vec<_> = (0..4000).map(|_| lengths.draw(&mut rng)).collect();
        all.sort_unstable();
        all
    }

    #[test]
    fn draws_have_the_distribution_that_was_asked_for() {
        for text in ["7", "uniform:10-19", "lognormal:100,0.5,300"] {
            assert_eq!(text.parse::<Lengths>().map(|lengths| lengths.to_string()).as_deref(), Ok(text));
        }
        assert!(draws("7").iter().all(|&n| n == 7));
        let uniform = draws("uniform:10-19");
        assert_eq!((uniform[0], uniform[3999]), (10, 19));
        assert!((14..=15).contains(&uniform[2000]));
        let log_normal = draws("lognormal:100,0.5,300");
        assert!((95..=105).contains(&log_normal[2000]), "median {}", log_normal[2000]);
        // One standard deviation: e^0.5 = 1.65.
        assert!((155..=175).contains(&log_normal[3365]), "84th percentile {}", log_normal[3365]);
        assert_eq!(log_normal[3999], 300);
    }

    #[test]
    fn what_is_no_length_is_refused() {
        for text in ["", "0", "uniform:5", "uniform:9-3", "lognormal:5", "lognormal:0,1,9", "zipf:3"] {
            assert!(text.parse::<Lengths>().is_err_and(|e| e.contains("uniform:LOW-HIGH")), "{text}");
        }
    }
}
