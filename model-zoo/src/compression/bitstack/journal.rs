//! A build under way, on disk: what is done of it stays done when it is interrupted.
//!
//! One file that only grows: records of a length, a SHA-256 and that many bytes. The first says which build it is. A
//! record that was cut off, or anything behind it, is as if it had never been written.

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Block, LinearId, Shape};
use crate::{Result, ZooError};

/// Bytes before a record's own: their number, their SHA-256.
const PREFIX: usize = 40;

/// What is known of a matrix's levels.
#[derive(Debug, Clone, PartialEq)]
pub struct Levels {
    /// Error of the outputs when the first `b` levels are held, for `b` from 0 on.
    pub errors: Vec<f64>,
    /// Of the matrix.
    pub shape: Shape,
    /// Where the blocks lie.
    offset: u64,
}

/// What a record says, in its first line.
#[derive(Serialize, Deserialize)]
enum Line {
    /// Which build this is, in words.
    Build(String),
    /// The levels of a matrix, whose blocks follow the line.
    Linear {
        linear: LinearId,
        size: [usize; 3],
        /// Bits of f64, so that they come back as they were.
        errors: Vec<u64>,
    },
    /// A measurement.
    Score { key: String, bits: u64 },
}

/// An open journal.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    end: u64,
    linears: HashMap<LinearId, Levels>,
    scores: BTreeMap<String, f64>,
}

impl Journal {
    /// Begins the build `name` at `path`, or goes on with it.
    ///
    /// # Errors
    /// [`ZooError::Io`] when the file cannot be used, [`ZooError::Format`] when it is of another build.
    pub fn open(path: &Path, name: &str) -> Result<Self> {
        let options = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let file = options.map_err(|e| ZooError::io(path, e))?;
        let mut journal =
            Self { path: path.to_owned(), file, end: 0, linears: HashMap::new(), scores: BTreeMap::new() };
        let mut found = None;
        while let Some((line, blob)) = journal.record()? {
            match line {
                Line::Build(name) => found = Some(name),
                Line::Linear { linear, size: [rows, cols, rank], errors } => {
                    let errors = errors.into_iter().map(f64::from_bits).collect();
                    let shape = Shape { rows, cols, rank };
                    journal.linears.insert(linear, Levels { errors, shape, offset: blob });
                }
                Line::Score { key, bits } => {
                    journal.scores.insert(key, f64::from_bits(bits));
                }
            }
        }
        match found {
            Some(found) if found != name => Err(ZooError::format(
                path,
                format!("is of another build ({found}); delete it, or write this one to another file"),
            )),
            Some(_) => Ok(journal),
            None => journal.append(&Line::Build(name.to_owned()), &[]).map(|_| journal),
        }
    }

    /// The levels of a matrix, where they are there.
    pub fn levels(&self, linear: LinearId) -> Option<&Levels> {
        self.linears.get(&linear)
    }

    /// Adds the levels of a matrix.
    ///
    /// # Errors
    /// [`ZooError::Io`] when it cannot be written.
    pub fn add_levels(
        &mut self,
        (linear, shape): (LinearId, Shape),
        errors: &[f64],
        blocks: &[Block],
    ) -> Result<()> {
        let line = Line::Linear {
            linear,
            size: [shape.rows, shape.cols, shape.rank],
            errors: errors.iter().map(|error| error.to_bits()).collect(),
        };
        let bytes: Vec<u8> = blocks.iter().flat_map(Block::to_bytes).collect();
        let offset = self.append(&line, &bytes)?;
        self.linears.insert(linear, Levels { errors: errors.to_vec(), shape, offset });
        Ok(())
    }

    /// Reads a block of a matrix whose levels are there.
    ///
    /// # Errors
    /// [`ZooError::Io`] when it cannot be read, [`ZooError::Format`] when there is none.
    pub fn block(&self, linear: LinearId, level: usize) -> Result<Block> {
        let missing = || ZooError::format(&self.path, format!("has no level {level} of {linear}"));
        let levels = self.linears.get(&linear).ok_or_else(missing)?;
        if level + 1 >= levels.errors.len() {
            return Err(missing());
        }
        let mut bytes = vec![0; levels.shape.block_bytes()];
        let offset = levels.offset + (level * bytes.len()) as u64;
        self.file.read_exact_at(&mut bytes, offset).map_err(|e| ZooError::io(&self.path, e))?;
        Block::from_bytes((linear, level), levels.shape, &bytes).ok_or_else(missing)
    }

