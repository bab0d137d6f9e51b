//! The span of a generation and its stages.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use opentelemetry::trace::{Span as _, SpanKind, Status, TraceContextExt, Tracer as _};
use opentelemetry::{Array, Context, KeyValue, StringValue, Value};
use opentelemetry_sdk::trace::Span;

use super::{CallSpan, Trace};
use crate::energy::{EnergySum, EnergyUse};
use crate::error::Error;
use crate::request::{FinishReason, GenerateRequest, Prompt, RawRequest};

/// A generation that is recorded. Its span ends with the last holder: the engine, when the last choice has
/// ended.
#[derive(Debug)]
pub struct GenerationSpan {
    call: Arc<CallSpan>,
    state: Mutex<State>,
    /// Parent of the stages.
    context: Context,
}

#[derive(Debug)]
struct State {
    span: Span,
    output_tokens: i64,
    finish_reasons: Vec<StringValue>,
    energy: EnergySum,
}

impl Trace {
    /// The span of what `raw` asks of `model`, when the call is recorded.
    pub fn generation(&self, raw: &RawRequest, model: &str) -> Option<Arc<GenerationSpan>> {
        let call = Arc::clone(self.span.as_ref()?);
        let operation = if matches!(raw.prompt, Prompt::Chat(_)) { "chat" } else { "text_completion" };
        let sampling = &raw.sampling;
        let mut attributes = vec![
            KeyValue::new("gen_ai.operation.name", operation),
            KeyValue::new("gen_ai.provider.name", "rheostat"),
            KeyValue::new("gen_ai.request.model", model.to_owned()),
            KeyValue::new("gen_ai.response.model", model.to_owned()),
            KeyValue::new("gen_ai.request.temperature", f64::from(sampling.temperature)),
            KeyValue::new("gen_ai.request.top_p", f64::from(sampling.top_p)),
        ];
        if raw.n != 1 {
            attributes.push(KeyValue::new("gen_ai.request.choice.count", raw.n));
        }
        if let Some(profile) = &raw.compression.profile {
            attributes.push(KeyValue::new("rheostat.compression.profile", profile.clone()));
        }
        if let Some(key) = raw.caller.name() {
            attributes.push(KeyValue::new("rheostat.key", key.to_owned()));
        }
        let parent = Context::new().with_remote_span_context(self.context.clone());
        let builder = call.tracer.span_builder(format!("{operation} {model}")).with_kind(SpanKind::Internal);
        let span = builder.with_attributes(attributes).start_with_context(&call.tracer, &parent);
        let context = Context::new().with_remote_span_context(span.span_context().clone());
        let state =
            State { span, output_tokens: 0, finish_reasons: Vec::new(), energy: EnergySum::default() };
        Some(Arc::new(GenerationSpan { call, state: Mutex::new(state), context }))
    }
}

impl GenerationSpan {
    /// Admission took from `begin` to now and made `request`.
    pub fn admitted(&self, begin: Instant, request: &GenerateRequest) {
        self.child("admission", (begin, Instant::now()), Vec::new());
        self.state().span.set_attributes([
            KeyValue::new("gen_ai.response.id", request.id.clone()),
            KeyValue::new("gen_ai.request.max_tokens", request.max_tokens as i64),
            KeyValue::new("gen_ai.usage.input_tokens", request.prompt.len() as i64),
        ]);
    }

    /// A choice ended after `tokens` tokens, and was charged `energy`.
    pub fn choice_ended(&self, reason: FinishReason, tokens: usize, energy: Option<EnergyUse>) {
        let mut state = self.state();
        state.energy.add(energy);
        state.output_tokens += tokens as i64;
        state.finish_reasons.push(reason.as_str().into());
    }

    /// The request was refused or failed.
    pub fn failed(&self, error: &Error) {
        let mut state = self.state();
        state.span.set_attribute(KeyValue::new("error.type", error.kind.codes().2));
        state.span.set_status(Status::error(error.message.clone()));
    }

    /// A stage of a choice has ended.
    pub fn stage(&self, name: &'static str, times: (Instant, Instant), choice: usize) {
        self.child(name, times, vec![KeyValue::new("rheostat.choice.index", choice as i64)]);
    }

    fn child(&self, name: &'static str, (from, to): (Instant, Instant), attributes: Vec<KeyValue>) {
        let builder = self.call.tracer.span_builder(name).with_kind(SpanKind::Internal);
        let builder = builder.with_start_time(wall(from)).with_attributes(attributes);
        let mut span = builder.start_with_context(&self.call.tracer, &self.context);
        span.end_with_timestamp(wall(to));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for GenerationSpan {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if !state.finish_reasons.is_empty() {
            let reasons = std::mem::take(&mut state.finish_reasons);
            state.span.set_attributes([
                KeyValue::new("gen_ai.usage.output_tokens", state.output_tokens),
                KeyValue::new("gen_ai.response.finish_reasons", Value::Array(Array::String(reasons))),
            ]);
        }
        if let Some(EnergyUse { joules, source }) = state.energy.total() {
            state.span.set_attributes([
                KeyValue::new("rheostat.energy.joules", joules),
                KeyValue::new("rheostat.energy.source", source.as_str()),
            ]);
        }
        state.span.end();
    }
}

fn wall(at: Instant) -> SystemTime {
    SystemTime::now() - at.elapsed()
}
