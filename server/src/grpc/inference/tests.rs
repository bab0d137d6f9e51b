//! Tensors in and out, and sampling parameters, without an engine.

use std::collections::HashMap;

use rheostat_proto::inference::infer_parameter::ParameterChoice;
use rheostat_proto::inference::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use rheostat_proto::inference::{InferParameter, InferTensorContents, ModelInferRequest};
use serde_json::json;

use super::inputs::Inputs;
use super::outputs::{Frame, Reply};
use super::sampling::{from_json, from_parameters};
use crate::request::RawRequest;

fn tensor(name: &str, datatype: &str, shape: &[i64]) -> InferInputTensor {
    InferInputTensor {
        name: name.into(),
        datatype: datatype.into(),
        shape: shape.to_vec(),
        ..InferInputTensor::default()
    }
}

fn framed(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
}

/// A request with raw contents: prompt "héllo" and whether to stream.
fn raw_request(stream: bool) -> ModelInferRequest {
    ModelInferRequest {
        id: "7".into(),
        inputs: vec![tensor("text_input", "BYTES", &[1, 1]), tensor("stream", "BOOL", &[1])],
        raw_input_contents: vec![framed("héllo"), vec![u8::from(stream)]],
        ..ModelInferRequest::default()
    }
}

#[test]
fn raw_and_typed_inputs_read_the_same() {
    let raw = Inputs::read(&raw_request(true)).expect("raw inputs are valid");
    let mut request = raw_request(true);
    request.raw_input_contents.clear();
    let bytes = InferTensorContents { bytes_contents: vec!["héllo".into()], ..Default::default() };
    request.inputs[0].contents = Some(bytes);
    request.inputs[1].contents =
        Some(InferTensorContents { bool_contents: vec![true], ..Default::default() });
    let typed = Inputs::read(&request).expect("typed inputs are valid");
    assert_eq!((raw.text.as_str(), raw.stream), ("héllo", true));
    assert_eq!((typed.text, typed.stream), (raw.text, raw.stream));
}

#[test]
fn malformed_inputs_name_the_tensor() {
    type Spoil = fn(&mut ModelInferRequest);
    let cases: [(&str, Spoil); 12] = [
        ("text_input", |r| r.inputs.clear()),
        ("raw_input_contents", |r| r.raw_input_contents.truncate(1)),
        ("text_input", |r| r.raw_input_contents[0].truncate(3)),
        ("text_input", |r| r.raw_input_contents[0][3] = 0xff),
        ("text_input", |r| r.raw_input_contents[0][5] = 0xff),
        ("text_input", |r| r.inputs[0].shape = vec![2]),
        ("text_input", |r| r.inputs[0].shape = vec![]),
        ("text_input", |r| r.inputs[0].datatype = "FP32".into()),
        ("text_input", |r| r.inputs[1].name = "text_input".into()),
        ("stream", |r| r.raw_input_contents[1].push(0)),
        ("stream", |r| r.inputs[1].contents = Some(InferTensorContents::default())),
        ("max_tokens", |r| r.inputs[1].name = "max_tokens".into()),
    ];
    for (param, spoil) in cases {
        let mut request = raw_request(false);
        spoil(&mut request);
        if request.inputs.is_empty() {
            request.raw_input_contents.clear();
        }
        let error = Inputs::read(&request).expect_err("the request is malformed");
        assert_eq!(error.param.as_deref(), Some(param), "{error}");
        assert!(error.message.contains(param), "{error}");
    }
}

#[test]
fn the_prompt_comes_back_unless_streamed_or_excluded() {
    let prefix = |stream, exclude: Option<bool>| {
        let mut request = raw_request(stream);
        if let Some(exclude) = exclude {
            request.inputs.push(tensor("exclude_input_in_output", "BOOL", &[1]));
            request.raw_input_contents.push(vec![u8::from(exclude)]);
        }
        Inputs::read(&request).expect("valid").prefix().map(str::to_owned)
    };
    assert_eq!(prefix(false, None).as_deref(), Ok("héllo"));
    assert_eq!(prefix(false, Some(true)).as_deref(), Ok(""));
    assert_eq!(prefix(true, None).as_deref(), Ok(""));
    assert_eq!(prefix(true, Some(true)).as_deref(), Ok(""));
    assert!(prefix(true, Some(false)).is_err());
}