    /// A measurement that was made before.
    pub fn score(&self, key: &str) -> Option<f64> {
        self.scores.get(key).copied()
    }

    /// Adds a measurement.
    ///
    /// # Errors
    /// [`ZooError::Io`] when it cannot be written.
    pub fn add_score(&mut self, key: &str, value: f64) -> Result<()> {
        self.append(&Line::Score { key: key.to_owned(), bits: value.to_bits() }, &[])?;
        self.scores.insert(key.to_owned(), value);
        Ok(())
    }

    /// The build is finished: nothing of it is needed any more.
    ///
    /// # Errors
    /// [`ZooError::Io`] when the file cannot be removed.
    pub fn remove(self) -> Result<()> {
        std::fs::remove_file(&self.path).map_err(|e| ZooError::io(self.path, e))
    }

    /// Writes a record; returns where its blob begins.
    fn append(&mut self, line: &Line, blob: &[u8]) -> Result<u64> {
        let mut record = serde_json::to_vec(line).map_err(|e| ZooError::format(&self.path, e.to_string()))?;
        record.push(b'\n');
        let line_len = record.len();
        record.extend_from_slice(blob);
        let mut bytes = (record.len() as u64).to_le_bytes().to_vec();
        bytes.extend(Sha256::digest(&record));
        bytes.extend(record);
        // A record that was cut off is written over.
        let written = self.file.set_len(self.end).and_then(|()| self.file.write_all_at(&bytes, self.end));
        written.and_then(|()| self.file.flush()).map_err(|e| ZooError::io(&self.path, e))?;
        let blob = self.end + (PREFIX + line_len) as u64;
        self.end += bytes.len() as u64;
        Ok(blob)
    }

    /// The next whole record: what it says, and where its blob begins.
    fn record(&mut self) -> Result<Option<(Line, u64)>> {
        let io = |e| ZooError::io(&self.path, e);
        let all = self.file.metadata().map_err(io)?.len();
        if all - self.end < PREFIX as u64 {
            return Ok(None);
        }
        let mut prefix = [0; PREFIX];
        self.file.read_exact_at(&mut prefix, self.end).map_err(io)?;
        let len = u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i| prefix[i]));
        if len > all - self.end - PREFIX as u64 {
            return Ok(None);
        }
        let mut record = vec![0; len as usize];
        self.file.read_exact_at(&mut record, self.end + PREFIX as u64).map_err(io)?;
        if Sha256::digest(&record)[..] != prefix[8..] {
            return Ok(None);
        }
        let line_len = record.iter().position(|&byte| byte == b'\n').unwrap_or(record.len());
        let line = serde_json::from_slice(&record[..line_len])
            .map_err(|e| ZooError::format(&self.path, e.to_string()))?;
        let blob = self.end + (PREFIX + line_len + 1) as u64;
        self.end += PREFIX as u64 + len;
        Ok(Some((line, blob)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Projection;
    use super::*;

    #[test]
    fn what_was_whole_comes_back_and_what_was_cut_off_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let linear = LinearId { layer: 1, projection: Projection::Up };
        let shape = Shape { rows: 8, cols: 16, rank: 1 };
        let block =
            |level| Block { linear, level, signs: vec![level as u8; 16], u: vec![5; 8], vt: vec![6; 16] };
        let errors = [1.0, 0.1 + 0.2, 1e-300];
        let mut journal = Journal::open(&path, "one").unwrap();
        journal.add_levels((linear, shape), &errors, &[block(0), block(1)]).unwrap();
        let whole = std::fs::metadata(&path).unwrap().len();
        journal.add_score("a", 0.1).unwrap();
        drop(journal);
        // A record torn in its middle, as by a crash.
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(whole + 50).unwrap();
        let mut journal = Journal::open(&path, "one").unwrap();
        assert_eq!(journal.score("a"), None);
        assert_eq!(journal.levels(linear).unwrap().errors, errors);
        assert_eq!(journal.block(linear, 1).unwrap(), block(1));
        assert!(journal.block(linear, 2).is_err());
        journal.add_score("b", 1.0 / 3.0).unwrap();
        assert_eq!(Journal::open(&path, "one").unwrap().score("b"), Some(1.0 / 3.0));
        assert!(Journal::open(&path, "two").unwrap_err().to_string().contains("another build"));
    }
}
