//! NVIDIA GPUs: the total energy counter of NVML (Volta and newer). The library is loaded when the meter is
//! opened; a machine without it has no such meter.
//!
//! The counter is of the whole card, whoever uses it.

use std::ffi::OsStr;
use std::time::Instant;

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;

use super::Source;
use super::counter::{Advance, Counter};
use super::meter::{Meter, Reading};

/// The library's name on machines that have the driver, and where developers' files are installed too.
const LIBRARIES: [&str; 2] = ["libnvidia-ml.so.1", "libnvidia-ml.so"];
/// The counter's unit.
const MILLIJOULE: f64 = 1e-3;

/// The meter of one card.
pub(super) struct NvmlMeter {
    nvml: Nvml,
    gpu: u32,
    counter: Counter,
    joules: f64,
    failing: bool,
}

impl NvmlMeter {
    /// The meter of card `gpu`, counted as NVML does: by PCI bus.
    ///
    /// # Errors
    /// Why there is none, as a sentence.
    pub(super) fn open(gpu: u32) -> Result<Self, String> {
        let nvml = load().map_err(|e| format!("NVML: {e}"))?;
        let count = energy(&nvml, gpu).map_err(|e| format!("NVML, energy counter of GPU {gpu}: {e}"))?;
        let counter = Counter::new(MILLIJOULE, 0, (count, Instant::now()));
        Ok(Self { nvml, gpu, counter, joules: 0.0, failing: false })
    }
}

fn load() -> Result<Nvml, NvmlError> {
    let open = |name: &str| Nvml::builder().lib_path(OsStr::new(name)).init();
    open(LIBRARIES[0]).or_else(|_| open(LIBRARIES[1]))
}

fn energy(nvml: &Nvml, gpu: u32) -> Result<u64, NvmlError> {
    nvml.device_by_index(gpu)?.total_energy_consumption()
}

impl Meter for NvmlMeter {
    fn source(&self) -> Source {
        Source::Nvml
    }

    fn read(&mut self) -> Reading {
        let count = energy(&self.nvml, self.gpu);
        let at = Instant::now();
        let advance = match count {
            Ok(count) => {
                self.failing = false;
                self.counter.advance(count, at)
            }
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::warn!(%error, gpu = self.gpu, "the energy counter cannot be read for now");
                }
                Advance::Joules(0.0)
            }
        };
        if let Advance::Joules(joules) = advance {
            self.joules += joules;
        }
        Reading { at, joules: self.joules, reset: advance == Advance::Reset }
    }
}
