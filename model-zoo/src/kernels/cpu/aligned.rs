//! Cache-line aligned bytes for packed weights.

/// A cache line.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub struct Line(pub [u8; 64]);

/// Zeroed bytes, aligned to 64, with a length that is a multiple of 64.
#[derive(Debug)]
pub struct AlignedBytes(Vec<Line>);

impl AlignedBytes {
    /// `len` zero bytes, a multiple of 64.
    pub fn zeroed(len: usize) -> Self {
        assert!(len.is_multiple_of(64), "invariant: packed blocks are whole cache lines");
        Self(vec![Line([0; 64]); len / 64])
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        // SAFETY: as in `as_bytes_mut`.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() * 64) }
    }

    /// The bytes, for writing.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: `Line` is 64 plain bytes without padding, so that lines lie end to end.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.0.len() * 64) }
    }
}
