//! Errors on the wire: the gRPC column of the one table in [`ErrorKind::codes`].

use model_zoo::ZooError;
use tonic::Status;
use tonic::metadata::MetadataValue;

use crate::error::{Error, ErrorKind};

/// Trailing metadata that names the request field at fault, as OpenAI's `param` does over HTTP.
const PARAM: &str = "x-error-param";
/// Trailing metadata with the seconds after which a refused client may come back, as HTTP's header.
const RETRY_AFTER: &str = "retry-after";

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let (_, code, _) = error.kind.codes();
        let mut status = Self::new(code, error.message);
        // A field name made of what the client sent may be no header value; the message says it too.
        if let Some(param) = error.param.and_then(|param| MetadataValue::try_from(param).ok()) {
            status.metadata_mut().insert(PARAM, param);
        }
        if let Some(seconds) = error.kind.retry_after_s() {
            status.metadata_mut().insert(RETRY_AFTER, MetadataValue::from(seconds));
        }
        status
    }
}

/// An error of the tokenizer, which is the request's fault: everything else about it was checked at load.
pub(super) fn tokenizer_error(param: &str, error: &ZooError) -> Error {
    Error::invalid(param, error.to_string())
}

/// The engine went away in the middle of a request.
pub(super) fn engine_stopped() -> Error {
    Error::new(ErrorKind::Internal, "the engine stopped before the request ended")
}

/// A task of the blocking pool panicked or was cancelled with the runtime.
pub(super) fn task_failed(error: &tokio::task::JoinError) -> Error {
    Error::new(ErrorKind::Internal, format!("a task of the server failed: {error}"))
}
