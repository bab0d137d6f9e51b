//! Any server with OpenAI's API.

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE};
use hyper::{Method, Request, Response, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::sse::Lines;
use super::{Answer, Failure, Settings, Target, Usage};
use crate::workload::Call;

/// Bytes of an answer at most.
const MAX_BODY: usize = 64 << 20;

/// Sends to one server, over as many connections as there are requests at once.
#[derive(Debug)]
pub struct HttpTarget {
    client: Client<HttpConnector, Full<Bytes>>,
    base: String,
    settings: Settings,
}

impl HttpTarget {
    /// For the server at `base`, such as `http://127.0.0.1:8080`.
    ///
    /// # Errors
    /// A sentence, when that is no address of plain HTTP.
    pub fn new(base: &str, settings: Settings) -> Result<Self, String> {
        let base = base.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let uri: Uri = base.parse().map_err(|e| format!("`{base}` is no URL: {e}"))?;
        if uri.scheme_str() != Some("http") || uri.host().is_none() {
            return Err(format!("`{base}` must begin with http:// and name a host; put a proxy before TLS"));
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        Ok(Self { client: Client::builder(TokioExecutor::new()).build(connector), base, settings })
    }

    /// Whether the server answers `GET /v1/models`.
    pub async fn is_up(&self) -> bool {
        match self.request(Method::GET, "/v1/models", Bytes::new()) {
            Ok(request) => {
                self.client.request(request).await.is_ok_and(|answer| answer.status().is_success())
            }
            Err(_) => false,
        }
    }

    fn request(&self, method: Method, path: &str, body: Bytes) -> Result<Request<Full<Bytes>>, Failure> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header(CONTENT_TYPE, "application/json");
        if let Some(key) = &self.settings.api_key {
            request = request.header(AUTHORIZATION, format!("Bearer {key}"));
        }
        request.body(Full::new(body)).map_err(|_| Failure::Malformed)
    }

    fn body(&self, call: &Call) -> Value {
        let settings = &self.settings;
        let mut body = json!({"max_tokens": call.max_tokens, "stream": settings.stream, "seed": call.seed});
        if settings.chat {
            body["messages"] = json!([{"role": "user", "content": call.prompt}]);
        } else {
            body["prompt"] = json!(call.prompt);
        }
        if !settings.model.is_empty() {
            body["model"] = json!(settings.model);
        }
        if settings.stream {
            body["stream_options"] = json!({"include_usage": true});
        }
        if !settings.respect_eos {
            body["ignore_eos"] = json!(true);
        }
        if let Some(Some(compression)) = settings.compression.get(call.share) {
            body["compression"] = compression.clone();
        }
        body
    }
}

impl Target for HttpTarget {
    async fn call(&self, call: Call) -> Result<Answer, Failure> {
        let path = if self.settings.chat { "/v1/chat/completions" } else { "/v1/completions" };
        let request = self.request(Method::POST, path, Bytes::from(self.body(&call).to_string()))?;
        let answer = self.client.request(request).await.map_err(|_| Failure::Connection)?;
        let status = answer.status();
        if !status.is_success() {
            // Read to its end, so that the connection can be used again.
            let _ = http_body_util::Limited::new(answer.into_body(), MAX_BODY).collect().await;
            return Err(Failure::Refused(format!("HTTP {}", status.as_u16())));
        }
        if self.settings.stream { streamed(answer).await } else { whole(answer).await }
    }
}

async fn whole(answer: Response<Incoming>) -> Result<Answer, Failure> {
    let body = http_body_util::Limited::new(answer.into_body(), MAX_BODY);
    let bytes = body.collect().await.map_err(|_| Failure::Incomplete)?.to_bytes();
    let end = Instant::now();
    let body: Value = serde_json::from_slice(&bytes).map_err(|_| Failure::Malformed)?;
    let usage = body.get("usage").map(usage).unwrap_or_default();
    Ok(Answer { first_token: None, last_token: None, end, usage })
}

async fn streamed(answer: Response<Incoming>) -> Result<Answer, Failure> {
    let mut body = answer.into_body();
    let mut lines = Lines::default();
    let mut progress = Progress::default();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| Failure::Incomplete)?;
        let Some(bytes) = frame.data_ref() else { continue };
        let now = Instant::now();
        for event in lines.push(bytes).ok_or(Failure::Malformed)? {
            progress.take(&event, now)?;
        }
    }
    progress.answer()
}

