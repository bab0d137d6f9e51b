//! The Rheostat server. A request passes through the rooms in this order:
//!
//! `http` | `grpc` convert it → [`service`] and `admission` validate, tokenize, compile its plan and take
//! a permit → [`engine`] runs it on one OS thread (schedule → batch → forward → sample → commit) with the
//! pure [`scheduler`] → its [`request::TokenEvent`]s come back through a bounded channel.
//!
//! Dropping a [`engine::TokenStream`] is the only way to cancel.

pub mod admission;
pub mod auth;
pub mod cli;
pub mod config;
pub mod current;
pub mod energy;
pub mod engine;
pub mod error;
pub mod governor;
pub mod grpc;
pub mod http;
pub mod images;
pub mod memory;
pub mod reload;
pub mod request;
pub mod run;
pub mod scheduler;
pub mod service;
pub mod shutdown;
pub mod telemetry;
#[cfg(test)]
mod toy;
pub mod traces;
pub mod transport;
pub mod verbosity;
