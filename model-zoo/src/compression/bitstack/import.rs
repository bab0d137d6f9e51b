//! Checkpoints as the paper's authors publish them (`xinghaow99/BitStack`): a Hugging Face folder whose state dict has
//! `model.layers.N.MODULE.qweight_i`, `u_i` and `vt_i` for level `i`, and `compression_config.json`, a list of
//! `{"memory": bytes, "layers": {"layer.N.MODULE": levels}}` that grows by a block from each to the next.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::quantized::GgmlDType;
use serde::Deserialize;

use super::artefact::{Contents, Provenance, write};
use super::source::Source;
use super::{Block, LinearId, Projection, Shape};
use crate::config::DecoderConfig;
use crate::loader::TokenizerSource;
use crate::weights::WeightSource;
use crate::weights::safetensors::SafetensorsCheckpoint;
use crate::{Result, ZooError};

const ORDER: &str = "compression_config.json";

/// One of the budgets of [`ORDER`].
#[derive(Deserialize)]
struct Budget {
    memory: f64,
    layers: BTreeMap<String, usize>,
}

/// A published checkpoint.
struct Published<'a> {
    folder: &'a Path,
    checkpoint: SafetensorsCheckpoint,
    config: DecoderConfig,
}

/// Makes an artefact of the published checkpoint in `folder`.
///
/// # Errors
/// [`ZooError::Io`] and [`ZooError::Format`] about its files, [`ZooError::Unsupported`] about what it asks of a model.
pub fn import(folder: &Path, provenance: Provenance, out: &Path) -> Result<()> {
    let config = DecoderConfig::from_hf(&folder.join("config.json"))?;
    let published = Published { folder, checkpoint: SafetensorsCheckpoint::open(folder)?, config };
    published.refuse_unsupported()?;
    let linears: Vec<_> = LinearId::all(published.config.num_layers).collect();
    let mut shapes = HashMap::new();
    let mut levels = HashMap::new();
    for &linear in &linears {
        shapes.insert(linear, published.shape(linear)?);
        let has = |level: &usize| published.checkpoint.contains(&name(linear, &format!("qweight_{level}")));
        levels.insert(linear, (0..).take_while(has).count());
    }
    let stack = published.stack(&linears, &levels)?;
    let tokenizer = TokenizerSource::Folder(folder.to_owned());
    let other = SafetensorsCheckpoint::open(folder)?;
    let source = Source::new(published.config.clone(), tokenizer, Box::new(other));
    let most = levels.values().max().copied().unwrap_or(0);
    let contents = Contents {
        config: &source.config,
        provenance: Provenance { settings: format!("imported, {most} levels"), ..provenance },
        ranks: linears.iter().map(|linear| shapes[linear].rank).collect(),
        tokenizer: &source.tokenizer,
        tensors: source.other_tensors(false)?,
        stack,
    };
    write(out, &contents, &mut |linear, level| published.block((linear, level), shapes[&linear]))
}

/// Name of a part of a matrix.
fn name(linear: LinearId, part: &str) -> String {
    linear.weight_name().replace(".weight", &format!(".{part}"))
}

impl Published<'_> {
    fn malformed(&self, reason: String) -> ZooError {
        ZooError::format(self.folder, reason)
    }

    /// Biases, which the authors' own code leaves out, and scales that are not fused into the model.
    fn refuse_unsupported(&self) -> Result<()> {
        let refused = |name: &&str| name.ends_with(".bias_0") || name.ends_with(".scales");
        let mut names: Vec<_> = self.checkpoint.names().filter(refused).collect();
        names.sort_unstable();
        match names.first() {
            Some(name) => Err(ZooError::Unsupported(format!(
                "{}: tensor {name:?}: biases of levels and scales of activations are not imported",
                self.folder.display()
            ))),
            None => Ok(()),
        }
    }

    fn shape(&self, linear: LinearId) -> Result<Shape> {
        let [rows, cols] = linear.projection.size(&self.config);
        let u = self.checkpoint.tensor(&name(linear, "u_0"))?;
        match u.shape[..] {
            [found, rank] if found == rows && rank > 0 && rank <= rows.min(cols) => {
                Ok(Shape { rows, cols, rank })
            }
            _ => Err(self.malformed(format!("u_0 of {linear} has shape {:?}, not [{rows}, rank]", u.shape))),
        }
    }

    fn block(&self, (linear, level): (LinearId, usize), shape: Shape) -> Result<Block> {
        let signs = self.checkpoint.bytes(&name(linear, &format!("qweight_{level}")))?;
        if signs.len() != shape.sign_bytes() {
            let (found, wanted) = (signs.len(), shape.sign_bytes());
            return Err(
                self.malformed(format!("qweight_{level} of {linear} has {found} bytes, not {wanted}"))
            );
        }
        let halves = |part: &str, wanted: [usize; 2]| {
            let tensor = self.checkpoint.tensor(&name(linear, &format!("{part}_{level}")))?;
            if tensor.dtype != GgmlDType::F16 || tensor.shape != wanted {
                let (dtype, found) = (tensor.dtype, tensor.shape);
                let reason = format!("{part}_{level} of {linear} is {dtype:?} {found:?}, not F16 {wanted:?}");
                return Err(self.malformed(reason));
            }
            Ok(tensor.data.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect::<Vec<_>>())
        };
        let (u, vt) = (halves("u", [shape.rows, shape.rank])?, halves("vt", [shape.rank, shape.cols])?);
        Ok(Block { linear, level, signs, u, vt })
    }

    /// The blocks above the base in the order in which the budgets take them; those that none takes come last, level by
    /// level.
    fn stack(
        &self,
        linears: &[LinearId],
        levels: &HashMap<LinearId, usize>,
    ) -> Result<Vec<(LinearId, usize)>> {
        let path = self.folder.join(ORDER);
        let text = std::fs::read(&path).map_err(|e| ZooError::io(&path, e))?;
        let mut budgets: Vec<Budget> =
            serde_json::from_slice(&text).map_err(|e| ZooError::format(&path, e.to_string()))?;
        budgets.sort_by(|a, b| a.memory.total_cmp(&b.memory));
        let ids: HashMap<_, _> = linears.iter().map(|&linear| (order_name(linear), linear)).collect();
        let mut held: HashMap<_, _> = linears.iter().map(|&linear| (linear, 1)).collect();
        let mut stack = Vec::new();
        for budget in &budgets {
            for (name, &count) in &budget.layers {
                let Some(&linear) = ids.get(name) else {
                    return Err(ZooError::format(&path, format!("names {name:?}, which the model has not")));
                };
                let own = held.entry(linear).or_insert(1);
                if count > levels[&linear] || count < *own {
                    let all = levels[&linear];
                    let reason =
                        format!("gives {name:?} {count} levels after {own}; the checkpoint has {all}");
                    return Err(ZooError::format(&path, reason));
                }
                stack.extend((*own..count).map(|level| (linear, level)));
                *own = count;
            }
        }
        let most = levels.values().max().copied().unwrap_or(0);
        for level in 1..most {
            let left = linears.iter().filter(|linear| held[linear] <= level && level < levels[linear]);
            stack.extend(left.map(|&linear| (linear, level)));
        }
        if let Some(linear) = linears.iter().find(|linear| levels[linear] == 0) {
            return Err(self.malformed(format!("{linear} has no level")));
        }
        Ok(stack)
    }
}

/// A matrix's name in [`ORDER`].
fn order_name(linear: LinearId) -> String {
    let module: &str = Projection::module(linear.projection);
    format!("layer.{}.{module}", linear.layer)
}
