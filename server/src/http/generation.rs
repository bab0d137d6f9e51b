//! What completions and chats share: from admitted requests to a whole response or a stream of chunks.
//!
//! An endpoint only says how it shows an event ([`Render`]); a whole response is the merge of the chunks
//! that a stream would have sent.

use std::task::{Context, Poll};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::http::{HeaderMap, HeaderValue};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, SelectAll, StreamExt};
use serde::Serialize;

use super::error::ErrorBody;
use super::sse::{self, Frame, Source};
use super::types::response::{Envelope, Usage};
use crate::error::{Error, ErrorKind};
use crate::request::{FinishReason, TokenEvent, TokenLogprob};
use crate::service::Admitted;

pub(super) const REQUEST_ID: &str = "x-request-id";
const PROFILE: &str = "x-rheostat-profile";
pub(super) const MAX_REQUEST_ID: usize = 128;

/// How an endpoint shows events. A slot is a choice of a prompt: `prompt · n + choice`.
pub(super) trait Render: Send + Unpin + 'static {
    /// The endpoint's choice, whole or a chunk of it.
    type Choice: Serialize + Send + 'static;
    /// `object` of a whole response.
    const WHOLE: &'static str;
    /// `object` of a chunk.
    const CHUNK: &'static str;
    /// What ids begin with.
    const ID: &'static str;

    /// An empty whole choice.
    fn whole(&self, slot: usize) -> Self::Choice;
    /// The chunk that opens a slot, if there is one.
    fn open(&mut self, slot: usize) -> Option<Self::Choice>;
    /// The prompt's scores, for one slot.
    fn prompt(&mut self, slot: usize, logprobs: &[Option<TokenLogprob>]) -> Option<Self::Choice>;
    /// Text and tokens of a slot.
    fn delta(&mut self, slot: usize, text: String, tokens: &[TokenLogprob]) -> Self::Choice;
    /// The end of a slot.
    fn finish(&mut self, slot: usize, reason: FinishReason, stop: Option<String>) -> Self::Choice;
    /// Adds a chunk to a whole choice.
    fn merge(whole: &mut Self::Choice, chunk: Self::Choice);
}

/// Requests that were admitted together, one a prompt, and how to show them.
pub(super) struct Generation<R> {
    /// The id of the first, which answers for all.
    pub(super) id: String,
    pub(super) model: String,
    pub(super) render: R,
    /// Choices of a prompt.
    pub(super) n: usize,
    pub(super) prompts: Vec<Admitted>,
}

type Events = SelectAll<stream::BoxStream<'static, (usize, TokenEvent)>>;

/// A generation under way.
struct Running<R> {
    id: String,
    model: String,
    created: u64,
    render: R,
    n: usize,
    slots: usize,
    events: Events,
    usage: Usage,
}

impl<R: Render> Generation<R> {
    fn run(self) -> Running<R> {
        let slots = self.n * self.prompts.len();
        let usage = self.prompts.first().map(|one| Usage::of(&one.profile, one.plan.options().clone()));
        let tagged = self.prompts.into_iter().enumerate();
        let streams =
            tagged.map(|(prompt, admitted)| admitted.stream.map(move |event| (prompt, event)).boxed());
        Running {
            id: format!("{}-{}", R::ID, self.id),
            model: self.model,
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            render: self.render,
            n: self.n,
            slots,
            events: stream::select_all(streams),
            usage: usage.unwrap_or_default(),
        }
    }

    /// Answers when everything is done. Dropping the future cancels.
    ///
    /// # Errors
    /// What made a request fail.
    pub(super) async fn whole(self) -> Result<Response, Error> {
        let id = self.id.clone();
        let mut running = self.run();
        let mut choices: Vec<_> = (0..running.slots).map(|slot| running.render.whole(slot)).collect();
        let mut merge = |(slot, chunk): (usize, R::Choice)| {
            if let Some(choice) = choices.get_mut(slot) {
                R::merge(choice, chunk);
            }
        };
        running.open().into_iter().for_each(&mut merge);
        while let Some((prompt, event)) = running.events.next().await {
            running.show(prompt, event)?.into_iter().for_each(&mut merge);
        }
        let usage = Some(Some(running.usage.clone()));
        Ok(with_id(&id, Json(running.envelope(R::WHOLE, choices, usage)).into_response()))
    }

