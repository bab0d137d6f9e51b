//! Memory that the operating system has back the moment it is dropped.
//!
//! What follows a budget down has to lie here and not in the general allocator: that one keeps freed blocks for
//! reuse (glibc from the first freed block on, up to 32 MiB large), and resident memory would stay where it was.

use memmap2::{MmapMut, MmapOptions};

use crate::{Result, ZooError};

/// A mapping of its own, zeroed, aligned to the system's pages. Those become resident when they are first
/// written.
#[derive(Debug, Default)]
pub struct Region {
    /// `None` when it is empty: there is no mapping of no bytes.
    map: Option<MmapMut>,
}

impl Region {
    /// A region of `len` bytes.
    ///
    /// # Errors
    /// [`ZooError::Memory`] when the operating system has no room for it.
    pub fn zeroed(len: usize) -> Result<Self> {
        if len == 0 {
            return Ok(Self::default());
        }
        let map = MmapOptions::new().len(len).map_anon();
        map.map(|map| Self { map: Some(map) })
            .map_err(|source| ZooError::Memory { bytes: len as u64, source })
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }

    /// Its bytes, for writing.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.map.as_deref_mut().unwrap_or_default()
    }

    /// Its 16-bit words; an odd byte at the end is left out.
    pub fn words(&self) -> &[u16] {
        let bytes = self.bytes();
        bytemuck::cast_slice(&bytes[..bytes.len() / 2 * 2])
    }

    /// Its 16-bit words, for writing.
    pub fn words_mut(&mut self) -> &mut [u16] {
        let bytes = self.bytes_mut();
        let even = bytes.len() / 2 * 2;
        bytemuck::cast_slice_mut(&mut bytes[..even])
    }
}
