//! Everything about models: the catalogue and its downloads, weight files, tokenizers, decoders,
//! kernels, the paged KV cache and the compression plan.
//!
//! A request's tokens pass through the rooms in this order: [`loader`] built a [`models::CausalLm`]
//! from [`weights`]; the engine hands it a [`step::StepBatch`]; [`layers`] run it on [`kernels`] over
//! the pages of [`kv_cache`], asking [`compression`] which rows take part in which sublayer.
//!
//! Invariant: this crate has no async runtime and no network but `catalogue::pull`.

pub mod calibrate;
pub mod catalogue;
pub mod compression;
pub mod config;
pub mod error;
pub mod eval;
pub mod kernels;
pub mod kv_cache;
pub mod layers;
pub mod loader;
pub mod memory;
pub mod models;
pub mod step;
pub mod tokenizer;
pub mod vision;
pub mod weights;

pub use error::{Result, ZooError};