    /// Answers as server-sent events, as they come.
    pub(super) fn stream(self, include_usage: bool) -> Response {
        let id = self.id.clone();
        let running = self.run();
        // Chunks before the last say that the usage is still to come, when it was asked for.
        let pending = include_usage.then_some(None);
        let frame = Frame::of(&running.envelope(R::CHUNK, Vec::new(), pending), "choices");
        with_id(&id, sse::response(Chunks { running, frame, include_usage, stage: Stage::Opening }))
    }
}

/// The chunks of a stream.
struct Chunks<R> {
    running: Running<R>,
    frame: Frame,
    include_usage: bool,
    stage: Stage,
}

/// How far a stream has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Opening,
    Events,
    Ended,
}

impl<R: Render> Source for Chunks<R> {
    fn poll_write(&mut self, cx: &mut Context<'_>, out: &mut Vec<u8>) -> Poll<bool> {
        match self.stage {
            Stage::Opening => {
                self.stage = Stage::Events;
                for (_, chunk) in self.running.open() {
                    self.frame.write(out, &chunk);
                }
            }
            Stage::Events => match std::task::ready!(self.running.events.poll_next_unpin(cx)) {
                Some((prompt, event)) => match self.running.show(prompt, event) {
                    Ok(chunks) => chunks.iter().for_each(|(_, chunk)| self.frame.write(out, chunk)),
                    Err(error) => {
                        sse::json(out, &ErrorBody::new(error));
                        self.end(out);
                    }
                },
                None => {
                    if self.include_usage {
                        let usage = Some(Some(self.running.usage.clone()));
                        sse::json(out, &self.running.envelope(R::CHUNK, Vec::new(), usage));
                    }
                    self.end(out);
                }
            },
            Stage::Ended => return Poll::Ready(false),
        }
        Poll::Ready(true)
    }
}

impl<R> Chunks<R> {
    /// Nothing follows, and what was running is dropped with its place among the live requests.
    fn end(&mut self, out: &mut Vec<u8>) {
        sse::text(out, "[DONE]");
        self.running.events.clear();
        self.stage = Stage::Ended;
    }
}

impl<R: Render> Running<R> {
    fn open(&mut self) -> Vec<(usize, R::Choice)> {
        (0..self.slots).filter_map(|slot| Some((slot, self.render.open(slot)?))).collect()
    }

    /// The chunks that an event makes.
    fn show(&mut self, prompt: usize, event: TokenEvent) -> Result<Vec<(usize, R::Choice)>, Error> {
        let slot = |choice: usize| prompt * self.n + choice;
        Ok(match event {
            TokenEvent::Prompt { logprobs } => (prompt * self.n..(prompt + 1) * self.n)
                .filter_map(|slot| Some((slot, self.render.prompt(slot, &logprobs)?)))
                .collect(),
            TokenEvent::Delta { choice, text, tokens } => {
                vec![(slot(choice), self.render.delta(slot(choice), text, &tokens))]
            }
            TokenEvent::Finished { choice, reason, stop, usage } => {
                self.usage.add(choice, &usage);
                vec![(slot(choice), self.render.finish(slot(choice), reason, stop))]
            }
            TokenEvent::Failed(error) => return Err(error),
        })
    }

    fn envelope(
        &self,
        object: &'static str,
        choices: Vec<R::Choice>,
        usage: Option<Option<Usage>>,
    ) -> Envelope<R::Choice> {
        Envelope {
            id: self.id.clone(),
            object,
            created: self.created,
            model: self.model.clone(),
            choices,
            usage,
        }
    }
}

fn with_id(id: &str, mut response: Response) -> Response {
    if let Ok(id) = HeaderValue::from_str(id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

/// The client's id of a request, or an empty one.
///
/// # Errors
/// When it is long or not printable ASCII.
pub(super) fn request_id(headers: &HeaderMap) -> Result<String, Error> {
    let Some(id) = headers.get(REQUEST_ID) else { return Ok(String::new()) };
    let id = id.to_str().ok().filter(|id| id.len() <= MAX_REQUEST_ID);
    id.map(str::to_owned).ok_or_else(|| Error {
        kind: ErrorKind::InvalidArgument,
        message: format!("x-request-id must be printable ASCII of at most {MAX_REQUEST_ID} bytes"),
        param: Some(REQUEST_ID.into()),
    })
}

/// The profile that a client names in a header because it cannot change its bodies.
pub(super) fn profile_header(headers: &HeaderMap) -> Option<String> {
    headers.get(PROFILE).and_then(|value| value.to_str().ok()).map(str::to_owned)
}
