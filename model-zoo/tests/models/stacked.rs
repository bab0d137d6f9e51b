//! Small BitStack artefacts, decomposed as published from the checkpoint in a folder.

use std::collections::BTreeMap;
use std::path::Path;

use model_zoo::compression::bitstack::artefact::{Contents, Provenance, StoredTensor, write};
use model_zoo::compression::bitstack::avd::take_level;
use model_zoo::compression::bitstack::{Block, LinearId, Shape};
use model_zoo::config::DecoderConfig;
use model_zoo::layers::linear::to_f32;
use model_zoo::loader::{TokenizerFiles, TokenizerSource};
use model_zoo::weights::WeightSource;
use model_zoo::weights::safetensors::SafetensorsCheckpoint;

/// Writes the artefact of the checkpoint in `folder` to `path`: `levels` levels of rank `rank`, the stack level by
/// level and the matrices from the last to the first. A folder without a tokenizer makes an artefact without one.
///
/// # Panics
/// When the folder has no such checkpoint, or `path` cannot be written.
pub(crate) fn write_artefact(folder: &Path, path: &Path, (levels, rank): (usize, usize)) {
    let config = DecoderConfig::from_hf(&folder.join("config.json")).expect("a config");
    let checkpoint = SafetensorsCheckpoint::open(folder).expect("a checkpoint");
    let linears: Vec<LinearId> = LinearId::all(config.num_layers).collect();
    let blocks: Vec<Vec<Block>> = linears
        .iter()
        .map(|&linear| {
            let weight = checkpoint.tensor(&linear.weight_name()).expect("a weight");
            let mut residual = to_f32(&weight).expect("values");
            let [rows, cols] = linear.projection.size(&config);
            let shape = Shape { rows, cols, rank };
            (0..levels).map(|level| take_level(&mut residual, shape, (linear, level))).collect()
        })
        .collect();
    let layer_norms = (0..config.num_layers).flat_map(|layer| {
        ["input_layernorm", "post_attention_layernorm"]
            .map(|norm| format!("model.layers.{layer}.{norm}.weight"))
    });
    let others = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"].map(str::to_owned);
    let names = others.into_iter().chain(layer_norms).filter(|name| checkpoint.contains(name));
    let stored = |name: String| {
        let tensor = checkpoint.tensor(&name).expect("it is there");
        StoredTensor { name, dtype: tensor.dtype, shape: tensor.shape, data: tensor.data.into_owned() }
    };
    let no_files = TokenizerFiles { origin: folder.to_owned(), files: BTreeMap::new() };
    let tokenizer = match folder.join("tokenizer.json").exists() {
        true => TokenizerSource::Folder(folder.to_owned()),
        false => TokenizerSource::Files(no_files),
    };
    let contents = Contents {
        config: &config,
        provenance: Provenance::default(),
        ranks: vec![rank; linears.len()],
        tokenizer: &tokenizer,
        tensors: names.map(stored).collect(),
        stack: (1..levels)
            .flat_map(|level| linears.iter().rev().map(move |&linear| (linear, level)))
            .collect(),
    };
    let mut block = |linear: LinearId, level: usize| Ok(blocks[linear.index()][level].clone());
    write(path, &contents, &mut block).expect("a writable path");
}
