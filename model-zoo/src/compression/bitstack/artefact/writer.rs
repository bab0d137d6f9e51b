//! Writing an artefact.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;

use super::super::{Block, LinearId};
use super::header::{
    Dtype, Entry, Header, Place, Provenance, TensorEntry, TokenizerKind, TokenizerSection, digest,
};
use super::{ALIGNMENT, MAGIC, PREAMBLE, VERSION};
use crate::config::DecoderConfig;
use crate::loader::TokenizerSource;
use crate::{Result, ZooError};

/// A tensor to be stored as it is.
#[derive(Debug, Clone)]
pub struct StoredTensor {
    /// Hugging Face's name.
    pub name: String,
    /// Element or block type.
    pub dtype: GgmlDType,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// The bytes, little-endian.
    pub data: Vec<u8>,
}

/// What goes into an artefact beside its blocks.
#[derive(Debug)]
pub struct Contents<'a> {
    /// The decoder.
    pub config: &'a DecoderConfig,
    /// Where the weights come from.
    pub provenance: Provenance,
    /// Rank of each matrix's magnitudes, in the order of [`LinearId::all`].
    pub ranks: Vec<usize>,
    /// The tokenizer.
    pub tokenizer: &'a TokenizerSource,
    /// Embedding, norms, biases, and the output matrix where it is not the embedding.
    pub tensors: Vec<StoredTensor>,
    /// The blocks above the base: matrix and level, in order of importance.
    pub stack: Vec<(LinearId, usize)>,
}

/// Writes an artefact to `path`, whose blocks are got from `block`, each twice. The file appears whole or not at all.
///
/// # Errors
/// [`ZooError::Io`] when it cannot be written, and whatever `block` says.
pub fn write(
    path: &Path,
    contents: &Contents<'_>,
    block: &mut dyn FnMut(LinearId, usize) -> Result<Block>,
) -> Result<()> {
    let tokenizer = tokenizer(contents.tokenizer)?;
    let header = header(contents, &tokenizer, block)?;
    let json = serde_json::to_vec(&header).map_err(|e| ZooError::format(path, e.to_string()))?;
    let unfinished = PathBuf::from(format!("{}.unfinished", path.display()));
    let file = File::create(&unfinished).map_err(|e| ZooError::io(&unfinished, e))?;
    let mut out = Output { path: &unfinished, file: BufWriter::with_capacity(1 << 20, file), written: 0 };
    out.put(MAGIC)?;
    out.put(&VERSION.to_le_bytes())?;
    out.put(&0u32.to_le_bytes())?;
    out.put(&(json.len() as u64).to_le_bytes())?;
    out.put(&digest(&json))?;
    debug_assert_eq!(out.written, PREAMBLE);
    out.put(&json)?;
    out.section(&tokenizer.1)?;
    for tensor in &contents.tensors {
        out.section(&tensor.data)?;
    }
    for entry in header.base.iter().chain(&header.stack) {
        out.section(&block(entry.linear(), entry.level)?.to_bytes())?;
    }
    out.finish()?;
    std::fs::rename(&unfinished, path).map_err(|e| ZooError::io(path, e))
}

/// A file being written.
struct Output<'a> {
    path: &'a Path,
    file: BufWriter<File>,
    written: u64,
}

impl Output<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.written += bytes.len() as u64;
        self.file.write_all(bytes).map_err(|e| ZooError::io(self.path, e))
    }

    /// Bytes at the next multiple of the alignment.
    fn section(&mut self, bytes: &[u8]) -> Result<()> {
        let padding = self.written.next_multiple_of(ALIGNMENT) - self.written;
        self.put(&[0; ALIGNMENT as usize][..padding as usize])?;
        self.put(bytes)
    }

    /// Makes sure that the bytes are on the disk.
    fn finish(mut self) -> Result<()> {
        let synced = self.file.flush().and_then(|()| self.file.get_ref().sync_all());
        synced.map_err(|e| ZooError::io(self.path, e))
    }
}

/// Gives sections their places, one after the other.
#[derive(Default)]
struct Layout {
    end: u64,
}

impl Layout {
    fn place(&mut self, bytes: &[u8]) -> Place {
        let offset = self.end.next_multiple_of(ALIGNMENT);
        self.end = offset + bytes.len() as u64;
        Place { offset, len: bytes.len() as u64, sha256: digest(bytes) }
    }
}

fn header(
    contents: &Contents<'_>,
    (kind, tokenizer): &(TokenizerKind, Vec<u8>),
    block: &mut dyn FnMut(LinearId, usize) -> Result<Block>,
) -> Result<Header> {
    let mut layout = Layout::default();
    let tokenizer = TokenizerSection { kind: *kind, place: layout.place(tokenizer) };
    let tensor = |tensor: &StoredTensor, place: Place| TensorEntry {
        name: tensor.name.clone(),
        dtype: Dtype(tensor.dtype),
        shape: tensor.shape.clone(),
        place,
    };
    let tensors = contents.tensors.iter().map(|t| tensor(t, layout.place(&t.data))).collect();
    let mut entry = |(linear, level): (LinearId, usize)| {
        let place = layout.place(&block(linear, level)?.to_bytes());
        Ok(Entry { layer: linear.layer, projection: linear.projection, level, place })
    };
    let base = LinearId::all(contents.config.num_layers).map(|linear| entry((linear, 0)));
    let base = base.collect::<Result<_>>()?;
    let stack = contents.stack.iter().map(|&at| entry(at)).collect::<Result<_>>()?;
    Ok(Header {
        config: contents.config.clone(),
        provenance: contents.provenance.clone(),
        ranks: contents.ranks.clone(),
        tokenizer,
        tensors,
        base,
        stack,
    })
}

/// The tokenizer's section.
fn tokenizer(source: &TokenizerSource) -> Result<(TokenizerKind, Vec<u8>)> {
    let (kind, json, path) = match source {
        TokenizerSource::Gguf(metadata) => {
            (TokenizerKind::Gguf, serde_json::to_vec(&metadata.sorted()), metadata.path().to_owned())
        }
        TokenizerSource::Folder(folder) => {
            let files = crate::tokenizer::folder::read(folder)?.files;
            (TokenizerKind::Files, serde_json::to_vec(&files), folder.clone())
        }
        TokenizerSource::Files(files) => {
            (TokenizerKind::Files, serde_json::to_vec(&files.files), files.origin.clone())
        }
    };
    Ok((kind, json.map_err(|e| ZooError::format(path, e.to_string()))?))
}
