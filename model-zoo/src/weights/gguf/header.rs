//! Bounded little-endian reads of a GGUF header.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};

use crate::weights::file::WeightFile;
use crate::{Result, ZooError};

/// No real header comes near this: Gemma's, with 262,144 tokens, is 6 MB.
const MAX_HEADER_BYTES: u64 = 256 << 20;

/// Reads a header front to back and knows how many bytes may still come, so that a length in the file is
/// refused before memory is taken for it.
pub(super) struct HeaderReader<'a> {
    file: &'a WeightFile,
    reader: BufReader<&'a File>,
    position: u64,
    end: u64,
}

impl<'a> HeaderReader<'a> {
    pub(super) fn new(file: &'a WeightFile) -> Result<Self> {
        let mut reader = BufReader::with_capacity(1 << 16, file.file());
        reader.seek(SeekFrom::Start(0)).map_err(|e| ZooError::io(file.path(), e))?;
        Ok(Self { file, reader, position: 0, end: file.len().min(MAX_HEADER_BYTES) })
    }

    pub(super) fn file(&self) -> &'a WeightFile {
        self.file
    }

    /// Bytes read so far.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Checks magic and version; returns the number of tensors and of metadata entries.
    pub(super) fn preamble(&mut self) -> Result<(usize, usize)> {
        // A file too short for the magic is no GGUF file either.
        if self.end < 4 || &self.bytes::<4>()? != b"GGUF" {
            return Err(self.file.malformed("is not a GGUF file"));
        }
        match self.u32()? {
            2 | 3 => {}
            version if matches!(version.swap_bytes(), 1..=3) => {
                return Err(self.file.malformed("is a big-endian GGUF file, which is not supported"));
            }
            version => {
                return Err(self
                    .file
                    .malformed(format!("has GGUF version {version}; 2 and 3 are supported")));
            }
        }
        let num_tensors = self.count("tensors", 24)?;
        let num_entries = self.count("metadata entries", 13)?;
        Ok((num_tensors, num_entries))
    }

    /// A number of things of which each takes at least `min_bytes` of the header.
    pub(super) fn count(&mut self, what: &str, min_bytes: u64) -> Result<usize> {
        let count = self.u64()?;
        let left = self.end - self.position;
        if count > left / min_bytes {
            return Err(self
                .file
                .malformed(format!("claims {count} {what}, but only {left} bytes of header can follow")));
        }
        Ok(count as usize)
    }

    /// A length-prefixed UTF-8 string.
    pub(super) fn string(&mut self) -> Result<String> {
        let len = self.count("bytes of text", 1)?;
        let mut bytes = vec![0; len];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|_| {
            self.file.malformed(format!("has text that is not UTF-8 before offset {}", self.position))
        })
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    pub(super) fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        if bytes.len() as u64 > self.end - self.position {
            return Err(self.file.malformed(format!("truncated: the header ends at offset {}", self.end)));
        }
        self.reader.read_exact(bytes).map_err(|e| ZooError::io(self.file.path(), e))?;
        self.position += bytes.len() as u64;
        Ok(())
    }
}
