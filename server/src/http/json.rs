//! Request bodies: bounded, UTF-8, JSON, with errors that name the field.

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use serde::de::DeserializeOwned;

use crate::error::{Error, ErrorKind};

/// A parsed body. Any content type is taken, as OpenAI's clients send the right one and others none.
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Error;

    async fn from_request(request: Request, state: &S) -> Result<Self, Error> {
        let bytes = Bytes::from_request(request, state).await.map_err(|rejection| {
            match rejection.into_response().status() {
                StatusCode::PAYLOAD_TOO_LARGE => {
                    Error::new(ErrorKind::TooLarge, "the request body is larger than http.max_body")
                }
                _ => Error::new(ErrorKind::Malformed, "the request body could not be read"),
            }
        })?;
        parse(&bytes).map(Self)
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    let text = std::str::from_utf8(bytes).map_err(|e| {
        Error::new(
            ErrorKind::Malformed,
            format!("the body is not UTF-8: invalid byte at {}", e.valid_up_to()),
        )
    })?;
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|e| {
        let path = e.path().to_string();
        let inner = e.into_inner();
        if inner.is_data() && path != "." {
            return Error::invalid(&path, format!("{path}: {inner}"));
        }
        Error::new(ErrorKind::Malformed, format!("the body is not valid JSON for this endpoint: {inner}"))
    })?;
    deserializer
        .end()
        .map_err(|e| Error::new(ErrorKind::Malformed, format!("the body goes on after its JSON: {e}")))?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    struct Sample {
        #[allow(dead_code)]
        max_tokens: Option<i64>,
    }

    #[test]
    fn mistakes_are_named() {
        for (body, message) in [
            (&b"{\"max_tokens\": \"x\"}"[..], "max_tokens: invalid type: string"),
            (b"{\"max_tokens\": 1.5}", "max_tokens: invalid type: floating point"),
            (b"{\"max_tokens\": 1e999}", "number out of range"),
            (b"{\"max_tokens\": NaN}", "expected value at line 1"),
            (b"{", "EOF"),
            (b"{} x", "goes on after"),
            (b"\xff", "not UTF-8"),
            (b"[]x", "not valid JSON"),
        ] {
            let error = parse::<Sample>(body).expect_err(message);
            assert!(error.message.contains(message), "{}", error.message);
            assert_eq!(error.kind.codes().0, 400);
        }
        assert!(parse::<Sample>(b"{\"max_tokens\": 1, \"unknown\": [1]}").is_ok());
    }
}
