//! The harness of the integration tests: the real server on port 0, raw HTTP, and the Python clients.

pub mod process;
pub mod python;
pub mod server;
pub mod stack;
pub mod wire;
