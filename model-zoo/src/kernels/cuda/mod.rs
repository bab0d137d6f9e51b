//! Kernels for GPUs, and the seam to the devices that run them.
//!
//! The `.cu` and `.cuh` files are CUDA C++. With the feature `cuda`, `nvcc` compiles them when the crate is built, and
//! `driver` runs them through libraries that it opens at run time: a binary with this feature starts on machines
//! without any. With the feature `cuda-emulated`, the host's compiler compiles the same files for [`emulated`], where
//! tests run them without a GPU.

pub mod attention;
pub mod compact;
pub mod device;
#[cfg(feature = "cuda")]
pub mod driver;
#[cfg(feature = "cuda-emulated")]
pub mod emulated;
pub mod ffn;
pub mod fused;
pub mod gaze;
pub mod ops;
mod page_tables;
mod params;
pub mod pruned;
pub mod quantized;
pub mod sampling;
mod selections;
pub mod stack;
mod step_rows;
pub mod tables;
#[cfg(feature = "cuda-emulated")]
#[cfg(test)]
mod tests;
mod watch_tables;
