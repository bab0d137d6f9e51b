//! Input tensors: one element each, as raw bytes or as typed contents.

use rheostat_proto::inference::ModelInferRequest;
use rheostat_proto::inference::model_infer_request::InferInputTensor;

use crate::error::Error;

/// Longest prefix of a client's name that an error repeats.
const MAX_SHOWN: usize = 64;

/// The tensors of a request.
#[derive(Debug, Default)]
pub(super) struct Inputs {
    /// `text_input`.
    pub(super) text: String,
    /// `stream`, or `streaming`.
    pub(super) stream: bool,
    /// `sampling_parameters`, not parsed.
    pub(super) sampling_parameters: Option<String>,
    /// `return_finish_reason`, and so on: outputs that the request turned on or off.
    pub(super) returns: Vec<(&'static str, bool)>,
    exclude_input: Option<bool>,
}

/// Where a tensor's elements are.
#[derive(Clone, Copy)]
struct Source<'a> {
    tensor: &'a InferInputTensor,
    raw: Option<&'a [u8]>,
}

impl Inputs {
    /// Reads every input.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::InvalidArgument`] that names the tensor: unknown, twice, missing, of
    /// the wrong type or shape, or with contents that do not fit them.
    pub(super) fn read(request: &ModelInferRequest) -> Result<Self, Error> {
        let raw = &request.raw_input_contents;
        if !raw.is_empty() && raw.len() != request.inputs.len() {
            let message =
                format!("raw_input_contents has {} entries for {} inputs", raw.len(), request.inputs.len());
            return Err(Error::invalid("raw_input_contents", message));
        }
        let mut read = Self::default();
        let mut text = None;
        for (i, tensor) in request.inputs.iter().enumerate() {
            if request.inputs[..i].iter().any(|other| other.name == tensor.name) {
                return Err(source_error(tensor, "is given twice"));
            }
            read.take(Source { tensor, raw: raw.get(i).map(Vec::as_slice) }, &mut text)?;
        }
        read.text =
            text.ok_or_else(|| Error::invalid("text_input", "the input tensor `text_input` is required"))?;
        Ok(read)
    }

    fn take(&mut self, source: Source<'_>, text: &mut Option<String>) -> Result<(), Error> {
        match source.tensor.name.as_str() {
            "text_input" => *text = Some(source.text()?),
            "stream" | "streaming" => self.stream = source.flag()?,
            "sampling_parameters" => self.sampling_parameters = Some(source.text()?),
            "exclude_input_in_output" => self.exclude_input = Some(source.flag()?),
            "return_finish_reason" => self.returns.push(("finish_reason", source.flag()?)),
            "return_num_input_tokens" => self.returns.push(("num_input_tokens", source.flag()?)),
            "return_num_output_tokens" => self.returns.push(("num_output_tokens", source.flag()?)),
            "return_logprobs" | "return_cumulative_logprob" => {
                if source.flag()? {
                    return Err(source.error("is not supported; rheostat.v1 reports log-probabilities"));
                }
            }
            _ => return Err(source.error("is not an input of this model")),
        }
        Ok(())
    }

    /// What `text_output` begins with: the prompt when the request answers once, nothing when it
    /// streams, unless `exclude_input_in_output` says otherwise.
    ///
    /// # Errors
    /// When a stream asks for the prompt: its responses are deltas.
    pub(super) fn prefix(&self) -> Result<&str, Error> {
        match (self.stream, self.exclude_input) {
            (true, Some(false)) => Err(Error::invalid(
                "exclude_input_in_output",
                "exclude_input_in_output cannot be false when stream is true",
            )),
            (true, _) | (_, Some(true)) => Ok(""),
            (false, _) => Ok(&self.text),
        }
    }
}

fn source_error(tensor: &InferInputTensor, what: &str) -> Error {
    let name: String = tensor.name.chars().take(MAX_SHOWN).collect();
    Error::invalid(&name, format!("the input tensor `{name}` {what}"))
}

impl<'a> Source<'a> {
    fn error(self, what: &str) -> Error {
        source_error(self.tensor, what)
    }

    /// Shape `[1]` or `[1, 1]`.
    fn expect(self, datatype: &str) -> Result<(), Error> {
        if self.tensor.datatype != datatype {
            return Err(self.error(&format!("must be of datatype {datatype}")));
        }
        if !matches!(self.tensor.shape[..], [1] | [1, 1]) {
            return Err(self.error("must have shape [1] or [1, 1]"));
        }
        if self.raw.is_some() && self.tensor.contents.is_some() {
            return Err(self.error("has contents besides raw_input_contents"));
        }
        Ok(())
    }

    fn text(self) -> Result<String, Error> {
        self.expect("BYTES")?;
        let bytes = match self.raw {
            Some(raw) => self.framed(raw)?,
            None => match self.tensor.contents.as_ref().map(|c| c.bytes_contents.as_slice()) {
                Some([only]) => only.as_slice(),
                _ => return Err(self.error("must have one element in bytes_contents")),
            },
        };
        let text = std::str::from_utf8(bytes).map_err(|_| self.error("must be valid UTF-8"))?;
        Ok(text.to_owned())
    }

    /// The one element behind its 4-byte little-endian length.
    fn framed(self, raw: &'a [u8]) -> Result<&'a [u8], Error> {
        match raw.split_first_chunk::<4>() {
            Some((length, element)) if u32::from_le_bytes(*length) as usize == element.len() => Ok(element),
            _ => Err(self.error("must be one element behind its 4-byte length")),
        }
    }

    fn flag(self) -> Result<bool, Error> {
        self.expect("BOOL")?;
        match self.raw {
            Some([byte]) => Ok(*byte != 0),
            Some(_) => Err(self.error("must be one byte")),
            None => match self.tensor.contents.as_ref().map(|c| c.bool_contents.as_slice()) {
                Some([only]) => Ok(*only),
                _ => Err(self.error("must have one element in bool_contents")),
            },
        }
    }
}
