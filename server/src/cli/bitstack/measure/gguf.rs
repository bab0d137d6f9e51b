//! GGUF's types at the same weights: the sizes that a stack competes with.

use std::borrow::Cow;

use model_zoo::Result;
use model_zoo::compression::bitstack::LinearId;
use model_zoo::compression::bitstack::quantized::{Type, quantize};
use model_zoo::compression::bitstack::source::Source;
use model_zoo::weights::{RawTensor, WeightSource};

use super::{Meter, Row};

/// The types that are measured.
pub(super) const TYPES: [Type; 7] =
    [Type::Grouped(2), Type::Grouped(3), Type::Q4_0, Type::Q4_1, Type::Q5_0, Type::Q5_1, Type::Q8_0];

/// The source as it is, and in every type.
pub(super) fn rows(source: &Source, meter: &mut Meter<'_>) -> std::result::Result<Vec<Row>, String> {
    let tensors = source.other_tensors(false).map_err(|e| e.to_string())?;
    let rest: u64 = tensors.iter().map(|tensor| tensor.data.len() as u64).sum();
    let weights: usize = LinearId::all(source.config.num_layers)
        .map(|linear| linear.projection.size(&source.config).iter().product::<usize>())
        .sum();
    let row = |name: String, bytes: u64, perplexity| Row {
        name,
        asked: None,
        bytes: rest + bytes,
        blocks: None,
        next_block: None,
        bits: 8.0 * bytes as f64 / weights as f64,
        perplexity,
    };
    let mut rows = Vec::new();
    let own = source.matrix_bytes().map_err(|e| e.to_string())?;
    rows.push(row("the source".into(), own, meter.perplexity(&source.config, source)?));
    for kind in TYPES {
        let quantized = Quantized { source, kind };
        let perplexity = meter.perplexity(&source.config, &quantized)?;
        rows.push(row(kind.name(), kind.bytes(weights), perplexity));
    }
    Ok(rows)
}

/// A source whose matrices are quantized again.
struct Quantized<'a> {
    source: &'a Source,
    kind: Type,
}

impl WeightSource for Quantized<'_> {
    fn contains(&self, name: &str) -> bool {
        self.source.contains(name)
    }

    fn tensor(&self, name: &str) -> Result<RawTensor<'_>> {
        match LinearId::of_weight(name) {
            Some(linear) => {
                let size = linear.projection.size(&self.source.config);
                let (dtype, data) = quantize(self.kind, &self.source.matrix(linear)?, size)?;
                Ok(RawTensor { dtype, shape: size.to_vec(), data: Cow::Owned(data) })
            }
            None => self.source.tensor(name),
        }
    }
}
