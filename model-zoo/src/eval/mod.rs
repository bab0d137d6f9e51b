//! How good and how fast a model is under its plans, measured without a server.

pub mod probes;
pub mod runner;
pub mod score;
pub mod speed;
pub mod vision;

pub use runner::{Chunk, Runner};
pub use score::{Score, Windows, score};
