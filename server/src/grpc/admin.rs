//! `rheostat.v1.AdminService`.

use std::time::Duration;

use rheostat_proto::rheostat::v1::admin_service_server::AdminService;
use rheostat_proto::rheostat::v1::{GetMemoryRequest, KvMemory, Memory, SetMemoryRequest, WeightMemory};
use tonic::{Request, Response, Status};

use crate::error::Error;
use crate::memory::{MemoryStatus, MemoryTargets};
use crate::service::Service;

/// Seconds that a change is waited for, when the request does not say, and at most.
const PATIENCE_SECONDS: [f64; 2] = [30.0, 600.0];

/// Does what operators ask.
pub(super) struct Admin {
    service: Service,
}

impl Admin {
    pub(super) fn new(service: Service) -> Self {
        Self { service }
    }

    fn wire(&self, status: MemoryStatus) -> Memory {
        let reached = status.is_reached();
        let MemoryStatus { weights, kv, .. } = status;
        Memory {
            reached,
            weights: Some(WeightMemory {
                budget_bytes: weights.budget,
                held_bytes: weights.held,
                base_bytes: weights.least,
                whole_bytes: weights.most,
                blocks: weights.blocks as u64,
                target_blocks: weights.target_blocks as u64,
                num_blocks: weights.num_blocks as u64,
                levels: weights.levels,
                error: weights.error.unwrap_or_default(),
                reached_after_seconds: weights.progress.reached.map(|time| time.as_secs_f64()),
            }),
            kv: Some(KvMemory {
                budget_bytes: kv.budget,
                held_bytes: kv.held,
                base_bytes: kv.least,
                page_bytes: kv.page_bytes,
                pages_used: kv.pages_used as u64,
                pages_cached: kv.pages_cached as u64,
                pages_free: kv.pages_free as u64,
                target_pages: kv.target_pages as u64,
                max_model_len: u32::try_from(self.service.model().max_model_len()).unwrap_or(u32::MAX),
                reached_after_seconds: kv.progress.reached.map(|time| time.as_secs_f64()),
            }),
        }
    }
}

#[tonic::async_trait]
impl AdminService for Admin {
    async fn get_memory(&self, _request: Request<GetMemoryRequest>) -> Result<Response<Memory>, Status> {
        Ok(Response::new(self.wire(self.service.memory())))
    }

    async fn set_memory(&self, request: Request<SetMemoryRequest>) -> Result<Response<Memory>, Status> {
        let SetMemoryRequest { weights_bytes, kv_bytes, timeout_seconds } = request.into_inner();
        let targets = MemoryTargets { weights: weights_bytes, kv: kv_bytes };
        if targets == MemoryTargets::default() {
            let message = "neither weights_bytes nor kv_bytes is given; give at least one";
            return Err(Error::invalid("weights_bytes", message).into());
        }
        let [default, most] = PATIENCE_SECONDS;
        let patience = timeout_seconds.unwrap_or(default);
        if !(0.0..=most).contains(&patience) {
            let message = format!("timeout_seconds is {patience}; it must be between 0 and {most}");
            return Err(Error::invalid("timeout_seconds", message).into());
        }
        let status = self.service.set_memory(targets, Duration::from_secs_f64(patience)).await?;
        Ok(Response::new(self.wire(status)))
    }
}
