//! Whole models against implementations that are not ours.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod configs;
mod refusals;
mod support;
