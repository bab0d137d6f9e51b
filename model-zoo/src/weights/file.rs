//! Positioned reads of a weight file.
//!
//! Weights are read, not mapped: each tensor is copied out once, repacked by its layer and dropped, so
//! the file's pages never count as ours, a file that shrinks while it is read gives an error instead of
//! a SIGBUS, and no `unsafe` is needed.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::{Result, ZooError};

/// An open file with its length at opening; every read is checked against it before memory is taken.
#[derive(Debug)]
pub(crate) struct WeightFile {
    path: PathBuf,
    file: File,
    len: u64,
}

impl WeightFile {
    /// Opens a regular file.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| ZooError::io(path, e))?;
        let metadata = file.metadata().map_err(|e| ZooError::io(path, e))?;
        if !metadata.is_file() {
            return Err(ZooError::format(path, "is not a file"));
        }
        Ok(Self { path: path.to_owned(), file, len: metadata.len() })
    }

    /// Where it was opened.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The descriptor, for streaming from the start.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Bytes in the file.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// A malformed-file error that names this file.
    pub(crate) fn malformed(&self, reason: impl Into<String>) -> ZooError {
        ZooError::format(&self.path, reason)
    }

    /// The `len` bytes at `offset`.
    pub(crate) fn read_at(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let end = offset.checked_add(len as u64);
        if end.is_none_or(|end| end > self.len) {
            return Err(self.malformed(format!(
                "truncated: {len} bytes are needed at offset {offset}, but the file has {}",
                self.len
            )));
        }
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, offset).map_err(|e| ZooError::io(&self.path, e))?;
        Ok(bytes)
    }
}
