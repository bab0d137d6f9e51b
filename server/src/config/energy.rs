//! How energy is metered, and how outputs that do not end are found.

use std::time::Duration;

use super::options::{EnergyOptions, VerbosityOptions};
use crate::energy::EnergyConfig;
use crate::verbosity::VerbosityConfig;

/// What the options say, over the defaults.
///
/// # Errors
/// The first figure that is none, as a sentence.
pub(super) fn config(options: EnergyOptions) -> Result<EnergyConfig, String> {
    let defaults = EnergyConfig::default();
    for (name, watts) in
        [("energy.watts_per_core", options.watts_per_core), ("energy.idle_watts", options.idle_watts)]
    {
        if let Some(watts) = watts.filter(|watts| !watts.is_finite() || *watts < 0.0) {
            return Err(format!("{name} is {watts}; it must be a number 0 or more"));
        }
    }
    Ok(EnergyConfig {
        meter: options.meter.unwrap_or_default(),
        powercap: options.powercap.unwrap_or_else(|| defaults.powercap.clone()),
        gpu: options.gpu.unwrap_or(defaults.gpu),
        watts_per_core: options.watts_per_core.unwrap_or(defaults.watts_per_core),
        idle: options.idle_watts,
        period: options.period_ms.map(Duration::from_millis),
        ..defaults
    })
}

/// What the options say, over the defaults.
pub(super) fn verbosity(options: VerbosityOptions) -> VerbosityConfig {
    let defaults = VerbosityConfig::default();
    VerbosityConfig {
        mode: options.mode.unwrap_or(defaults.mode),
        min_tokens: options.min_tokens.unwrap_or(defaults.min_tokens),
        grace_tokens: options.grace_tokens.unwrap_or(defaults.grace_tokens),
    }
}
