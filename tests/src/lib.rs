//! The harness of the integration tests: the real server on port 0 and the Python clients' environment.

pub mod python;
