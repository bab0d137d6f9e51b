//! `/openapi.json`, generated from the handlers.

use axum::Json;
use utoipa::OpenApi;

#[derive(OpenApi)]
#[openapi(
    info(title = "Rheostat", description = "OpenAI-style generation with per-request compression"),
    paths(
        super::completions::create,
        super::chat::create,
        super::models::list,
        super::models::retrieve,
        super::tokens::tokenize,
        super::tokens::detokenize,
        super::tokens::info,
        super::admin::health,
        super::admin::ready,
        super::admin::metrics,
        super::admin::version,
        super::admin::abort,
        super::memory::show,
        super::memory::change,
    )
)]
struct Api;

/// The API's description.
pub(super) async fn document() -> Json<utoipa::openapi::OpenApi> {
    Json(Api::openapi())
}