/// What a stream has said so far.
#[derive(Debug, Default)]
struct Progress {
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    pieces: u64,
    usage: Option<Usage>,
    end: Option<Instant>,
}

impl Progress {
    fn take(&mut self, event: &str, now: Instant) -> Result<(), Failure> {
        if event == "[DONE]" {
            self.end = Some(now);
            return Ok(());
        }
        let event: Value = serde_json::from_str(event).map_err(|_| Failure::Malformed)?;
        if let Some(error) = event.get("error") {
            let kind = error.get("type").and_then(Value::as_str).unwrap_or("error");
            return Err(Failure::Refused(format!("{kind} in the stream")));
        }
        let choices = event.get("choices").and_then(Value::as_array);
        let text = |choice: &Value| {
            let text = choice.get("text").or_else(|| choice.pointer("/delta/content"));
            text.and_then(Value::as_str).is_some_and(|text| !text.is_empty())
        };
        if choices.is_some_and(|choices| choices.iter().any(text)) {
            self.first_token.get_or_insert(now);
            self.last_token = Some(now);
            self.pieces += 1;
        }
        if let Some(given) = event.get("usage").filter(|usage| usage.is_object()) {
            self.usage = Some(usage(given));
        }
        Ok(())
    }

    fn answer(self) -> Result<Answer, Failure> {
        let usage = self.usage.unwrap_or(Usage { completion_tokens: self.pieces, ..Usage::default() });
        let end = self.end.ok_or(Failure::Incomplete)?;
        Ok(Answer { first_token: self.first_token, last_token: self.last_token, end, usage })
    }
}

/// OpenAI's `usage`, with what Rheostat adds to it.
fn usage(given: &Value) -> Usage {
    let count = |name: &str| given.get(name).and_then(Value::as_u64).unwrap_or(0);
    let text = |pointer: &str| given.pointer(pointer).and_then(Value::as_str).map(str::to_owned);
    Usage {
        prompt_tokens: count("prompt_tokens"),
        completion_tokens: count("completion_tokens"),
        joules: given.pointer("/energy/joules").and_then(Value::as_f64),
        joules_source: text("/energy/source"),
        profile: text("/compression/profile"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_complete_only_with_its_end() {
        let now = Instant::now();
        let mut progress = Progress::default();
        let role = r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#;
        let text = r#"{"choices":[{"delta":{"content":"Hi"}}],"usage":null}"#;
        for event in [role, text, text] {
            progress.take(event, now).expect("an event");
        }
        assert_eq!((progress.pieces, progress.first_token), (2, Some(now)));
        assert_eq!(Progress::default().answer(), Err(Failure::Incomplete));
        let last = r#"{"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":9,"energy":{"joules":0.5,
            "source":"rapl"},"compression":{"profile":"eco"}}}"#;
        progress.take(last, now).expect("usage");
        progress.take("[DONE]", now).expect("the end");
        let answer = progress.answer().expect("complete");
        let expected = Usage {
            prompt_tokens: 4,
            completion_tokens: 9,
            joules: Some(0.5),
            joules_source: Some("rapl".into()),
            profile: Some("eco".into()),
        };
        assert_eq!(answer.usage, expected);
        let error = Progress::default().take(r#"{"error":{"type":"server_error"}}"#, now);
        assert_eq!(error, Err(Failure::Refused("server_error in the stream".into())));
    }
}
