//! Where joules come from, and which of the sources a server takes.

use std::time::Instant;

use super::estimate::CpuTime;
use super::nvml::NvmlMeter;
use super::rapl::RaplMeter;
use super::{EnergyConfig, MeterChoice, Source};

/// Energy since the meter was opened.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reading {
    /// When it was taken.
    pub at: Instant,
    /// Joules so far; what was lost by resets is not in it.
    pub joules: f64,
    /// A counter was set back since the reading before: between the two more was used than `joules` says.
    pub reset: bool,
}

/// A source of energy readings.
pub trait Meter: Send {
    /// What it measures by.
    fn source(&self) -> Source;

    /// What was used until now. A counter that cannot be read now keeps its last value, so that what it counts
    /// meanwhile comes with the next reading.
    fn read(&mut self) -> Reading;
}

/// Where the model runs, which says whose energy counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// The CPU's cores.
    Cpu,
    /// A CUDA device.
    Gpu,
}

/// Opens the meter that `config` asks for; `None` where there is none. Says once in the log what it is, and what
/// could not be opened.
pub fn open(config: &EnergyConfig, device: Device) -> Option<Box<dyn Meter>> {
    let nvml = || NvmlMeter::open(config.gpu).map(|meter| Box::new(meter) as Box<dyn Meter>);
    let rapl = || RaplMeter::open(&config.powercap).map(|meter| Box::new(meter) as Box<dyn Meter>);
    let estimate =
        || Some(Box::new(CpuTime::start(config.idle_watts(), config.watts_per_core)) as Box<dyn Meter>);
    let told = |meter: Result<Box<dyn Meter>, String>| {
        meter.inspect_err(|error| tracing::info!(error, "an energy meter cannot be used")).ok()
    };
    let meter = match (config.meter, device) {
        (MeterChoice::Off, _) => return None,
        (MeterChoice::Estimate, _) => estimate(),
        (MeterChoice::Auto, Device::Gpu) => told(nvml()).or_else(|| told(rapl())).or_else(estimate),
        (MeterChoice::Auto, Device::Cpu) => told(rapl()).or_else(estimate),
        (MeterChoice::Nvml, _) => warned(nvml()),
        (MeterChoice::Rapl, _) => warned(rapl()),
    }?;
    let source = meter.source().as_str();
    match meter.source() {
        Source::Estimate => tracing::info!(
            source,
            watts_per_core = config.watts_per_core,
            idle_watts = config.idle_watts(),
            "energy is estimated from CPU time; set energy.watts_per_core and energy.idle_watts for this machine"
        ),
        Source::Nvml | Source::Rapl => tracing::info!(source, "energy is metered"),
    }
    Some(meter)
}

/// What was asked for by name is missed: a warning.
fn warned(meter: Result<Box<dyn Meter>, String>) -> Option<Box<dyn Meter>> {
    let warn = |error: &String| tracing::warn!(error, "energy.meter cannot be used: no energy is reported");
    meter.inspect_err(warn).ok()
}
