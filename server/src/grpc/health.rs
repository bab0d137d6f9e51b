//! `grpc.health.v1.Health`: serving while [`Service::is_ready`] says so, asked anew at each check.

use std::pin::Pin;
use std::time::Duration;

use futures_util::{Stream, stream};
use rheostat_proto::inference::grpc_inference_service_server::SERVICE_NAME as INFERENCE;
use rheostat_proto::rheostat::v1::{
    generation_service_server::SERVICE_NAME as GENERATION, model_service_server::SERVICE_NAME as MODELS,
    tokenization_service_server::SERVICE_NAME as TOKENIZATION,
};
use tokio::sync::watch;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::Health;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use crate::service::Service;

/// How late a watcher may learn of a change.
const WATCH_INTERVAL: Duration = Duration::from_millis(250);

/// The names that can be asked for; the empty one is the server as a whole.
const SERVICES: [&str; 5] = ["", GENERATION, TOKENIZATION, MODELS, INFERENCE];

/// Reports readiness.
#[derive(Clone)]
pub(super) struct Readiness {
    service: Service,
    stopping: watch::Receiver<bool>,
}

impl Readiness {
    /// `stopping` becomes true when the server shuts down.
    pub(super) fn new(service: Service, stopping: watch::Receiver<bool>) -> Self {
        Self { service, stopping }
    }

    fn status(&self, name: &str) -> ServingStatus {
        if !SERVICES.contains(&name) {
            ServingStatus::ServiceUnknown
        } else if self.service.is_ready() && !*self.stopping.borrow() {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        }
    }

    /// The status once it differs from `last`, or `None` when the server stops with no more to say.
    async fn changed(&mut self, name: &str, last: Option<ServingStatus>) -> Option<ServingStatus> {
        loop {
            let now = self.status(name);
            if Some(now) != last {
                return Some(now);
            }
            if *self.stopping.borrow() {
                return None;
            }
            // The timeout is the poll of readiness; the watch only makes shutdown immediate.
            let _ = tokio::time::timeout(WATCH_INTERVAL, self.stopping.changed()).await;
        }
    }
}

#[tonic::async_trait]
impl Health for Readiness {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        match self.status(&request.get_ref().service) {
            ServingStatus::ServiceUnknown => Err(Status::not_found("no service of this name is served")),
            status => Ok(Response::new(HealthCheckResponse { status: status.into() })),
        }
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let start = (self.clone(), request.into_inner().service, None);
        let changes = stream::unfold(start, |(mut readiness, name, last)| async move {
            let now = readiness.changed(&name, last).await?;
            Some((Ok(HealthCheckResponse { status: now.into() }), (readiness, name, Some(now))))
        });
        Ok(Response::new(Box::pin(changes)))
    }
}
