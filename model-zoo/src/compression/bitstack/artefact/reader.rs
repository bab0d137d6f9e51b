//! Opening an artefact and reading its parts.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use super::super::{Block, LinearId, Shape};
use super::header::{Entry, Header, Place, Provenance, TensorEntry, TokenizerKind, digest};
use super::{ALIGNMENT, BlockEntry, MAGIC, PREAMBLE, VERSION};
use crate::config::DecoderConfig;
use crate::loader::{TokenizerFiles, TokenizerSource};
use crate::weights::file::WeightFile;
use crate::weights::gguf::{Metadata, Value};
use crate::weights::{RawTensor, WeightSource};
use crate::{Result, ZooError};

/// The header of a model with ten thousand blocks has 2 MiB.
const MAX_HEADER_BYTES: u64 = 256 << 20;

/// An opened artefact: its header, checked, and the file.
#[derive(Debug)]
pub struct Artefact {
    file: WeightFile,
    pub(super) header: Header,
    /// Where sections are counted from.
    pub(super) data: u64,
    shapes: Vec<Shape>,
    base: Vec<BlockEntry>,
    stack: Vec<BlockEntry>,
    tensors: HashMap<String, usize>,
}

impl Artefact {
    /// Opens an artefact and checks its header: nothing that it hands out afterwards can fail but by I/O or damage.
    ///
    /// # Errors
    /// [`ZooError::Io`] when the file cannot be read, [`ZooError::Format`] when it is no artefact, of another
    /// version, truncated, or when its header is damaged or contradicts itself.
    pub fn open(path: &Path) -> Result<Self> {
        let file = WeightFile::open(path)?;
        let (header, end) = read_header(&file)?;
        header.config.validate(path)?;
        let data = end.next_multiple_of(ALIGNMENT);
        let mut artefact = Self {
            file,
            data,
            shapes: Vec::new(),
            base: Vec::new(),
            stack: Vec::new(),
            tensors: HashMap::new(),
            header,
        };
        artefact.check().map_err(|reason| ZooError::format(path, format!("malformed header: {reason}")))?;
        Ok(artefact)
    }

    /// Whether the file at `path` begins as an artefact does.
    pub fn is_artefact(path: &Path) -> bool {
        let begin = WeightFile::open(path).and_then(|file| file.read_at(0, MAGIC.len()));
        begin.is_ok_and(|begin| begin == MAGIC)
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Bytes of the file.
    pub fn file_bytes(&self) -> u64 {
        self.file.len()
    }

    /// The decoder.
    pub fn config(&self) -> &DecoderConfig {
        &self.header.config
    }

    /// Where the weights come from.
    pub fn provenance(&self) -> &Provenance {
        &self.header.provenance
    }

    /// A matrix's shape.
    ///
    /// # Panics
    /// When `linear` is none of the decoder's.
    pub fn shape(&self, linear: LinearId) -> Shape {
        self.shapes[linear.index()]
    }

    /// Level 0 of every matrix, in the order of [`LinearId::all`] and of the file.
    pub fn base(&self) -> &[BlockEntry] {
        &self.base
    }

    /// The other blocks, in order of importance and of the file: what grows and shrinks. A matrix's levels come in
    /// order.
    pub fn stack(&self) -> &[BlockEntry] {
        &self.stack
    }

    /// Reads a block.
    ///
    /// # Errors
    /// [`ZooError::Io`], or [`ZooError::Format`] when its bytes are not what was written.
    pub fn read_block(&self, entry: &BlockEntry) -> Result<Block> {
        let bytes = self.read_bytes(entry)?;
        Block::from_bytes((entry.linear, entry.level), self.shape(entry.linear), &bytes).ok_or_else(|| {
            let (level, linear, len) = (entry.level, entry.linear, bytes.len());
            self.file.malformed(format!("level {level} of {linear} has {len} bytes"))
        })
    }

    /// Reads a block as [`Block::to_bytes`] wrote it.
    ///
    /// # Errors
    /// As [`Artefact::read_block`].
    pub fn read_bytes(&self, entry: &BlockEntry) -> Result<Vec<u8>> {
        let what = || format!("level {} of {}", entry.level, entry.linear);
        self.read((entry.offset, entry.len, &entry.sha256), what)
    }

    /// Embedding, norms, biases, and the output matrix where it is not the embedding.
    pub fn tensors(&self) -> Tensors<'_> {
        Tensors { artefact: self }
    }

