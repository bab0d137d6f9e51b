//! What the governor is to hold.

use super::options::{PowerOptions, TargetOptions};
use crate::governor::Policy;

/// The governor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GovernorConfig {
    /// Targets and times.
    pub policy: Policy,
    /// The most that `auto` may lose: perplexity over dense, less 1.
    pub max_perplexity_increase: f64,
}

impl GovernorConfig {
    pub(super) fn of(targets: &TargetOptions, power: &PowerOptions) -> Self {
        Self {
            policy: Policy {
                ttft_ms: targets.ttft_ms.unwrap_or(2000.0),
                tpot_ms: targets.tpot_ms.unwrap_or(100.0),
                cap_watts: power.cap_watts,
                hold_s: targets.hold_seconds.unwrap_or(2.0),
                calm_s: targets.calm_seconds.unwrap_or(10.0),
            },
            // The limit of the calibrated preset `eco`.
            max_perplexity_increase: targets.max_perplexity_increase.unwrap_or(0.08),
        }
    }

    /// One sentence a rule.
    pub(super) fn check(&self) -> Result<(), String> {
        let policy = &self.policy;
        for (name, value, zero) in [
            ("targets.ttft_ms", policy.ttft_ms, false),
            ("targets.tpot_ms", policy.tpot_ms, false),
            ("targets.hold_seconds", policy.hold_s, true),
            ("targets.calm_seconds", policy.calm_s, true),
            ("targets.max_perplexity_increase", self.max_perplexity_increase, true),
            ("power.cap_watts", policy.cap_watts.unwrap_or(1.0), false),
        ] {
            if !value.is_finite() || value < 0.0 || (value == 0.0 && !zero) {
                let least = if zero { "0 or more" } else { "above 0" };
                return Err(format!("{name} is {value}; it must be a number {least}"));
            }
        }
        Ok(())
    }
}
