//! `ModelStreamInfer`: the requests of one stream run at once, and their responses come as they are made.
//!
//! Everything lives in one [`Stream`], with no task beside it: when the call ends, dropping it drops every
//! request. While as many requests run as a stream may, no further one is read, and the client's flow
//! control holds it back.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::stream::{BoxStream, SelectAll};
use futures_util::{FutureExt, Stream, StreamExt, stream};
use rheostat_proto::inference::{ModelInferRequest, ModelStreamInferResponse};
use tokio::sync::watch;
use tonic::metadata::MetadataMap;
use tonic::{Status, Streaming};

use crate::request::{Caller, TokenEvent};

use super::super::status;
use super::outputs::{Frame, Reply, mark};
use super::{Call, Inference, Running};

/// Requests that one stream runs at once; more wait unread.
const MAX_CONCURRENT: usize = 64;

/// The responses to a stream of requests.
pub(super) struct Responses {
    inference: Inference,
    /// The call's metadata, and who it comes from: the same for each of its requests.
    origin: Arc<(MetadataMap, Caller)>,
    /// `None` once no more requests are to come.
    requests: Option<Streaming<ModelInferRequest>>,
    running: SelectAll<BoxStream<'static, ModelStreamInferResponse>>,
    /// Resolves when the server shuts down.
    stopping: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Responses {
    pub(super) fn new(
        inference: Inference,
        origin: (MetadataMap, Caller),
        requests: Streaming<ModelInferRequest>,
    ) -> Self {
        let stopping = Box::pin(stopped(inference.stopping.clone()));
        let origin = Arc::new(origin);
        Self { inference, origin, requests: Some(requests), running: SelectAll::new(), stopping }
    }

    /// Starts the requests that have arrived, as many as may run.
    fn poll_requests(&mut self, cx: &mut Context<'_>) -> Result<(), Status> {
        if self.requests.is_some() && self.stopping.poll_unpin(cx).is_ready() {
            self.requests = None;
        }
        while self.running.len() < MAX_CONCURRENT
            && let Some(requests) = &mut self.requests
        {
            match requests.poll_next_unpin(cx) {
                Poll::Pending => break,
                Poll::Ready(None) => self.requests = None,
                Poll::Ready(Some(request)) => {
                    let responses = responses(self.inference.clone(), Arc::clone(&self.origin), request?);
                    self.running.push(responses.boxed());
                }
            }
        }
        Ok(())
    }
}

impl Stream for Responses {
    type Item = Result<ModelStreamInferResponse, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            if let Err(status) = this.poll_requests(cx) {
                return Poll::Ready(Some(Err(status)));
            }
            let full = this.running.len() == MAX_CONCURRENT;
            match this.running.poll_next_unpin(cx) {
                Poll::Ready(Some(response)) => return Poll::Ready(Some(Ok(response))),
                Poll::Ready(None) if this.requests.is_none() => return Poll::Ready(None),
                // A request that ended made room for one that was not polled for.
                Poll::Pending if full && this.running.len() < MAX_CONCURRENT => {}
                _ => return Poll::Pending,
            }
        }
    }
}

async fn stopped(mut stopping: watch::Receiver<bool>) {
    // An error means that the server is gone, which is as final.
    let _ = stopping.wait_for(|stopping| *stopping).await;
}

/// The responses to one request of a stream. An error is a response: it must not end the other requests.
fn responses(
    inference: Inference,
    origin: Arc<(MetadataMap, Caller)>,
    request: ModelInferRequest,
) -> impl Stream<Item = ModelStreamInferResponse> {
    let refusal = Reply::refusal(&request);
    let answer = async move {
        let (metadata, caller) = &*origin;
        let call = Call { metadata, caller, is_stream: true };
        match inference.start(request, call).await {
            Err(error) => one(refusal.failed(&error)),
            Ok(running) if running.streams => deltas(running).boxed(),
            Ok(running) => whole(running).await,
        }
    };
    stream::once(answer).flatten()
}

fn one(response: ModelStreamInferResponse) -> BoxStream<'static, ModelStreamInferResponse> {
    stream::iter([response]).boxed()
}

/// One response, with everything.
async fn whole(running: Running) -> BoxStream<'static, ModelStreamInferResponse> {
    let reply = running.reply.clone();
    match Inference::finish(running).await {
        Err(error) => one(reply.failed(&error)),
        Ok(response) if reply.empty_final => {
            let ends = [mark(response, false), reply.streamed(None, true)];
            stream::iter(ends).boxed()
        }
        Ok(response) => one(mark(response, true)),
    }
}

/// A response a delta, each with one element a choice, of which one has something to say.
fn deltas(running: Running) -> impl Stream<Item = ModelStreamInferResponse> + Send {
    let Running { admitted, reply, n, .. } = running;
    let mut open = n;
    let mut ended = false;
    let events = admitted.stream.map(Some).chain(stream::once(std::future::ready(None)));
    events.flat_map(move |event| {
        let mut frame = Frame::of(n);
        let response = match event {
            Some(TokenEvent::Delta { choice, text, tokens }) if choice < n => {
                frame.texts[choice] = text;
                frame.counts[choice] = tokens.len() as u32;
                Some(reply.streamed(Some(&frame), false))
            }
            Some(TokenEvent::Finished { choice, reason, .. }) if choice < n => {
                frame.reasons[choice] = reason.as_str();
                open = open.saturating_sub(1);
                Some(reply.streamed(Some(&frame), open == 0 && !reply.empty_final))
            }
            Some(TokenEvent::Failed(error)) => {
                ended = true;
                Some(reply.failed(&error))
            }
            Some(_) => None,
            None if ended => None,
            None if open > 0 => Some(reply.failed(&status::engine_stopped())),
            None => reply.empty_final.then(|| reply.streamed(None, true)),
        };
        stream::iter(response)
    })
}
