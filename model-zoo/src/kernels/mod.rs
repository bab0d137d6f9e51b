//! Compute kernels, by device. The only room with `unsafe` code: every block names its reason, and bounds are checked
//! before it.

pub mod cpu;
#[cfg(any(feature = "cuda", feature = "cuda-emulated"))]
pub mod cuda;
