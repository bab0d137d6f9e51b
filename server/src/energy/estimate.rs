//! An estimate where nothing can be measured: `idle_watts · t + watts_per_core · CPU time of this process`.
//!
//! The two figures are the operator's. What other processes of the machine use is not in it, nor is a GPU.

use std::time::Instant;

use cpu_time::ProcessTime;

use super::Source;
use super::meter::{Meter, Reading};

/// The estimate.
#[derive(Debug)]
pub(super) struct CpuTime {
    idle_watts: f64,
    watts_per_core: f64,
    began: Instant,
    cpu_seconds: f64,
}

impl CpuTime {
    /// An estimate that begins now.
    pub(super) fn start(idle_watts: f64, watts_per_core: f64) -> Self {
        Self { idle_watts, watts_per_core, began: Instant::now(), cpu_seconds: cpu_seconds() }
    }
}

impl Meter for CpuTime {
    fn source(&self) -> Source {
        Source::Estimate
    }

    fn read(&mut self) -> Reading {
        let at = Instant::now();
        let idle = self.idle_watts * (at - self.began).as_secs_f64();
        let busy = self.watts_per_core * (cpu_seconds() - self.cpu_seconds);
        Reading { at, joules: idle + busy, reset: false }
    }
}

/// Time that all threads of this process have run, user and system.
fn cpu_seconds() -> f64 {
    ProcessTime::now().as_duration().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_costs_more_than_waiting() {
        let mut meter = CpuTime::start(10.0, 100.0);
        let before = meter.read();
        let busy_until = cpu_seconds() + 0.02;
        while cpu_seconds() < busy_until {
            std::hint::spin_loop();
        }
        let after = meter.read();
        let (joules, seconds) = (after.joules - before.joules, (after.at - before.at).as_secs_f64());
        // Other tests of this process run meanwhile, on any number of cores.
        assert!(joules >= 10.0 * seconds + 100.0 * 0.02 - 1e-9, "{joules} J in {seconds} s");
        assert_eq!(meter.source(), Source::Estimate);
    }
}
