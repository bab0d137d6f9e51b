//! Errors in OpenAI's shape.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::error::{Error, ErrorKind};

/// An error's body.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ErrorBody {
    error: ErrorDetail,
}

/// What is wrong.
#[derive(Debug, Serialize, ToSchema)]
struct ErrorDetail {
    /// What is wrong and what to do about it.
    message: String,
    /// Class of the error, as OpenAI names it.
    r#type: &'static str,
    /// The request field that caused it.
    param: Option<String>,
    /// HTTP status, as a string; `invalid_api_key` where OpenAI says so.
    code: String,
}

impl ErrorBody {
    pub(super) fn new(error: Error) -> Self {
        let (status, _, r#type) = error.kind.codes();
        let code = match error.kind {
            ErrorKind::Unauthenticated => "invalid_api_key".to_owned(),
            _ => status.to_string(),
        };
        Self { error: ErrorDetail { message: error.message, r#type, param: error.param, code } }
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let kind = self.kind;
        let status = StatusCode::from_u16(kind.codes().0).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(ErrorBody::new(self))).into_response();
        if let Some(seconds) = kind.retry_after_s() {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if kind == ErrorKind::Unauthenticated {
            let scheme = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
        }
        response
    }
}
