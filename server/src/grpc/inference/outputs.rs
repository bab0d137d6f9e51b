//! Output tensors, in the representation that the request's inputs had.

use std::collections::HashMap;

use rheostat_proto::inference::infer_parameter::ParameterChoice;
use rheostat_proto::inference::model_infer_response::InferOutputTensor;
use rheostat_proto::inference::{
    InferParameter, InferTensorContents, ModelInferRequest, ModelInferResponse, ModelStreamInferResponse,
};

use crate::error::Error;
use crate::service::Admitted;

use super::super::completion::Completion;
use super::VERSION;
use super::inputs::Inputs;

const OUTPUTS: [&str; 4] = ["text_output", "finish_reason", "num_input_tokens", "num_output_tokens"];
const FINAL: &str = "triton_final_response";
const EMPTY_FINAL: &str = "triton_enable_empty_final_response";

/// How to answer a request.
#[derive(Debug, Clone)]
pub(super) struct Reply {
    /// The client's id, in every response.
    id: String,
    model: String,
    request_id: String,
    prompt_tokens: u32,
    raw: bool,
    outputs: Vec<&'static str>,
    /// Mark the end of a stream by a response of its own.
    pub(super) empty_final: bool,
}

/// One response's values, one of each a choice.
#[derive(Debug, Default)]
pub(super) struct Frame {
    /// `text_output`.
    pub(super) texts: Vec<String>,
    /// `finish_reason`; empty for a choice that goes on.
    pub(super) reasons: Vec<&'static str>,
    /// `num_output_tokens`.
    pub(super) counts: Vec<u32>,
}

impl Frame {
    /// A frame of `n` choices in which nothing has happened.
    pub(super) fn of(n: usize) -> Self {
        Self { texts: vec![String::new(); n], reasons: vec![""; n], counts: vec![0; n] }
    }

    /// A finished request, with `prefix` before each text.
    pub(super) fn whole(completion: Completion, prefix: &str) -> Self {
        let mut frame = Self::default();
        for choice in completion.choices {
            frame.texts.push(format!("{prefix}{}", choice.text));
            frame.reasons.push(choice.finished.map_or("", |(reason, _)| reason.as_str()));
            frame.counts.push(choice.usage.completion_tokens as u32);
        }
        frame
    }
}

impl Reply {
    /// Reads how `request` wants to be answered.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::InvalidArgument`] for an output that the model does not have.
    pub(super) fn to(request: &ModelInferRequest, inputs: &Inputs) -> Result<Self, Error> {
        let empty_final = request.parameters.get(EMPTY_FINAL).and_then(|p| p.parameter_choice.as_ref());
        Ok(Self {
            empty_final: matches!(empty_final, Some(ParameterChoice::BoolParam(true))),
            raw: !request.raw_input_contents.is_empty(),
            outputs: wanted(request, inputs)?,
            ..Self::refusal(request)
        })
    }

    /// What an error answer to `request` needs.
    pub(super) fn refusal(request: &ModelInferRequest) -> Self {
        Self {
            id: request.id.clone(),
            model: request.model_name.clone(),
            request_id: String::new(),
            prompt_tokens: 0,
            raw: false,
            outputs: Vec::new(),
            empty_final: false,
        }
    }

    /// Takes what admission has added to the request.
    pub(super) fn admitted(&mut self, admitted: &Admitted, model: &str) {
        self.model = model.to_owned();
        self.request_id.clone_from(&admitted.id);
        self.prompt_tokens = admitted.prompt.len() as u32;
    }

    /// A response that carries `frame`.
    pub(super) fn response(&self, frame: &Frame) -> ModelInferResponse {
        let mut response = self.bare();
        for &name in &self.outputs {
            match name {
                "text_output" => self.push_bytes(&mut response, name, &frame.texts),
                "finish_reason" => self.push_bytes(&mut response, name, &frame.reasons),
                "num_input_tokens" => self.push_counts(&mut response, name, &[self.prompt_tokens]),
                _ => self.push_counts(&mut response, name, &frame.counts),
            }
        }
        response
    }

    /// A response of a stream, with `frame`'s tensors if any, and whether it is the request's last.
    pub(super) fn streamed(&self, frame: Option<&Frame>, last: bool) -> ModelStreamInferResponse {
        mark(frame.map_or_else(|| self.bare(), |frame| self.response(frame)), last)
    }

    /// The end of a request that failed, in a stream that goes on.
    pub(super) fn failed(&self, error: &Error) -> ModelStreamInferResponse {
        ModelStreamInferResponse { error_message: error.message.clone(), ..self.streamed(None, true) }
    }

    /// A response without tensors.
    fn bare(&self) -> ModelInferResponse {
        let mut parameters = HashMap::new();
        if !self.request_id.is_empty() {
            let id = ParameterChoice::StringParam(self.request_id.clone());
            parameters.insert("request_id".into(), InferParameter { parameter_choice: Some(id) });
        }
        ModelInferResponse {
            model_name: self.model.clone(),
            model_version: VERSION.into(),
            id: self.id.clone(),
            parameters,
            ..ModelInferResponse::default()
        }
    }

    fn push_bytes<T: AsRef<str>>(&self, response: &mut ModelInferResponse, name: &str, elements: &[T]) {
        let bytes = || elements.iter().map(|e| e.as_ref().as_bytes());
        let contents = if self.raw {
            // A message is below 4 GiB, and so is every length in it.
            let framed = bytes().flat_map(|b| [&(b.len() as u32).to_le_bytes(), b].concat()).collect();
            response.raw_output_contents.push(framed);
            None
        } else {
            let bytes_contents = bytes().map(<[u8]>::to_vec).collect();
            Some(InferTensorContents { bytes_contents, ..Default::default() })
        };
        response.outputs.push(tensor(name, "BYTES", elements.len(), contents));
    }

    fn push_counts(&self, response: &mut ModelInferResponse, name: &str, elements: &[u32]) {
        let contents = if self.raw {
            response.raw_output_contents.push(elements.iter().flat_map(|e| e.to_le_bytes()).collect());
            None
        } else {
            Some(InferTensorContents { uint_contents: elements.to_vec(), ..Default::default() })
        };
        response.outputs.push(tensor(name, "UINT32", elements.len(), contents));
    }
}

/// Puts a response into a stream, with whether it is its request's last.
pub(super) fn mark(mut response: ModelInferResponse, last: bool) -> ModelStreamInferResponse {
    let flag = InferParameter { parameter_choice: Some(ParameterChoice::BoolParam(last)) };
    response.parameters.insert(FINAL.into(), flag);
    ModelStreamInferResponse { error_message: String::new(), infer_response: Some(response) }
}

fn tensor(
    name: &str,
    datatype: &str,
    length: usize,
    contents: Option<InferTensorContents>,
) -> InferOutputTensor {
    InferOutputTensor {
        name: name.into(),
        datatype: datatype.into(),
        shape: vec![length as i64],
        parameters: HashMap::new(),
        contents,
    }
}

/// The outputs that the request names, or else all but those that it turned off.
fn wanted(request: &ModelInferRequest, inputs: &Inputs) -> Result<Vec<&'static str>, Error> {
    if request.outputs.is_empty() {
        let off = |name: &&str| inputs.returns.contains(&(*name, false));
        return Ok(OUTPUTS.into_iter().filter(|name| !off(name)).collect());
    }
    let asked = request.outputs.iter().map(|output| {
        OUTPUTS.into_iter().find(|name| *name == output.name).ok_or_else(|| {
            Error::invalid("outputs", format!("this model has no such output; it has {}", OUTPUTS.join(", ")))
        })
    });
    asked.collect()
}