#[test]
fn answers_take_the_form_of_the_question() {
    let frame =
        Frame { texts: vec!["a".into(), String::new()], reasons: vec!["stop", ""], counts: vec![3, 0] };
    let request = raw_request(false);
    let reply = Reply::to(&request, &Inputs::read(&request).expect("valid")).expect("valid");
    let raw = reply.response(&frame);
    assert_eq!(raw.id, "7");
    let names: Vec<_> = raw.outputs.iter().map(|o| o.name.as_str()).collect();
    assert_eq!(names, ["text_output", "finish_reason", "num_input_tokens", "num_output_tokens"]);
    assert_eq!(raw.outputs[0].shape, [2]);
    assert_eq!(raw.raw_output_contents[0], [&framed("a")[..], &framed("")].concat());
    assert_eq!(raw.raw_output_contents[3], [3, 0, 0, 0, 0, 0, 0, 0]);

    let mut request = request;
    let text = InferTensorContents { bytes_contents: vec![b"x".to_vec()], ..Default::default() };
    request.raw_input_contents.clear();
    request.inputs.truncate(1);
    request.inputs[0].contents = Some(text);
    request.outputs =
        vec![InferRequestedOutputTensor { name: "num_output_tokens".into(), parameters: HashMap::new() }];
    let inputs = Inputs::read(&request).expect("valid");
    let typed = Reply::to(&request, &inputs).expect("valid").response(&frame);
    assert!(typed.raw_output_contents.is_empty());
    assert_eq!(typed.outputs.len(), 1);
    assert_eq!(typed.outputs[0].contents.as_ref().map(|c| c.uint_contents.clone()), Some(vec![3, 0]));

    request.outputs[0].name = "logits".into();
    assert!(Reply::to(&request, &inputs).is_err());
}

#[test]
fn sampling_parameters_are_read_by_vllms_names() {
    let mut raw = RawRequest::default();
    let json = json!({
        "temperature": "0.5", "top_p": 0.9, "top_k": -1, "seed": u64::MAX, "stop": "END", "n": 2,
        "stop_token_ids": [4], "ignore_eos": "True", "max_tokens": "100", "min_tokens": 2,
        "logit_bias": {"5": -100}, "skip_special_tokens": false, "compression": {"profile": "eco"},
        "include_stop_str_in_output": true, "repetition_penalty": null,
    });
    from_json(&mut raw, &json.to_string()).expect("every name is known");
    let sampling = &raw.sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (0.5, 0.9, 0));
    assert_eq!((sampling.seed, sampling.repetition_penalty), (Some(u64::MAX), 1.0));
    assert_eq!(
        (sampling.stop.as_slice(), sampling.stop_token_ids.as_slice()),
        (&["END".into()][..], &[4][..])
    );
    assert_eq!((sampling.ignore_eos, sampling.min_tokens, sampling.include_stop), (true, 2, true));
    assert_eq!(sampling.logit_bias.get(&5), Some(&-100.0));
    assert!(!sampling.skip_special_tokens);
    assert_eq!((raw.max_tokens, raw.n, raw.compression.profile.as_deref()), (Some(100), 2, Some("eco")));
}

#[test]
fn bad_sampling_parameters_are_refused_by_name() {
    for (json, name) in [
        (r#"{"temprature": 1}"#, "temprature"),
        (r#"{"logprobs": 1}"#, "logprobs"),
        (r#"{"temperature": "hot"}"#, "temperature"),
        (r#"{"max_tokens": 1.5}"#, "max_tokens"),
        (r#"{"min_tokens": -1}"#, "min_tokens"),
        (r#"{"stop": [1]}"#, "stop"),
        (r#"{"logit_bias": {"x": 1}}"#, "logit_bias"),
        (r#"{"compression": {"think": {"ratio": "x"}}}"#, "compression.think.ratio"),
        ("[1]", "sampling_parameters"),
        ("{", "sampling_parameters"),
    ] {
        let error = from_json(&mut RawRequest::default(), json).expect_err(json);
        assert_eq!(error.param.as_deref(), Some(name), "{error}");
    }
}

#[test]
fn request_parameters_set_what_they_know_and_pass_the_rest() {
    let parameter = |choice| InferParameter { parameter_choice: Some(choice) };
    let parameters = HashMap::from([
        ("max_tokens".to_owned(), parameter(ParameterChoice::Int64Param(3))),
        ("temperature".to_owned(), parameter(ParameterChoice::DoubleParam(0.25))),
        ("sequence_id".to_owned(), parameter(ParameterChoice::Int64Param(9))),
    ]);
    let mut raw = RawRequest::default();
    from_parameters(&mut raw, &parameters).expect("unknown names are ignored");
    assert_eq!((raw.max_tokens, raw.sampling.temperature), (Some(3), 0.25));
}
