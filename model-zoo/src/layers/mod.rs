//! Building blocks of decoders, one kind a file.

pub mod linear;
pub mod rotary;
pub mod stack;
