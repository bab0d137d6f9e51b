//! The file that a stack lies in: `NAME.bitstack`.
//!
//! ```text
//! 0        "RHEOBITS", version u32, 0 u32, bytes of the header u64, SHA-256 of the header
//! 56       the header: JSON, see `header`
//! data     each at a multiple of 4 KiB from the start of the file, zeros between:
//!          the tokenizer; the tensors that are not decomposed; the base, matrix by matrix; the stack, in order
//! ```
//!
//! All numbers are little-endian. The header has the place, the length and the SHA-256 of everything behind it, so
//! that nothing is used before it was found to be what was written: a budget is one read of a prefix, and a stack
//! grows block by block.

mod header;
mod reader;
#[cfg(test)]
mod tests;
mod writer;

pub use header::Provenance;
pub use reader::{Artefact, Tensors};
pub use writer::{Contents, StoredTensor, write};

use super::LinearId;

/// Begins every artefact.
const MAGIC: &[u8; 8] = b"RHEOBITS";
/// The only version so far.
const VERSION: u32 = 1;
/// Bytes before the header.
const PREAMBLE: u64 = 56;
/// Blocks begin at multiples of this.
const ALIGNMENT: u64 = 4096;
/// The usual ending of an artefact's name.
pub const EXTENSION: &str = "bitstack";

/// Where a block lies and what its bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockEntry {
    /// The matrix.
    pub linear: LinearId,
    /// Its level, from 0.
    pub level: usize,
    /// From the start of the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// SHA-256 of its bytes.
    pub sha256: [u8; 32],
}
