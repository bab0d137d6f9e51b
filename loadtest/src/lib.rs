//! `rheostat-loadtest`: measures engines and servers.
//!
//! `run` sends a repeatable [`workload`] to a server through a [`client`], open loop or closed loop
//! ([`drive`]), and makes a [`summary`] and a [`report`] of what came back. `compare` does so with two
//! servers in turn. `engine` and `compression` run a model's steps without a server in front;
//! `overhead` runs a server without a model behind, `connections` one with many clients that do nothing.

pub mod cli;
pub mod client;
pub mod compare;
mod compression;
mod connections;
pub mod drive;
mod engine;
mod gpu;
mod overhead;
pub mod report;
pub mod run;
pub mod summary;
pub mod workload;
