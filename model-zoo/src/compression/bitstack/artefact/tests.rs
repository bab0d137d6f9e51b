use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use tempfile::TempDir;

use super::super::{Block, LinearId, Shape};
use super::*;
use crate::config::DecoderConfig;
use crate::loader::{TokenizerFiles, TokenizerSource};
use crate::weights::WeightSource;

const LEVELS: usize = 3;
const RANK: usize = 2;

fn config() -> DecoderConfig {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama/config.json");
    DecoderConfig::from_hf(&fixture).unwrap()
}

fn shape(linear: LinearId, config: &DecoderConfig) -> Shape {
    let [rows, cols] = linear.projection.size(config);
    Shape { rows, cols, rank: RANK }
}

fn block(linear: LinearId, level: usize, shape: Shape) -> Block {
    let seed = 31 * linear.index() + level;
    let byte = |i: usize| (((i + seed) * 2_654_435_761) >> 7) as u8;
    let half = |i: usize| (((i + seed) * 40_503) >> 3) as u16;
    Block {
        linear,
        level,
        signs: (0..shape.sign_bytes()).map(byte).collect(),
        u: (0..shape.rows * RANK).map(half).collect(),
        vt: (0..shape.cols * RANK).map(half).collect(),
    }
}

/// An artefact whose levels above the base lie in descending order of the matrices.
fn written(folder: &TempDir) -> (PathBuf, DecoderConfig) {
    let config = config();
    let path = folder.path().join("tiny.bitstack");
    let mut linears: Vec<_> = LinearId::all(config.num_layers).collect();
    linears.reverse();
    let files = BTreeMap::from([("tokenizer.json".to_owned(), "{}".to_owned())]);
    let contents = Contents {
        config: &config,
        provenance: Provenance { model: "tiny".into(), ..Provenance::default() },
        ranks: vec![RANK; linears.len()],
        tokenizer: &TokenizerSource::Files(TokenizerFiles { origin: "memory".into(), files }),
        tensors: vec![
            StoredTensor {
                name: "model.norm.weight".into(),
                dtype: GgmlDType::F32,
                shape: vec![3],
                data: (0..12).collect(),
            },
            StoredTensor {
                name: "model.embed_tokens.weight".into(),
                dtype: GgmlDType::Q8_0,
                shape: vec![5, 64],
                data: vec![7; 5 * 68],
            },
        ],
        stack: (1..LEVELS).flat_map(|level| linears.iter().map(move |&linear| (linear, level))).collect(),
    };
    write(&path, &contents, &mut |linear, level| Ok(block(linear, level, shape(linear, &config)))).unwrap();
    (path, config)
}

#[test]
fn what_is_written_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let (path, config) = written(&folder);
    let artefact = Artefact::open(&path).unwrap();
    assert!(Artefact::is_artefact(&path));
    assert_eq!(artefact.config(), &config);
    assert_eq!(artefact.provenance().model, "tiny");
    assert!(artefact.base().iter().map(|entry| entry.linear).eq(LinearId::all(config.num_layers)));
    assert_eq!(artefact.stack().len(), (LEVELS - 1) * artefact.base().len());
    let mut end = 0;
    for entry in artefact.base().iter().chain(artefact.stack()) {
        assert!(entry.offset >= end && entry.offset.is_multiple_of(ALIGNMENT), "in order and aligned");
        assert!(entry.offset - end < ALIGNMENT || end == 0, "no holes");
        end = entry.offset + entry.len;
        let truth = block(entry.linear, entry.level, shape(entry.linear, &config));
        assert_eq!(artefact.read_block(entry).unwrap(), truth);
        assert_eq!(artefact.shape(entry.linear), shape(entry.linear, &config));
    }
    assert_eq!(end, artefact.file_bytes());
    let tensors = artefact.tensors();
    let embedding = tensors.tensor("model.embed_tokens.weight").unwrap();
    assert_eq!((embedding.dtype, embedding.shape, embedding.data.len()), (GgmlDType::Q8_0, vec![5, 64], 340));
    assert!(!artefact.tensors().contains("lm_head.weight"));
    let TokenizerSource::Files(files) = artefact.tokenizer().unwrap() else { panic!("another source") };
    assert_eq!(files.files["tokenizer.json"], "{}");
}

