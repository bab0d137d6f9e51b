//! What requests cost in joules: meters, and the sharing of their figures among the rows of steps.
//!
//! The engine thread says what each step's rows did ([`work`]); a [`meter`] says what was used; the [`ledger`]
//! divides. The scheduler knows nothing of it.
//!
//! **The rule.** A *window* lies between two readings. The engine takes one after a step's forward pass, when the
//! last is at least [`EnergyConfig::period`] old; a timer takes them while no request runs. Of a window of `ΔE`
//! joules and `Δt` seconds
//!
//! ```text
//! E_idle = min(ΔE, P_idle · Δt)      all of ΔE when no step ended in the window
//! E_row  = (ΔE − E_idle) · u_row / Σ u
//! ```
//!
//! where `u` is the work of each row of each step that ended in the window, in multiply-accumulates:
//!
//! ```text
//! u_row = β · (W · w_row / Σ w  +  K_row)  +  C_row
//! w_row = bytes of the weights that the row's tokens ran (on average over them), the output matrix included
//! W     = max over rows of w_row                         weights are read once a step, whoever needs them
//! K_row = slot bytes · Σ over layers (slots before the step + slots written)   KV that is read and written
//! C_row = Σ over sublayers run (weights · tokens) + output matrix · logit rows
//!         + 2 · heads · head_dim · tokens · Σ over layers (slots before the step + tokens / 2)
//! β     = multiply-accumulates that cost as much as moving a byte
//! ```
//!
//! `P_idle` is [`EnergyConfig::idle`], else what was drawn while nothing ran. It stays apart even while requests
//! run: a request is charged what it adds. So the sum over requests and idle is what the meter says, except for what
//! is under way: a request that ends inside a window is charged at the joules per work of the last windows, and the
//! others get the rest; if that was too much, the next windows pay it back.
//!
//! An image is encoded beside the steps, for many windows long. While it is, it takes a share of each of them by the
//! time that the encoder's threads and the model's could run:
//!
//! ```text
//! E_image = (ΔE − E_idle) · s · t / (s · t + Δt)   without Δt when no step ended in the window
//! s       = threads of the encoder ÷ threads of the model (0 where the meter is a GPU's: the encoder is not on it)
//! t       = time of the window in which the encoder had the image
//! ```
//!
//! and the rows share the rest. The first choice of the request that had the image encoded is charged for it when it
//! is queued; whoever finds it in the cache pays nothing. The image of a request that is refused or gone by then is
//! nobody's, but in the totals as `image`. Fetching, decoding and scaling of the file are not in it.
//!
//! A counter that is set back leaves a window whose energy nobody knows. It is in no total, and what ran in it
//! reports no joules at all rather than a part.
//!
//! Charged to whom it is not due: what the front ends use while steps run goes to the rows by the
//! same shares (a processor's counter does not know threads), and so does what other programs of the machine use
//! where the meter counts them. Sampling and commit fall into the next step's window.

mod counter;
mod encodings;
mod estimate;
pub mod ledger;
pub mod meter;
mod nvml;
mod rapl;
mod shared;
#[cfg(test)]
mod tests;
pub mod work;

pub use ledger::{Paid, Phase, Totals, Work};
pub use shared::{Energy, ImageMeter};

use std::path::PathBuf;
use std::time::Duration;

/// Which meter to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum MeterChoice {
    /// That of the device that runs the model (NVML or RAPL), else the estimate.
    #[default]
    Auto,
    /// An NVIDIA GPU's counter.
    Nvml,
    /// The processors' counters.
    Rapl,
    /// An estimate from CPU time.
    Estimate,
    /// None.
    Off,
}

/// What a figure was measured by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// An NVIDIA GPU's counter.
    Nvml,
    /// The processors' counters.
    Rapl,
    /// An estimate from CPU time.
    Estimate,
}

impl Source {
    /// The name on the wire and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nvml => "nvml",
            Self::Rapl => "rapl",
            Self::Estimate => "estimate",
        }
    }

    /// The least time between two readings that say something: how often the source's counter moves.
    fn period(self) -> Duration {
        match self {
            Self::Nvml => Duration::from_millis(100),
            Self::Rapl => Duration::from_millis(5),
            Self::Estimate => Duration::ZERO,
        }
    }
}

/// How to meter.
#[derive(Debug, Clone, PartialEq)]
pub struct EnergyConfig {
    /// Which meter.
    pub meter: MeterChoice,
    /// Folder of powercap's domains.
    pub powercap: PathBuf,
    /// Index of the GPU that NVML is asked about.
    pub gpu: u32,
    /// Watts that the estimate takes for a core that runs.
    pub watts_per_core: f64,
    /// Watts that are drawn when nothing runs; `None` measures them (the estimate takes [`IDLE_WATTS`]).
    pub idle: Option<f64>,
    /// Least time between two readings; `None` takes what suits the meter.
    pub period: Option<Duration>,
    /// Threads of the image encoder for each of the model's.
    pub encoder_share: f64,
}

/// What the estimate takes for a machine that does nothing, unless it is told.
const IDLE_WATTS: f64 = 10.0;

impl Default for EnergyConfig {
    fn default() -> Self {
        Self {
            meter: MeterChoice::default(),
            powercap: PathBuf::from("/sys/class/powercap"),
            gpu: 0,
            watts_per_core: 8.0,
            idle: None,
            period: None,
            encoder_share: 0.5,
        }
    }
}

impl EnergyConfig {
    /// Watts that the estimate takes for a machine that does nothing.
    fn idle_watts(&self) -> f64 {
        self.idle.unwrap_or(IDLE_WATTS)
    }
}

/// What a choice or a request was charged.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EnergyUse {
    /// Joules.
    pub joules: f64,
    /// By what they were measured.
    pub source: Source,
}

/// What the choices of a request were charged together. A sum with an unknown part is unknown.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct EnergySum {
    sum: Option<EnergyUse>,
    parts: usize,
}

impl EnergySum {
    /// Adds a choice.
    pub fn add(&mut self, own: Option<EnergyUse>) {
        self.sum = match (self.sum, own) {
            (Some(sum), Some(own)) => Some(EnergyUse { joules: sum.joules + own.joules, ..sum }),
            (None, own) if self.parts == 0 => own,
            _ => None,
        };
        self.parts += 1;
    }

    /// All of it, if it is known.
    pub fn total(&self) -> Option<EnergyUse> {
        self.sum
    }
}
