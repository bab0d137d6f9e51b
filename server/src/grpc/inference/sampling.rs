//! Sampling parameters by vLLM's names: a JSON object in a tensor, or the request's `parameters`.
//!
//! Numbers and truth values may be strings, as Triton's own examples write them.

use std::collections::HashMap;

use model_zoo::compression::CompressionOptions;
use rheostat_proto::inference::InferParameter;
use rheostat_proto::inference::infer_parameter::ParameterChoice;
use serde_json::{Map, Value};

use crate::error::Error;
use crate::request::RawRequest;

/// Longest prefix of a client's name that an error repeats.
const MAX_SHOWN: usize = 64;

/// Sets what the request's `parameters` say; names that are no sampling parameters are others' business.
///
/// # Errors
/// As [`from_json`], but for unknown names.
pub(super) fn from_parameters(
    raw: &mut RawRequest,
    parameters: &HashMap<String, InferParameter>,
) -> Result<(), Error> {
    for (name, parameter) in parameters {
        let value = match &parameter.parameter_choice {
            Some(ParameterChoice::BoolParam(b)) => Value::from(*b),
            Some(ParameterChoice::Int64Param(i)) => Value::from(*i),
            Some(ParameterChoice::Uint64Param(u)) => Value::from(*u),
            Some(ParameterChoice::DoubleParam(x)) => Value::from(*x),
            Some(ParameterChoice::StringParam(s)) => Value::from(s.as_str()),
            None => continue,
        };
        set(raw, &Parameter { name, value: &value })?;
    }
    Ok(())
}

/// Sets what a JSON object says.
///
/// # Errors
/// [`crate::error::ErrorKind::InvalidArgument`]: no object, a name that is unknown or unsupported, a
/// value of the wrong kind. Ranges are admission's.
pub(super) fn from_json(raw: &mut RawRequest, json: &str) -> Result<(), Error> {
    let object: Map<String, Value> = serde_json::from_str(json).map_err(|e| {
        Error::invalid("sampling_parameters", format!("sampling_parameters must be a JSON object: {e}"))
    })?;
    for (name, value) in &object {
        let parameter = Parameter { name, value };
        // null is how clients write "the default".
        if !value.is_null() && !set(raw, &parameter)? {
            return Err(parameter.error("is not a supported sampling parameter"));
        }
    }
    Ok(())
}

/// Sets one parameter; false when no parameter has this name.
fn set(raw: &mut RawRequest, given: &Parameter<'_>) -> Result<bool, Error> {
    let sampling = &mut raw.sampling;
    match given.name {
        "temperature" => sampling.temperature = given.float()?,
        "top_p" => sampling.top_p = given.float()?,
        // vLLM writes "all" as -1, here it is 0.
        "top_k" => sampling.top_k = given.integer()?.max(0).try_into().unwrap_or(u32::MAX),
        "min_p" => sampling.min_p = given.float()?,
        "seed" => sampling.seed = Some(given.integer()?.cast_unsigned()),
        "repetition_penalty" => sampling.repetition_penalty = given.float()?,
        "presence_penalty" => sampling.presence_penalty = given.float()?,
        "frequency_penalty" => sampling.frequency_penalty = given.float()?,
        "logit_bias" => sampling.logit_bias = given.biases()?,
        "stop" => sampling.stop = given.texts()?,
        "stop_token_ids" => sampling.stop_token_ids = given.tokens()?,
        "ignore_eos" => sampling.ignore_eos = given.flag()?,
        "include_stop_str_in_output" => sampling.include_stop = given.flag()?,
        "skip_special_tokens" => sampling.skip_special_tokens = given.flag()?,
        "max_joules" => raw.max_joules = Some(given.float()?.into()),
        "deadline" => raw.deadline = Some(given.float()?.into()),
        "min_tokens" => {
            sampling.min_tokens =
                given.integer()?.try_into().map_err(|_| given.error("must not be negative"))?;
        }
        "max_tokens" => raw.max_tokens = Some(given.integer()?),
        "n" => raw.n = given.integer()?,
        "compression" => raw.compression = given.compression()?,
        _ => return Ok(false),
    }
    Ok(true)
}

/// A parameter as the client wrote it.
struct Parameter<'a> {
    name: &'a str,
    value: &'a Value,
}

impl Parameter<'_> {
    fn error(&self, what: &str) -> Error {
        let name: String = self.name.chars().take(MAX_SHOWN).collect();
        Error::invalid(&name, format!("`{name}` {what}"))
    }

    fn float(&self) -> Result<f32, Error> {
        number(self.value).map(|x| x as f32).ok_or_else(|| self.error("must be a number"))
    }

    fn integer(&self) -> Result<i64, Error> {
        let integer = match self.value {
            Value::String(s) => s.trim().parse().ok(),
            // Seeds use all 64 bits.
            value => value.as_i64().or_else(|| value.as_u64().map(u64::cast_signed)),
        };
        integer.ok_or_else(|| self.error("must be an integer"))
    }

    fn flag(&self) -> Result<bool, Error> {
        match self.value {
            Value::Bool(b) => Ok(*b),
            Value::String(s) if s.eq_ignore_ascii_case("true") => Ok(true),
            Value::String(s) if s.eq_ignore_ascii_case("false") => Ok(false),
            _ => Err(self.error("must be true or false")),
        }
    }

    fn texts(&self) -> Result<Vec<String>, Error> {
        let texts = match self.value {
            Value::String(s) => Some(vec![s.clone()]),
            Value::Array(list) => list.iter().map(|v| v.as_str().map(str::to_owned)).collect(),
            _ => None,
        };
        texts.ok_or_else(|| self.error("must be a string or a list of strings"))
    }

    fn tokens(&self) -> Result<Vec<u32>, Error> {
        let token = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
        let tokens = self.value.as_array().and_then(|list| list.iter().map(token).collect());
        tokens.ok_or_else(|| self.error("must be a list of token ids"))
    }

    fn biases<T: FromIterator<(u32, f32)>>(&self) -> Result<T, Error> {
        let bias = |(id, bias): (&String, &Value)| Some((id.parse().ok()?, number(bias)? as f32));
        let biases = self.value.as_object().and_then(|map| map.iter().map(bias).collect());
        biases.ok_or_else(|| self.error("must map token ids to numbers"))
    }

    fn compression(&self) -> Result<CompressionOptions, Error> {
        serde_path_to_error::deserialize(self.value).map_err(|e| {
            let (path, inner) = (e.path().to_string(), e.inner().to_string());
            let name = if path == "." { "compression".to_owned() } else { format!("compression.{path}") };
            Error::invalid(&name, format!("{name}: {inner}"))
        })
    }
}

fn number(value: &Value) -> Option<f64> {
    match value {
        Value::String(s) => s.trim().parse().ok(),
        value => value.as_f64(),
    }
}
