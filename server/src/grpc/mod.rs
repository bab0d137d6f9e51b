//! The gRPC front end: it converts messages, calls [`Service`], and converts back.
//!
//! One file a service: `generation`, `tokenization`, `models`, `admin` of `rheostat.v1`; `inference`, the
//! Open Inference Protocol; `health`; and reflection, in both versions that clients ask for. Around all
//! of them lies `call`, which keeps deadlines and counts outcomes.
//!
//! Invariant: a call owns its request. A call that is cancelled is dropped, with it its
//! [`crate::engine::TokenStream`], and with that the request.

mod admin;
mod auth;
mod call;
mod completion;
mod generation;
mod health;
mod inference;
mod json;
mod metadata;
mod models;
mod status;
#[cfg(test)]
mod tests;
mod tokenization;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use rheostat_proto::inference::grpc_inference_service_server::GrpcInferenceServiceServer;
use rheostat_proto::rheostat::v1::{
    admin_service_server::AdminServiceServer, generation_service_server::GenerationServiceServer,
    model_service_server::ModelServiceServer, tokenization_service_server::TokenizationServiceServer,
};
use rheostat_proto::{FILE_DESCRIPTOR_SETS, method_paths};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic_health::pb::health_server::HealthServer;

use crate::service::Service;
use crate::telemetry::Metrics;
use crate::traces::Tracer;
use crate::transport::{Connection, Transport, Unread};

/// Largest message accepted: far above any prompt that fits a context, far below what hurts.
const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// Calls at once on one connection; what they may run together is admission's to say.
const MAX_CONCURRENT_STREAMS: u32 = 1024;
const MAX_HEADER_BYTES: u32 = 16 << 10;
/// A peer that vanished without closing is noticed within the sum of these two.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// Why the gRPC server could not run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The connections could not be served.
    #[error("gRPC: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// The compiled protos are not what reflection expects.
    #[error("gRPC reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Connections that have shaken hands and wait to be served.
const OPENED: usize = 16;

/// Serves every gRPC service on `transport` until `shutdown`; then takes no new calls, tells watchers of
/// the health that it stops, and returns when the calls under way have ended. Who cannot wait that long
/// drops the future.
///
/// # Errors
/// [`ServeError`].
pub async fn serve(
    transport: Transport,
    service: Service,
    (metrics, tracer): (Arc<Metrics>, Tracer),
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let (stop, stopping) = watch::channel(false);
    let unread = Unread::start(transport.write_timeout());
    let generation = generation::Generation::new(service.clone());
    let tokenization = tokenization::Tokenization::new(service.clone());
    let models = models::Models::new(service.clone());
    let admin = admin::Admin::new(service.clone());
    let inference = inference::Inference::new(service.clone(), stopping.clone());
    let keys = auth::KeyLayer::new(service.clone());
    let health = health::Readiness::new(service, stopping);
    Server::builder()
        .layer(call::CallLayer::new(metrics, tracer, known_methods(), unread))
        .layer(keys)
        .max_concurrent_streams(Some(MAX_CONCURRENT_STREAMS))
        .http2_max_header_list_size(Some(MAX_HEADER_BYTES))
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_service(GenerationServiceServer::new(generation).max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(
            TokenizationServiceServer::new(tokenization).max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
        .add_service(ModelServiceServer::new(models).max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(AdminServiceServer::new(admin).max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(GrpcInferenceServiceServer::new(inference).max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(HealthServer::new(health))
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .serve_with_incoming_shutdown(connections(transport), async {
            shutdown.await;
            stop.send_replace(true);
        })
        .await?;
    Ok(())
}

/// The connections of `transport`, each after its handshake. Ends with the stream's receiver.
fn connections(transport: Transport) -> ReceiverStream<std::io::Result<Connection>> {
    let (opened, stream) = mpsc::channel(OPENED);
    tokio::spawn(async move {
        loop {
            let incoming = tokio::select! {
                incoming = transport.accept() => incoming,
                () = opened.closed() => return,
            };
            let opened = opened.clone();
            tokio::spawn(async move {
                match incoming.open().await {
                    // An error means that the server has stopped.
                    Ok(connection) => drop(opened.send(Ok(connection)).await),
                    Err(error) => tracing::debug!(%error, "a connection ended early"),
                }
            });
        }
    });
    ReceiverStream::new(stream)
}

/// Every descriptor that reflection shows, the health service's among them.
fn descriptor_sets() -> impl Iterator<Item = &'static [u8]> {
    FILE_DESCRIPTOR_SETS.into_iter().chain([tonic_health::pb::FILE_DESCRIPTOR_SET])
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    descriptor_sets().fold(tonic_reflection::server::Builder::configure(), |builder, set| {
        builder.register_encoded_file_descriptor_set(set)
    })
}

/// Paths that the outcome counter may use as labels.
fn known_methods() -> BTreeSet<String> {
    descriptor_sets().filter_map(|set| method_paths(set).ok()).flatten().collect()
}
