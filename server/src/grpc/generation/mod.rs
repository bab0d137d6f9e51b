//! `rheostat.v1.GenerationService`.

mod compression;
mod energy;
mod request;
mod response;
mod stream;

use std::pin::Pin;

use futures_util::Stream;
use rheostat_proto::rheostat::v1::generation_service_server::GenerationService;
use rheostat_proto::rheostat::v1::{
    AbortRequest, AbortResponse, GenerateRequest, GenerateResponse, GenerateStreamResponse,
};
use tonic::{Request, Response, Status};

use crate::error::Error;
use crate::service::{Admitted, Service};

use super::{auth, completion, metadata};
pub(super) use request::chat_prompt;
use response::{Asked, Wire};

/// Runs requests.
pub(super) struct Generation {
    service: Service,
}

impl Generation {
    pub(super) fn new(service: Service) -> Self {
        Self { service }
    }

    async fn start(&self, request: Request<GenerateRequest>) -> Result<(Admitted, Wire), Error> {
        let (metadata, extensions, message) = request.into_parts();
        let mut raw = request::raw_request(message)?;
        raw.caller = auth::caller(&extensions);
        metadata::apply(&metadata, &mut raw)?;
        let asked = Asked::by(&raw);
        let admitted = self.service.generate(raw).await?;
        let wire = Wire::new(&self.service, asked, &admitted);
        Ok((admitted, wire))
    }
}

#[tonic::async_trait]
impl GenerationService for Generation {
    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<GenerateResponse>, Status> {
        let (admitted, wire) = self.start(request).await?;
        let completion = completion::collect(admitted.stream, wire.asked.n).await?;
        Ok(metadata::respond(&admitted.id, wire.response(&admitted.id, completion)?))
    }

    type GenerateStreamStream = Pin<Box<dyn Stream<Item = Result<GenerateStreamResponse, Status>> + Send>>;

    async fn generate_stream(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStreamStream>, Status> {
        let (admitted, wire) = self.start(request).await?;
        let id = admitted.id.clone();
        let responses: Self::GenerateStreamStream = Box::pin(stream::responses(admitted, wire));
        Ok(metadata::respond(&id, responses))
    }

    async fn abort(&self, request: Request<AbortRequest>) -> Result<Response<AbortResponse>, Status> {
        let caller = auth::caller(request.extensions());
        let id = request.into_inner().request_id;
        if id.is_empty() {
            return Err(Error::invalid("request_id", "request_id is required").into());
        }
        self.service.abort(&id, &caller)?;
        Ok(Response::new(AbortResponse {}))
    }
}
