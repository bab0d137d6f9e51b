//! Compute kernels. The only room with `unsafe` code: every block names its reason, and bounds are checked
//! before it.

pub mod cpu;
