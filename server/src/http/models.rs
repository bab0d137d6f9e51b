//! `/v1/models`

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;
use utoipa::ToSchema;

use super::AppState;
use crate::error::Error;

/// A served model.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// Longest sequence, prompt and output together.
    max_model_len: usize,
    /// Compression profiles that requests may name.
    profiles: Vec<String>,
}

/// All served models.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ModelList {
    object: &'static str,
    data: Vec<Model>,
}

fn model(state: &AppState) -> Model {
    let info = state.service.model();
    Model {
        id: info.name.clone(),
        object: "model",
        created: info.created,
        owned_by: "rheostat",
        max_model_len: info.max_model_len(),
        profiles: info.offer.get().profile_names(),
    }
}

/// The served models.
#[utoipa::path(get, path = "/v1/models", tag = "models", responses((status = 200, body = ModelList)))]
pub(super) async fn list(State(state): State<AppState>) -> Json<ModelList> {
    Json(ModelList { object: "list", data: vec![model(&state)] })
}

/// One served model.
#[utoipa::path(get, path = "/v1/models/{id}", tag = "models", params(("id" = String, Path)),
    responses((status = 200, body = Model), (status = 404, description = "Not served here")))]
pub(super) async fn retrieve(
    State(state): State<AppState>,
    Path(id): Path<String>,
) -> Result<Json<Model>, Error> {
    state.service.check_model(&id)?;
    Ok(Json(model(&state)))
}