    /// Bytes of the tensors that are not decomposed, as stored.
    pub fn tensor_bytes(&self) -> u64 {
        self.header.tensors.iter().map(|tensor| tensor.place.len).sum()
    }

    /// The tokenizer with its chat template.
    ///
    /// # Errors
    /// [`ZooError::Io`], or [`ZooError::Format`] when its bytes are not what was written.
    pub fn tokenizer(&self) -> Result<TokenizerSource> {
        let section = &self.header.tokenizer;
        let bytes = self.section(&section.place, || "the tokenizer".to_owned())?;
        let malformed = |e: serde_json::Error| self.file.malformed(format!("the tokenizer: {e}"));
        match section.kind {
            TokenizerKind::Gguf => {
                let values: BTreeMap<String, Value> = serde_json::from_slice(&bytes).map_err(malformed)?;
                Ok(TokenizerSource::Gguf(Metadata::from_entries(self.path(), values)))
            }
            TokenizerKind::Files => {
                let files = serde_json::from_slice(&bytes).map_err(malformed)?;
                Ok(TokenizerSource::Files(TokenizerFiles { origin: self.path().to_owned(), files }))
            }
        }
    }

    fn section(&self, place: &Place, what: impl Fn() -> String) -> Result<Vec<u8>> {
        self.read((self.data + place.offset, place.len, &place.sha256), what)
    }

    fn read(
        &self,
        (offset, len, sha256): (u64, u64, &[u8; 32]),
        what: impl Fn() -> String,
    ) -> Result<Vec<u8>> {
        let bytes = self.file.read_at(offset, len as usize)?;
        if digest(&bytes) == *sha256 {
            return Ok(bytes);
        }
        let what = what();
        Err(self
            .file
            .malformed(format!("damaged: {what} is not what its checksum says; fetch or build it again")))
    }

    /// Checks the header against itself and the file, and fills what is looked up later.
    fn check(&mut self) -> Result<(), String> {
        let Self { header, data, file, .. } = self;
        let config = &header.config;
        let linears: Vec<_> = LinearId::all(config.num_layers).collect();
        if header.ranks.len() != linears.len() {
            return Err(format!("{} ranks for {} matrices", header.ranks.len(), linears.len()));
        }
        for (linear, &rank) in linears.iter().zip(&header.ranks) {
            let [rows, cols] = linear.projection.size(config);
            if rank == 0 || rank > rows.min(cols) || !(rows * cols).is_multiple_of(8) {
                return Err(format!("{linear} of {rows} by {cols} cannot have rank {rank}"));
            }
            self.shapes.push(Shape { rows, cols, rank });
        }
        let bounds = Bounds { data: *data, file_len: file.len() };
        bounds.check("the tokenizer", &header.tokenizer.place)?;
        for (index, tensor) in header.tensors.iter().enumerate() {
            check_tensor(tensor)?;
            bounds.check(&tensor.name, &tensor.place)?;
            if self.tensors.insert(tensor.name.clone(), index).is_some() {
                return Err(format!("tensor {:?} is there twice", tensor.name));
            }
        }
        if !header.base.iter().map(Entry::linear).eq(linears) {
            return Err("the base is not one level of every matrix in order".to_owned());
        }
        let mut levels = vec![0; header.ranks.len()];
        for entry in header.base.iter().chain(&header.stack) {
            let linear = entry.linear();
            if entry.layer >= config.num_layers {
                return Err(format!("{linear} is not in a model of {} layers", config.num_layers));
            }
            match &mut levels[linear.index()] {
                next if *next == entry.level => *next += 1,
                _ => return Err(format!("level {} of {linear} is out of order", entry.level)),
            }
            let bytes = self.shapes[linear.index()].block_bytes() as u64;
            if entry.place.len != bytes {
                return Err(format!("a level of {linear} has {} bytes, not {bytes}", entry.place.len));
            }
            bounds.check(&linear.to_string(), &entry.place)?;
        }
        let entries = |entries: &[Entry]| entries.iter().map(|entry| bounds.entry(entry)).collect();
        (self.base, self.stack) = (entries(&header.base), entries(&header.stack));
        check_overlaps(self.base.iter().chain(&self.stack))
    }
}

