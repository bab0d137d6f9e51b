//! `/admin/memory`: what is held, and other budgets for it.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::AppState;
use super::json::Body;
use crate::config::bytes::ByteSize;
use crate::error::Error;
use crate::memory::{MemoryStatus, MemoryTargets, Progress};

/// Seconds that a change is waited for, when the request does not say.
const PATIENCE_SECONDS: f64 = 30.0;
/// And at most.
const MAX_PATIENCE_SECONDS: f64 = 600.0;

/// Budgets to change. What is absent stays.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct MemoryRequest {
    /// For weights: a number of bytes, or a size such as `90MiB`.
    #[schema(value_type = Option<String>, example = "90MiB")]
    weights: Option<ByteSize>,
    /// For the KV pool.
    #[schema(value_type = Option<String>, example = "512MiB")]
    kv: Option<ByteSize>,
    /// Seconds to wait until the budgets are reached; 0 answers at once with how far they are. By default 30.
    timeout_seconds: Option<f64>,
}

/// Budgets, holdings and progress, in bytes.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct MemoryResponse {
    /// Whether what is held is what the budgets say.
    reached: bool,
    /// Bytes held, of both kinds.
    held: u64,
    weights: Weights,
    kv: Kv,
}

/// Weights.
#[derive(Debug, Serialize, ToSchema)]
struct Weights {
    /// Bytes allowed; `null` when nobody set a budget.
    budget: Option<u64>,
    /// Bytes held.
    held: u64,
    /// Bytes that the model cannot do without.
    base: u64,
    /// Bytes of the whole model.
    whole: u64,
    /// Blocks held over the base; 0 of 0 where the weights cannot be held in part.
    blocks: usize,
    /// Blocks that the budget allows.
    target_blocks: usize,
    /// Blocks of the whole model.
    num_blocks: usize,
    /// Levels of a matrix on average; 0 where the weights cannot be held in part.
    levels: f64,
    /// Why growing has stopped before the budget was reached.
    error: Option<String>,
    #[serde(flatten)]
    change: Change,
}

/// The KV pool.
#[derive(Debug, Serialize, ToSchema)]
struct Kv {
    /// Bytes allowed.
    budget: u64,
    /// Bytes of the pool. More than the budget while sequences that were admitted before need them.
    held: u64,
    /// Bytes with which one block of tokens can be served.
    base: u64,
    /// Bytes of a page.
    page_bytes: u64,
    /// Pages of the pool.
    pages: Pages,
    /// Longest sequence that is admitted now.
    max_model_len: usize,
    #[serde(flatten)]
    change: Change,
}

/// Pages by state.
#[derive(Debug, Serialize, ToSchema)]
struct Pages {
    /// Held by sequences.
    used: usize,
    /// Kept for their prefixes; given up when needed.
    cached: usize,
    /// Hold nothing.
    free: usize,
    /// That the budget allows.
    target: usize,
}

/// How far the last change of this budget is.
#[derive(Debug, Serialize, ToSchema)]
struct Change {
    /// Whether what is held is what the budget says.
    reached: bool,
    /// Seconds since it was asked for.
    asked_seconds_ago: f64,
    /// Seconds that it took; `null` while it is under way.
    reached_after_seconds: Option<f64>,
}

impl Change {
    fn of(progress: Progress) -> Self {
        Self {
            reached: progress.reached.is_some(),
            asked_seconds_ago: progress.elapsed.as_secs_f64(),
            reached_after_seconds: progress.reached.map(|time| time.as_secs_f64()),
        }
    }
}

impl MemoryResponse {
    fn of(status: MemoryStatus, max_model_len: usize) -> Self {
        let reached = status.is_reached();
        let MemoryStatus { weights, kv, .. } = status;
        let pages = Pages {
            used: kv.pages_used,
            cached: kv.pages_cached,
            free: kv.pages_free,
            target: kv.target_pages,
        };
        Self {
            reached,
            held: weights.held + kv.held,
            weights: Weights {
                budget: weights.budget,
                held: weights.held,
                base: weights.least,
                whole: weights.most,
                blocks: weights.blocks,
                target_blocks: weights.target_blocks,
                num_blocks: weights.num_blocks,
                levels: weights.levels,
                error: weights.error,
                change: Change::of(weights.progress),
            },
            kv: Kv {
                budget: kv.budget,
                held: kv.held,
                base: kv.least,
                page_bytes: kv.page_bytes,
                pages,
                max_model_len,
                change: Change::of(kv.progress),
            },
        }
    }
}

/// Memory budgets, what is held, and how far the last change is.
#[utoipa::path(get, path = "/admin/memory", tag = "operations",
    responses((status = 200, description = "Budgets and holdings in bytes", body = MemoryResponse)))]
pub(super) async fn show(State(state): State<AppState>) -> Json<MemoryResponse> {
    Json(MemoryResponse::of(state.service.memory(), state.service.model().max_model_len()))
}

/// Changes memory budgets while requests run, and answers when they are reached or the time is up.
#[utoipa::path(put, path = "/admin/memory", tag = "operations", request_body = MemoryRequest,
    responses((status = 200, description = "What is held now; `reached` says whether that is what was asked for", body = MemoryResponse),
        (status = 400, description = "The model cannot be served with it; the message has the least figure"),
        (status = 500, description = "Weights could not be read; the message says what is held")))]
pub(super) async fn change(
    State(state): State<AppState>,
    Body(request): Body<MemoryRequest>,
) -> Result<Json<MemoryResponse>, Error> {
    let targets =
        MemoryTargets { weights: request.weights.map(ByteSize::bytes), kv: request.kv.map(ByteSize::bytes) };
    if targets == MemoryTargets::default() {
        return Err(Error::invalid("weights", "neither weights nor kv is given; give at least one"));
    }
    let patience = request.timeout_seconds.unwrap_or(PATIENCE_SECONDS);
    if !(0.0..=MAX_PATIENCE_SECONDS).contains(&patience) {
        let message =
            format!("timeout_seconds is {patience}; it must be between 0 and {MAX_PATIENCE_SECONDS}");
        return Err(Error::invalid("timeout_seconds", message));
    }
    let status = state.service.set_memory(targets, Duration::from_secs_f64(patience)).await?;
    Ok(Json(MemoryResponse::of(status, state.service.model().max_model_len())))
}
