//! A request's events as `GenerateStream` sends them.

use futures_util::{Stream, StreamExt, stream};
use rheostat_proto::rheostat::v1;
use rheostat_proto::rheostat::v1::generate_stream_response::Event;
use tonic::Status;

use crate::energy::EnergySum;
use crate::error::Error;
use crate::request::{TokenEvent, Work};
use crate::service::Admitted;

use super::super::status;
use super::compression::WeightUse;
use super::response::{Wire, finish_reason};

type Response = Result<v1::GenerateStreamResponse, Status>;

/// The responses, from `started` to `completed` or an error. Dropping them cancels the request.
pub(super) fn responses(admitted: Admitted, wire: Wire) -> impl Stream<Item = Response> + Send {
    let opening = stream::iter(opening(&admitted.id, &wire));
    let open = wire.asked.n;
    let mut progress = Progress {
        wire,
        open,
        cached_tokens: 0,
        completion_tokens: 0,
        work: Work::default(),
        weights: WeightUse::default(),
        charged: EnergySum::default(),
    };
    // The end of the events is itself an event: it tells a complete request from a lost engine.
    let events = admitted.stream.map(Some).chain(stream::once(std::future::ready(None)));
    opening.chain(events.flat_map(move |event| stream::iter([progress.take(event)])))
}

/// What can be said before the engine has run anything.
fn opening(id: &str, wire: &Wire) -> Vec<Response> {
    let started = v1::Started {
        request_id: id.to_owned(),
        model: wire.model.clone(),
        prompt_tokens: wire.prompt_tokens(),
    };
    let mut responses = vec![event(Event::Started(started))];
    if wire.asked.echo && !wire.asked.prompt_logprobs {
        responses.push(prompt(wire.prompt(&[])));
    }
    responses
}

/// What the last response has to add up.
struct Progress {
    wire: Wire,
    /// Choices that have not ended.
    open: usize,
    /// Of the prompt, as its first choice found it.
    cached_tokens: usize,
    completion_tokens: usize,
    work: Work,
    weights: WeightUse,
    charged: EnergySum,
}

impl Progress {
    /// The response to an event, or to the end of the events.
    fn take(&mut self, taken: Option<TokenEvent>) -> Response {
        match taken {
            Some(TokenEvent::Prompt { logprobs }) => prompt(self.wire.prompt(&logprobs)),
            Some(TokenEvent::Delta { choice, text, tokens }) => event(Event::Delta(v1::Delta {
                index: choice as u32,
                text,
                token_ids: tokens.iter().map(|t| t.token).collect(),
                logprobs: self.wire.logprobs(&tokens),
            })),
            Some(TokenEvent::Finished { choice, reason, stop, usage }) => {
                self.open = self.open.saturating_sub(1);
                self.completion_tokens += usage.completion_tokens;
                self.work += usage.work;
                self.weights.add(choice, &usage);
                self.charged.add(usage.energy);
                if choice == 0 {
                    self.cached_tokens = usage.cached_tokens;
                }
                event(Event::Finished(v1::Finished {
                    index: choice as u32,
                    finish_reason: finish_reason(reason).into(),
                    stop,
                    completion_tokens: usage.completion_tokens as u32,
                }))
            }
            Some(TokenEvent::Failed(error)) => Err(error.into()),
            None if self.open > 0 => Err(status::engine_stopped().into()),
            None => {
                let weights = std::mem::take(&mut self.weights);
                let tokens = (self.cached_tokens, self.completion_tokens);
                let usage = self.wire.usage(tokens, (self.work, weights), self.charged);
                event(Event::Completed(v1::Completed { usage: Some(usage) }))
            }
        }
    }
}

fn event(event: Event) -> Response {
    Ok(v1::GenerateStreamResponse { event: Some(event) })
}

fn prompt(prompt: Result<v1::Prompt, Error>) -> Response {
    event(Event::Prompt(prompt?))
}
