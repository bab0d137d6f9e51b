//! `inference.GRPCInferenceService`: the Open Inference Protocol, with text as tensors.

mod description;
mod inputs;
mod outputs;
mod sampling;
mod stream;
#[cfg(test)]
mod tests;

use std::pin::Pin;

use futures_util::Stream;
use rheostat_proto::inference::grpc_inference_service_server::GrpcInferenceService;
use rheostat_proto::inference::{
    ModelConfigRequest, ModelConfigResponse, ModelInferRequest, ModelInferResponse, ModelMetadataRequest,
    ModelMetadataResponse, ModelReadyRequest, ModelReadyResponse, ModelStreamInferResponse,
    ServerLiveRequest, ServerLiveResponse, ServerMetadataRequest, ServerMetadataResponse, ServerReadyRequest,
    ServerReadyResponse,
};
use tokio::sync::watch;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use crate::error::{Error, ErrorKind};
use crate::request::{Caller, Prompt, RawRequest};
use crate::service::{Admitted, Service};

use super::{auth, completion, metadata};
use inputs::Inputs;
use outputs::{Frame, Reply};

/// The only version of a model.
const VERSION: &str = "1";

/// Runs requests and describes the model.
#[derive(Clone)]
pub(super) struct Inference {
    service: Service,
    stopping: watch::Receiver<bool>,
}

/// A request that runs, and how to answer it.
struct Running {
    admitted: Admitted,
    reply: Reply,
    n: usize,
    /// Answer a delta at a time.
    streams: bool,
    /// What comes before the completion in `text_output`: the prompt, unless it is excluded.
    prefix: String,
}

impl Inference {
    /// `stopping` becomes true when the server shuts down: streams then take no further requests.
    pub(super) fn new(service: Service, stopping: watch::Receiver<bool>) -> Self {
        Self { service, stopping }
    }

    fn check_model(&self, name: &str, version: &str) -> Result<(), Error> {
        self.service.check_model(name)?;
        if version.is_empty() || version == VERSION {
            return Ok(());
        }
        let message = format!("the model `{name}` has no version {version:?}; it has \"{VERSION}\"");
        Err(Error { kind: ErrorKind::NotFound, message, param: Some("model_version".into()) })
    }

    /// Admits a request. In a stream `metadata` is left out of ids: it is the same for every request.
    async fn start(&self, request: ModelInferRequest, call: Call<'_>) -> Result<Running, Error> {
        self.check_model(&request.model_name, &request.model_version)?;
        let inputs = Inputs::read(&request)?;
        let mut raw = RawRequest { model: request.model_name.clone(), n: 1, ..RawRequest::default() };
        sampling::from_parameters(&mut raw, &request.parameters)?;
        if let Some(json) = &inputs.sampling_parameters {
            sampling::from_json(&mut raw, json)?;
        }
        metadata::apply(call.metadata, &mut raw)?;
        raw.caller = call.caller.clone();
        if call.is_stream {
            raw.id.clear();
        } else if inputs.stream {
            let message = "ModelInfer answers once; call ModelStreamInfer for stream=true";
            return Err(Error::invalid("stream", message));
        }
        let prefix = inputs.prefix()?.to_owned();
        let n = usize::try_from(raw.n).unwrap_or(0);
        let mut reply = Reply::to(&request, &inputs)?;
        raw.prompt = Prompt::Text(inputs.text);
        let admitted = self.service.generate(raw).await?;
        reply.admitted(&admitted, &self.service.model().name);
        Ok(Running { admitted, reply, n, streams: inputs.stream, prefix })
    }

    /// Waits for a request that answers once. Dropping the future cancels it.
    async fn finish(running: Running) -> Result<ModelInferResponse, Error> {
        let Running { admitted, reply, n, prefix, .. } = running;
        let completion = completion::collect(admitted.stream, n).await?;
        Ok(reply.response(&Frame::whole(completion, &prefix)))
    }
}

/// The call that a request came with.
#[derive(Clone, Copy)]
struct Call<'a> {
    metadata: &'a MetadataMap,
    caller: &'a Caller,
    is_stream: bool,
}

#[tonic::async_trait]
impl GrpcInferenceService for Inference {
    async fn server_live(
        &self,
        _request: Request<ServerLiveRequest>,
    ) -> Result<Response<ServerLiveResponse>, Status> {
        Ok(Response::new(ServerLiveResponse { live: true }))
    }

    async fn server_ready(
        &self,
        _request: Request<ServerReadyRequest>,
    ) -> Result<Response<ServerReadyResponse>, Status> {
        Ok(Response::new(ServerReadyResponse { ready: self.service.is_ready() }))
    }

    async fn model_ready(
        &self,
        request: Request<ModelReadyRequest>,
    ) -> Result<Response<ModelReadyResponse>, Status> {
        let ModelReadyRequest { name, version } = request.into_inner();
        let ready = self.service.is_ready() && self.check_model(&name, &version).is_ok();
        Ok(Response::new(ModelReadyResponse { ready }))
    }

    async fn server_metadata(
        &self,
        _request: Request<ServerMetadataRequest>,
    ) -> Result<Response<ServerMetadataResponse>, Status> {
        Ok(Response::new(description::server()))
    }

    async fn model_metadata(
        &self,
        request: Request<ModelMetadataRequest>,
    ) -> Result<Response<ModelMetadataResponse>, Status> {
        let ModelMetadataRequest { name, version } = request.into_inner();
        self.check_model(&name, &version)?;
        Ok(Response::new(description::metadata(self.service.model())))
    }

    async fn model_config(
        &self,
        request: Request<ModelConfigRequest>,
    ) -> Result<Response<ModelConfigResponse>, Status> {
        let ModelConfigRequest { name, version } = request.into_inner();
        self.check_model(&name, &version)?;
        let config = description::config(self.service.model());
        Ok(Response::new(ModelConfigResponse { config: Some(config) }))
    }

    async fn model_infer(
        &self,
        request: Request<ModelInferRequest>,
    ) -> Result<Response<ModelInferResponse>, Status> {
        let (metadata, extensions, message) = request.into_parts();
        let caller = auth::caller(&extensions);
        let call = Call { metadata: &metadata, caller: &caller, is_stream: false };
        let running = self.start(message, call).await?;
        let id = running.admitted.id.clone();
        Ok(metadata::respond(&id, Self::finish(running).await?))
    }

    type ModelStreamInferStream =
        Pin<Box<dyn Stream<Item = Result<ModelStreamInferResponse, Status>> + Send>>;

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<ModelInferRequest>>,
    ) -> Result<Response<Self::ModelStreamInferStream>, Status> {
        let (metadata, extensions, requests) = request.into_parts();
        let caller = auth::caller(&extensions);
        let responses = stream::Responses::new(self.clone(), (metadata, caller), requests);
        Ok(Response::new(Box::pin(responses)))
    }
}
