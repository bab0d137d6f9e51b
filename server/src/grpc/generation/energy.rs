//! Energy on the wire.

use rheostat_proto::rheostat::v1;

use crate::energy::{EnergyUse, Source};

/// What a request was charged.
pub(super) fn usage(charged: EnergyUse) -> v1::EnergyUsage {
    let source = match charged.source {
        Source::Nvml => v1::EnergySource::Nvml,
        Source::Rapl => v1::EnergySource::Rapl,
        Source::Estimate => v1::EnergySource::Estimate,
    };
    v1::EnergyUsage { joules: charged.joules, source: source.into() }
}