/// What must contain every section.
#[derive(Clone, Copy)]
struct Bounds {
    data: u64,
    file_len: u64,
}

impl Bounds {
    fn check(self, what: &str, place: &Place) -> Result<(), String> {
        let start = self.data.checked_add(place.offset);
        let end = start.and_then(|start| start.checked_add(place.len));
        match end {
            Some(end) if end <= self.file_len && place.offset.is_multiple_of(ALIGNMENT) => Ok(()),
            _ => Err(format!(
                "{what} has {} bytes at {} of the data, but the file has {}: it is truncated",
                place.len, place.offset, self.file_len
            )),
        }
    }

    fn entry(self, entry: &Entry) -> BlockEntry {
        BlockEntry {
            linear: entry.linear(),
            level: entry.level,
            offset: self.data + entry.place.offset,
            len: entry.place.len,
            sha256: entry.place.sha256,
        }
    }
}

/// Two blocks in one place would be one of them twice.
fn check_overlaps<'a>(entries: impl Iterator<Item = &'a BlockEntry>) -> Result<(), String> {
    let mut places = HashSet::new();
    for entry in entries {
        if !places.insert(entry.offset) {
            return Err(format!("two blocks lie at byte {}", entry.offset));
        }
    }
    Ok(())
}

fn check_tensor(tensor: &TensorEntry) -> Result<(), String> {
    let dtype = tensor.dtype.0;
    let elements = tensor.shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim));
    let whole = tensor.shape.last().is_some_and(|width| width.is_multiple_of(dtype.block_size()));
    let bytes = elements.and_then(|n| (n / dtype.block_size()).checked_mul(dtype.type_size()));
    if whole && bytes == usize::try_from(tensor.place.len).ok() {
        return Ok(());
    }
    Err(format!("tensor {:?} of shape {:?} has {} bytes", tensor.name, tensor.shape, tensor.place.len))
}

fn read_header(file: &WeightFile) -> Result<(Header, u64)> {
    let preamble = if file.len() < PREAMBLE { Vec::new() } else { file.read_at(0, PREAMBLE as usize)? };
    if !preamble.starts_with(MAGIC) {
        return Err(file.malformed("is not a BitStack artefact"));
    }
    let number = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| preamble[at + i]));
    if number(8) != VERSION {
        let version = number(8);
        return Err(file.malformed(format!("has version {version} of the format; {VERSION} is read here")));
    }
    let len = u64::from(number(16)) | u64::from(number(20)) << 32;
    if len > MAX_HEADER_BYTES || len > file.len() - PREAMBLE {
        let all = file.len();
        return Err(file.malformed(format!("truncated or damaged: its header claims {len} of {all} bytes")));
    }
    let json = file.read_at(PREAMBLE, len as usize)?;
    if digest(&json) != preamble[24..56] {
        return Err(
            file.malformed("damaged: the header is not what its checksum says; fetch or build it again")
        );
    }
    let header =
        serde_json::from_slice(&json).map_err(|e| file.malformed(format!("malformed header: {e}")))?;
    Ok((header, PREAMBLE + len))
}

/// The tensors of an artefact that are not decomposed, by Hugging Face name.
#[derive(Debug, Clone, Copy)]
pub struct Tensors<'a> {
    artefact: &'a Artefact,
}

impl Tensors<'_> {
    /// Their names, in the order of the file.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.artefact.header.tensors.iter().map(|tensor| tensor.name.as_str())
    }
}

impl WeightSource for Tensors<'_> {
    fn contains(&self, name: &str) -> bool {
        self.artefact.tensors.contains_key(name)
    }

    fn tensor(&self, name: &str) -> Result<RawTensor<'_>> {
        let Some(&index) = self.artefact.tensors.get(name) else {
            return Err(self.artefact.file.malformed(format!("has no tensor {name:?}")));
        };
        let tensor = &self.artefact.header.tensors[index];
        let data = self.artefact.section(&tensor.place, || format!("tensor {name:?}"))?;
        Ok(RawTensor { dtype: tensor.dtype.0, shape: tensor.shape.clone(), data: Cow::Owned(data) })
    }
}
