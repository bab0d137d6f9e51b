//! The one integration binary: the rules that a program can check, and real clients against the real
//! server with the real model.

mod abuse;
mod batching;
mod bitstack;
mod cancellation;
mod clients;
mod deploy;
mod drain;
mod energy;
mod gpu;
mod loadtest;
mod security;
mod soak;
mod tidy;
mod vision;