#[test]
fn a_gguf_files_tokenizer_comes_back_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers/smollm.gguf");
    let metadata = crate::weights::gguf::GgufFile::open(&fixture).unwrap().into_metadata();
    let config = config();
    let linears = LinearId::all(config.num_layers).count();
    let contents = Contents {
        config: &config,
        provenance: Provenance::default(),
        ranks: vec![RANK; linears],
        tokenizer: &TokenizerSource::Gguf(metadata.clone()),
        tensors: Vec::new(),
        stack: Vec::new(),
    };
    let path = folder.path().join("stack");
    write(&path, &contents, &mut |linear, level| Ok(block(linear, level, shape(linear, &config)))).unwrap();
    let TokenizerSource::Gguf(found) = Artefact::open(&path).unwrap().tokenizer().unwrap() else {
        panic!("another source");
    };
    assert_eq!(found.sorted(), metadata.sorted());
}

/// Everything in the artefact at `path`, or the first refusal.
fn read_all(path: &Path) -> crate::Result<()> {
    let artefact = Artefact::open(path)?;
    artefact.tokenizer()?;
    for name in artefact.tensors().names() {
        artefact.tensors().tensor(name)?;
    }
    artefact
        .base()
        .iter()
        .chain(artefact.stack())
        .try_for_each(|entry| artefact.read_block(entry).map(|_| ()))
}

#[test]
fn torn_and_corrupted_artefacts_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (path, _) = written(&folder);
    let whole = std::fs::read(&path).unwrap();
    let artefact = Artefact::open(&path).unwrap();
    let other = folder.path().join("other");
    for len in [0, 7, 55, 56, 1000, artefact.data as usize, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&other, &whole[..len]).unwrap();
        let error = Artefact::open(&other).expect_err("a torn file").to_string();
        assert!(error.contains("other"), "{error}");
    }
    // Every byte that means something is covered by a checksum or checked: the preamble, the header, every section.
    let sections = artefact.base().iter().chain(artefact.stack());
    let mut places: Vec<u64> =
        sections.flat_map(|e| [e.offset, e.offset + e.len / 2, e.offset + e.len - 1]).collect();
    let header = &artefact.header;
    places.extend(header.tensors.iter().map(|tensor| artefact.data + tensor.place.offset));
    places.push(artefact.data + header.tokenizer.place.offset);
    places.extend([0, 8, 16, 20, 24, 55, 56, 700]);
    for at in places {
        let mut bytes = whole.clone();
        bytes[at as usize] ^= 0x10;
        std::fs::write(&other, &bytes).unwrap();
        assert!(read_all(&other).is_err(), "a flipped bit of byte {at} went unnoticed");
    }
    std::fs::write(&other, &whole).unwrap();
    read_all(&other).unwrap();
}

#[test]
fn headers_that_contradict_themselves_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (path, _) = written(&folder);
    let whole = std::fs::read(&path).unwrap();
    let header_len = u64::from_le_bytes(whole[16..24].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&whole[56..56 + header_len]).unwrap();
    type Change = fn(&mut serde_json::Value);
    let changes: [(&str, Change); 8] = [
        ("rank", |json| json["ranks"][3] = 0.into()),
        ("rank", |json| json["ranks"][3] = 4096.into()),
        ("ranks for", |json| json["ranks"] = serde_json::json!([1])),
        ("out of order", |json| json["stack"][0]["level"] = 2.into()),
        ("every matrix", |json| json["base"].as_array_mut().unwrap().swap(0, 1)),
        ("not in a model", |json| json["stack"][0]["layer"] = u64::MAX.into()),
        ("truncated", |json| json["stack"][0]["offset"] = (u64::MAX - 4095).into()),
        ("hidden size", |json| json["config"]["hidden_size"] = 0.into()),
    ];
    let other = folder.path().join("other");
    for (reason, change) in changes {
        let mut changed = json.clone();
        change(&mut changed);
        let header = serde_json::to_vec(&changed).unwrap();
        let mut bytes = whole[..16].to_vec();
        bytes.extend((header.len() as u64).to_le_bytes());
        bytes.extend(header::digest(&header));
        bytes.extend(header);
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT as usize), 0);
        bytes.extend(&whole[(56 + header_len).next_multiple_of(ALIGNMENT as usize)..]);
        std::fs::write(&other, &bytes).unwrap();
        let error = Artefact::open(&other).expect_err(reason).to_string();
        assert!(error.contains(reason), "{reason}: {error}");
    }
}
