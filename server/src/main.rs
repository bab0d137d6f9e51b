//! The `rheostat` binary.
fn main() {}
