//! Memory budgets: what an operator may ask of the running server, and what it holds. Plain data.

use std::time::Duration;

use serde::Deserialize;

/// Budgets to change; what is `None` stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryTargets {
    /// Bytes that the weights may take.
    pub weights: Option<u64>,
    /// Bytes that the KV pool may take.
    pub kv: Option<u64>,
}

/// What becomes of running requests whose weights a smaller budget takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnShrink {
    /// They go on at once with the KV that they have: what follows is made by what is left, over KV by what was held.
    /// Nobody waits, and the text is that of no single model.
    #[default]
    Continue,
    /// Their KV is computed again by what is left, so that what follows is what these weights alone would write.
    /// Everybody waits for that.
    Recompute,
}

/// What is held, and how far the last change has come.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MemoryStatus {
    /// Counts changes: a status of this number or a later one knows of the change that was answered with it.
    pub change: u64,
    /// Weights.
    pub weights: WeightMemory,
    /// The KV pool.
    pub kv: KvMemory,
}

/// How far a budget that was asked for has been reached.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Progress {
    /// Time since it was asked for.
    pub elapsed: Duration,
    /// Time that it took to reach; `None` while it is under way, or has stopped on its way.
    pub reached: Option<Duration>,
}

/// Weights held.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct WeightMemory {
    /// Bytes allowed; `None` when nobody set a budget.
    pub budget: Option<u64>,
    /// Bytes held now.
    pub held: u64,
    /// Bytes that the model cannot do without.
    pub least: u64,
    /// Bytes of the whole model.
    pub most: u64,
    /// Blocks held over the base; 0 of 0 where the weights cannot be held in part.
    pub blocks: usize,
    /// Blocks of the whole model.
    pub num_blocks: usize,
    /// Of `num_blocks`, those that the budget allows.
    pub target_blocks: usize,
    /// Levels of a matrix on average, where weights have levels.
    pub levels: f64,
    /// Why growing has stopped before the budget was reached.
    pub error: Option<String>,
    /// The last change.
    pub progress: Progress,
}

/// The KV pool.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct KvMemory {
    /// Bytes allowed.
    pub budget: u64,
    /// Bytes of the pool now: what it may fill, not what is resident of it.
    pub held: u64,
    /// Bytes with which one block of tokens can be served.
    pub least: u64,
    /// Bytes of a page.
    pub page_bytes: u64,
    /// Pages that the budget allows.
    pub target_pages: usize,
    /// Pages that sequences hold.
    pub pages_used: usize,
    /// Pages of cached prefixes that no sequence holds.
    pub pages_cached: usize,
    /// Pages that hold nothing.
    pub pages_free: usize,
    /// The last change.
    pub progress: Progress,
}

impl MemoryStatus {
    /// Whether what is held is what the budgets say.
    pub fn is_reached(&self) -> bool {
        self.weights.progress.reached.is_some() && self.kv.progress.reached.is_some()
    }

    /// Whether nothing moves any more: the budgets are reached, or growing has failed.
    pub fn is_settled(&self) -> bool {
        self.kv.progress.reached.is_some()
            && (self.weights.progress.reached.is_some() || self.weights.error.is_some())
    }

    /// Fails when `targets` cannot be served with, whatever else is given up.
    ///
    /// # Errors
    /// A sentence with the least or the largest possible figure, and the name of the budget that it is about.
    pub fn check(&self, targets: &MemoryTargets) -> Result<(), (&'static str, String)> {
        if let Some(asked) = targets.kv {
            let least = self.kv.least;
            if asked < least {
                let message = format!(
                    "memory.kv is {}; this model needs at least {}, for one block of tokens",
                    of(asked),
                    of(least)
                );
                return Err(("kv", message));
            }
            let most =
                machine_memory().unwrap_or(u64::MAX).min(self.kv.page_bytes.saturating_mul(u32::MAX.into()));
            if asked > most {
                return Err((
                    "kv",
                    format!(
                        "memory.kv is {}; the most that this machine can hold is {}",
                        of(asked),
                        of(most)
                    ),
                ));
            }
        }
        match targets.weights {
            Some(asked) if asked < self.weights.least => {
                let whole =
                    if self.weights.num_blocks == 0 { ", and they cannot be held in part" } else { "" };
                let least = of(self.weights.least);
                Err((
                    "weights",
                    format!(
                        "memory.weights is {}; the weights of this model need at least {least}{whole}",
                        of(asked)
                    ),
                ))
            }
            _ => Ok(()),
        }
    }
}

/// A size as people read it, and exactly.
pub fn of(bytes: u64) -> String {
    format!("{bytes} bytes ({:.2} MiB)", bytes as f64 / f64::from(1 << 20))
}

/// Bytes of memory that the machine has, where it says so.
pub fn machine_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}
