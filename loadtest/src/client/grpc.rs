//! Rheostat's own gRPC API.

use rheostat_proto::rheostat::v1;
use rheostat_proto::rheostat::v1::generate_request::Prompt;
use rheostat_proto::rheostat::v1::generate_stream_response::Event;
use rheostat_proto::rheostat::v1::generation_service_client::GenerationServiceClient;
use serde_json::Value;
use tokio::time::Instant;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use super::{Answer, Failure, Settings, Target, Usage};
use crate::workload::Call;

/// Sends to one server over one connection.
#[derive(Debug)]
pub struct GrpcTarget {
    client: GenerationServiceClient<Channel>,
    settings: Settings,
    /// The shares' compression, by their index.
    compression: Vec<Option<v1::Compression>>,
}

impl GrpcTarget {
    /// For the server at `address`, such as `http://127.0.0.1:50051`; it connects with the first request.
    ///
    /// # Errors
    /// A sentence, when the address is none, or a plan has what this client cannot send.
    pub fn new(address: &str, settings: Settings) -> Result<Self, String> {
        let endpoint = Endpoint::from_shared(address.to_owned())
            .map_err(|e| format!("`{address}` is no address: {e}"))?;
        let client = GenerationServiceClient::new(endpoint.tcp_nodelay(true).connect_lazy());
        let of = |given: &Option<Value>| given.as_ref().map(compression).transpose();
        let compression = settings.compression.iter().map(of).collect::<Result<_, _>>()?;
        Ok(Self { client, settings, compression })
    }

    fn request(&self, call: Call) -> Result<Request<v1::GenerateRequest>, Failure> {
        let prompt = if self.settings.chat {
            let user = v1::ChatMessage {
                role: "user".into(),
                content: Some(call.prompt),
                ..v1::ChatMessage::default()
            };
            Prompt::Chat(v1::ChatPrompt { messages: vec![user], ..v1::ChatPrompt::default() })
        } else {
            Prompt::Text(call.prompt)
        };
        let mut request = Request::new(v1::GenerateRequest {
            model: self.settings.model.clone(),
            prompt: Some(prompt),
            max_tokens: Some(i64::try_from(call.max_tokens).unwrap_or(i64::MAX)),
            sampling: Some(v1::SamplingParams {
                ignore_eos: !self.settings.respect_eos,
                seed: Some(call.seed.into()),
                ..v1::SamplingParams::default()
            }),
            compression: self.compression.get(call.share).cloned().flatten(),
            ..v1::GenerateRequest::default()
        });
        if let Some(key) = &self.settings.api_key {
            let value = MetadataValue::try_from(format!("Bearer {key}")).map_err(|_| Failure::Malformed)?;
            request.metadata_mut().insert("authorization", value);
        }
        Ok(request)
    }
}

impl Target for GrpcTarget {
    async fn call(&self, call: Call) -> Result<Answer, Failure> {
        let request = self.request(call)?;
        let mut client = self.client.clone();
        if !self.settings.stream {
            let answer = client.generate(request).await.map_err(|e| refusal(&e))?.into_inner();
            let usage = answer.usage.map(usage).unwrap_or_default();
            return Ok(Answer { first_token: None, last_token: None, end: Instant::now(), usage });
        }
        let mut events = client.generate_stream(request).await.map_err(|e| refusal(&e))?.into_inner();
        let (mut first_token, mut last_token) = (None, None);
        loop {
            let event = events.message().await.map_err(|e| refusal(&e))?.ok_or(Failure::Incomplete)?;
            let now = Instant::now();
            match event.event {
                Some(Event::Delta(delta)) if !delta.text.is_empty() => {
                    first_token.get_or_insert(now);
                    last_token = Some(now);
                }
                Some(Event::Completed(completed)) => {
                    let usage = completed.usage.map(usage).unwrap_or_default();
                    return Ok(Answer { first_token, last_token, end: now, usage });
                }
                _ => {}
            }
        }
    }
}

fn refusal(status: &Status) -> Failure {
    match status.code() {
        tonic::Code::Unknown | tonic::Code::Cancelled => Failure::Incomplete,
        code => Failure::Refused(format!("gRPC {code:?}")),
    }
}

fn usage(given: v1::Usage) -> Usage {
    let profile = given.compression.map(|usage| usage.profile);
    Usage {
        prompt_tokens: given.prompt_tokens.into(),
        completion_tokens: given.completion_tokens.into(),
        profile: profile.filter(|name| !name.is_empty()),
        ..Usage::default()
    }
}

/// The same as in JSON, as far as this client knows it.
fn compression(given: &Value) -> Result<v1::Compression, String> {
    let fields = given.as_object().ok_or("compression must be a JSON object")?;
    let mut wire = v1::Compression::default();
    for (name, value) in fields {
        let count = |key: &str| value.get(key).and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok());
        let real = |key: &str| value.get(key).and_then(Value::as_f64).map(|x| x as f32);
        match name.as_str() {
            "profile" => wire.profile = value.as_str().unwrap_or_default().to_owned(),
            "drop" => {
                let [attention, ffn, joint] = ["attention", "ffn", "joint"].map(count);
                wire.drop = Some(v1::DropLayers { attention, ffn, joint });
            }
            "bitstack" => wire.bitstack = Some(v1::BitStack { levels: count("levels") }),
            "think" => wire.think = Some(v1::Think { ratio: real("ratio"), recent: count("recent") }),
            "skip_decode" => {
                wire.skip_decode = Some(v1::SkipDecode {
                    min_layers: count("min_layers"),
                    max_layers: count("max_layers"),
                    horizon: count("horizon"),
                    core_layers: count("core_layers"),
                    ..v1::SkipDecode::default()
                });
            }
            "ffn_skip" => {
                let (target, warmup) = (real("target"), count("warmup"));
                wire.ffn_skip = Some(v1::FfnSkip { target, warmup, ..v1::FfnSkip::default() });
            }
            other => return Err(format!("`{other}` cannot be sent over gRPC by this client; use HTTP")),
        }
    }
    Ok(wire)
}
