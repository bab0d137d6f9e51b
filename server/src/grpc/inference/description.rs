//! What clients may know of the server and the model before they call.

use std::collections::HashMap;

use rheostat_proto::inference::model_metadata_response::TensorMetadata;
use rheostat_proto::inference::{
    DataType, ModelConfig, ModelInput, ModelMetadataResponse, ModelOutput, ModelParameter,
    ModelTransactionPolicy, ServerMetadataResponse,
};

use crate::service::ModelInfo;

use super::VERSION;

const NAME: &str = "rheostat";

/// A tensor: its name, its element type on the wire and in the configuration, its only dimension.
struct Tensor(&'static str, &'static str, DataType, i64);

const TEXT_INPUT: Tensor = Tensor("text_input", "BYTES", DataType::TypeString, 1);
const OPTIONAL_INPUTS: [Tensor; 3] = [
    Tensor("stream", "BOOL", DataType::TypeBool, 1),
    Tensor("sampling_parameters", "BYTES", DataType::TypeString, 1),
    Tensor("exclude_input_in_output", "BOOL", DataType::TypeBool, 1),
];
const OUTPUTS: [Tensor; 4] = [
    Tensor("text_output", "BYTES", DataType::TypeString, -1),
    Tensor("finish_reason", "BYTES", DataType::TypeString, -1),
    Tensor("num_input_tokens", "UINT32", DataType::TypeUint32, 1),
    Tensor("num_output_tokens", "UINT32", DataType::TypeUint32, -1),
];

/// Name, version and the extensions of the protocol.
pub(super) fn server() -> ServerMetadataResponse {
    ServerMetadataResponse {
        name: NAME.into(),
        version: env!("CARGO_PKG_VERSION").into(),
        extensions: vec!["model_configuration".into()],
    }
}

/// The tensors of the model.
pub(super) fn metadata(model: &ModelInfo) -> ModelMetadataResponse {
    let tensor = |Tensor(name, datatype, _, dim): &Tensor| TensorMetadata {
        name: (*name).into(),
        datatype: (*datatype).into(),
        shape: vec![*dim],
    };
    ModelMetadataResponse {
        name: model.name.clone(),
        versions: vec![VERSION.into()],
        platform: NAME.into(),
        inputs: std::iter::once(&TEXT_INPUT).chain(&OPTIONAL_INPUTS).map(tensor).collect(),
        outputs: OUTPUTS.iter().map(tensor).collect(),
    }
}

/// The model's configuration, as Triton's would be for one of its language-model backends.
pub(super) fn config(model: &ModelInfo) -> ModelConfig {
    let input = |Tensor(name, _, data_type, dim): &Tensor, optional| ModelInput {
        name: (*name).into(),
        data_type: (*data_type).into(),
        dims: vec![*dim],
        optional,
    };
    let output = |Tensor(name, _, data_type, dim): &Tensor| ModelOutput {
        name: (*name).into(),
        data_type: (*data_type).into(),
        dims: vec![*dim],
    };
    let parameters = [
        ("architecture", model.dims.architecture.clone()),
        ("max_model_len", model.max_model_len().to_string()),
    ];
    let parameter = |(name, value): (&str, String)| (name.to_owned(), ModelParameter { string_value: value });
    let mut inputs = vec![input(&TEXT_INPUT, false)];
    inputs.extend(OPTIONAL_INPUTS.iter().map(|tensor| input(tensor, true)));
    ModelConfig {
        name: model.name.clone(),
        platform: String::new(),
        backend: NAME.into(),
        max_batch_size: 0,
        input: inputs,
        output: OUTPUTS.iter().map(output).collect(),
        parameters: parameters.into_iter().map(parameter).collect::<HashMap<_, _>>(),
        model_transaction_policy: Some(ModelTransactionPolicy { decoupled: true }),
    }
}
