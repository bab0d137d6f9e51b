//! Whole models against implementations that are not ours.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod bitstack;
mod bitstack_build;
mod blocks;
mod calibration;
mod compression;
mod configs;
mod download;
#[cfg(feature = "cuda-emulated")]
mod gpu;
#[cfg(feature = "cuda-emulated")]
mod gpu_levels;
#[cfg(feature = "cuda-emulated")]
mod gpu_methods;
#[cfg(feature = "cuda-emulated")]
mod gpu_quantized;
#[cfg(feature = "cuda-emulated")]
mod gpu_vision;
mod llava;
mod logits;
mod must_drop;
mod place;
mod refusals;
mod smollm2;
mod stacked;
mod steps;
mod support;
mod think;
mod tiny;
