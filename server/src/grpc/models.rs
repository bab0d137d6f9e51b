//! `rheostat.v1.ModelService`.

use rheostat_proto::rheostat::v1::model_service_server::ModelService;
use rheostat_proto::rheostat::v1::{
    GetModelInfoRequest, ListModelsRequest, ListModelsResponse, ModelDims, ModelInfo, SpecialTokens,
};
use tonic::{Request, Response, Status};

use crate::service::Service;

/// Says what is served.
pub(super) struct Models {
    service: Service,
}

impl Models {
    pub(super) fn new(service: Service) -> Self {
        Self { service }
    }

    fn info(&self) -> ModelInfo {
        let model = self.service.model();
        let special = self.service.tokenizer().special();
        ModelInfo {
            name: model.name.clone(),
            architecture: model.dims.architecture.clone(),
            created_unix_seconds: i64::try_from(model.created).unwrap_or(i64::MAX),
            max_model_len: model.max_model_len() as u32,
            vocab_size: model.dims.vocab_size as u32,
            profiles: model.offer.get().profile_names(),
            dims: Some(ModelDims {
                num_layers: model.dims.num_layers as u32,
                hidden_size: model.dims.hidden_size as u32,
                num_heads: model.dims.num_heads as u32,
                num_kv_heads: model.dims.num_kv_heads as u32,
                head_dim: model.dims.head_dim as u32,
                weight_bytes: model.dims.weight_bytes as u64,
            }),
            special_tokens: Some(SpecialTokens {
                bos: special.bos,
                eos: special.eos.clone(),
                pad: special.pad,
                unk: special.unk,
            }),
        }
    }
}

#[tonic::async_trait]
impl ModelService for Models {
    async fn list_models(
        &self,
        _request: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        Ok(Response::new(ListModelsResponse { models: vec![self.info()] }))
    }

    async fn get_model_info(
        &self,
        request: Request<GetModelInfoRequest>,
    ) -> Result<Response<ModelInfo>, Status> {
        self.service.check_model(&request.get_ref().model)?;
        Ok(Response::new(self.info()))
    }
}
