//! JSON shapes of requests and responses.

pub(super) mod request;
pub(super) mod response;
pub(super) mod sampling;
pub(super) mod unsupported;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::Error;

/// A request's body before its fields are read.
pub(super) type Object = Map<String, Value>;

/// Reads the fields of `T` from a body; others are ignored.
///
/// # Errors
/// Names the field that has a wrong type.
pub(super) fn fields<T: DeserializeOwned>(body: &Value) -> Result<T, Error> {
    serde_path_to_error::deserialize(body).map_err(|e| {
        let path = e.path().to_string();
        let inner = e.into_inner().to_string();
        if path == "." {
            Error::invalid("body", inner)
        } else {
            Error::invalid(&path, format!("{path}: {inner}"))
        }
    })
}
