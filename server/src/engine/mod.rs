//! The engine: one OS thread that owns the model, its KV cache and the scheduler.
//!
//! Loop: take commands → drop what was cancelled → schedule → batch → forward → sample → commit →
//! send events. Only this thread touches the device.

mod stream;

pub use stream::TokenStream;

use tokio::sync::mpsc;

use crate::error::{Error, ErrorKind};
use crate::request::{GenerateRequest, TokenEvent};

/// What the front of the server asks of the engine thread.
#[derive(Debug)]
pub enum Command {
    /// Run a request and send its events here. A closed receiver cancels it.
    Generate {
        /// The validated request.
        request: GenerateRequest,
        /// Holds every event that the request can cause, so that sending never blocks.
        events: mpsc::Sender<TokenEvent>,
    },
    /// End the request of this id with [`crate::request::FinishReason::Abort`].
    Abort {
        /// The request's id.
        id: String,
    },
}

/// The sending end of the engine thread's command channel. Cheap to clone.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
}

impl EngineHandle {
    /// A handle over the engine thread's command channel.
    pub fn new(commands: mpsc::Sender<Command>) -> Self {
        Self { commands }
    }

    /// Hands a request to the engine and returns its events. Never waits.
    ///
    /// # Errors
    /// [`ErrorKind::Overloaded`] when the command channel is full, [`ErrorKind::Unavailable`] when the
    /// engine has stopped.
    pub fn generate(&self, request: GenerateRequest) -> Result<TokenStream, Error> {
        let (sender, receiver) = mpsc::channel(TokenStream::capacity(&request));
        let command = Command::Generate { request, events: sender };
        self.send(command)?;
        Ok(TokenStream::new(receiver))
    }

    /// Asks the engine to abort a request. Unknown ids are ignored by the engine.
    ///
    /// # Errors
    /// As [`EngineHandle::generate`].
    pub fn abort(&self, id: &str) -> Result<(), Error> {
        self.send(Command::Abort { id: id.to_owned() })
    }

    fn send(&self, command: Command) -> Result<(), Error> {
        self.commands.try_send(command).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => {
                Error::new(ErrorKind::Overloaded, "the server's queue is full; retry later")
            }
            mpsc::error::TrySendError::Closed(_) => {
                Error::new(ErrorKind::Unavailable, "the server is stopping")
            }
        })
    }
}
