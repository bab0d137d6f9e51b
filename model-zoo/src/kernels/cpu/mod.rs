//! CPU kernels: a fork-join pool, int8 activations, packed weight matrices, attention over pages.
//!
//! Every kernel gives a row the same bits whatever other rows are in the call: the order of its
//! floating-point operations depends on the row alone.

pub mod aligned;
pub mod attention;
pub mod bitstack;
pub mod convert;
pub mod dense;
pub mod gemm;
pub mod isa;
pub mod packed;
pub mod pool;
pub mod quantize;
pub mod rows;
pub mod vector;
