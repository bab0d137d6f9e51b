//! What the front ends see of everything behind them. `http` and `grpc` convert, call this, convert back.

use std::sync::Arc;

use model_zoo::models::ModelDims;
use model_zoo::tokenizer::Tokenizer;

use crate::engine::{EngineHandle, TokenStream};
use crate::error::{Error, ErrorKind};
use crate::request::RawRequest;

/// The served model as its clients may know it.
#[derive(Debug, Clone)]
pub struct ModelInfo {
    /// The name that clients ask for.
    pub name: String,
    /// Seconds since the epoch at which it was loaded.
    pub created: u64,
    /// Sizes.
    pub dims: ModelDims,
    /// Longest sequence served, prompt and output together: the model's, or the operator's limit.
    pub max_model_len: usize,
    /// Names of the compression profiles that requests may use.
    pub profiles: Vec<String>,
}

/// An admitted request: its events, and what a response has to repeat.
#[derive(Debug)]
pub struct Admitted {
    /// The request's id, given or made.
    pub id: String,
    /// The prompt's tokens, for `echo`.
    pub prompt: Arc<[u32]>,
    /// Its events. Dropping them cancels the request.
    pub stream: TokenStream,
}

/// The service behind both front ends. Cheap to clone.
#[derive(Clone)]
pub struct Service {
    engine: EngineHandle,
    tokenizer: Arc<Tokenizer>,
    model: Arc<ModelInfo>,
}

impl Service {
    /// Validates, tokenizes and admits a request, and starts it.
    ///
    /// # Errors
    /// The client's mistakes as [`ErrorKind::InvalidArgument`] or [`ErrorKind::NotFound`] (model), a
    /// full queue as [`ErrorKind::Overloaded`], a stopping server as [`ErrorKind::Unavailable`].
    pub async fn generate(&self, _request: RawRequest) -> Result<Admitted, Error> {
        Err(Error::new(ErrorKind::Unavailable, "the server is starting"))
    }

    /// Aborts the live request of this id.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when no live request has it.
    pub fn abort(&self, id: &str) -> Result<(), Error> {
        self.engine.abort(id)
    }

    /// Whether the server takes requests.
    pub fn is_ready(&self) -> bool {
        false
    }

    /// The model's tokenizer. Encode long texts off the async threads.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// The served model.
    pub fn model(&self) -> &ModelInfo {
        &self.model
    }

    /// Fails unless `name` is the served model or empty.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn check_model(&self, name: &str) -> Result<(), Error> {
        if name.is_empty() || name == self.model.name {
            return Ok(());
        }
        Err(Error {
            kind: ErrorKind::NotFound,
            message: format!("the model `{name}` does not exist; this server serves `{}`", self.model.name),
            param: Some("model".into()),
        })
    }
}
