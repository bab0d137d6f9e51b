//! `rheostat.v1.TokenizationService`.

use std::sync::Arc;
use std::thread::available_parallelism;

use model_zoo::tokenizer::ChatInput;
use rheostat_proto::rheostat::v1::tokenization_service_server::TokenizationService;
use rheostat_proto::rheostat::v1::tokenize_request::Prompt;
use rheostat_proto::rheostat::v1::{
    DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse,
};
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status};

use crate::error::{Error, ErrorKind};
use crate::request::ChatPrompt;
use crate::service::Service;

use super::generation::chat_prompt;
use super::status;

/// Encodes and decodes with the served model's tokenizer, off the async threads.
pub(super) struct Tokenization {
    service: Service,
    /// One permit a core: a call waits here, where it can be cancelled, and not in the blocking pool.
    cores: Arc<Semaphore>,
}

impl Tokenization {
    pub(super) fn new(service: Service) -> Self {
        let cores = available_parallelism().map_or(1, usize::from);
        Self { service, cores: Arc::new(Semaphore::new(cores)) }
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Service) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let permit = self.cores.clone().acquire_owned().await;
        let permit = permit.map_err(|_| Error::new(ErrorKind::Unavailable, "the server is stopping"))?;
        let service = self.service.clone();
        let task = tokio::task::spawn_blocking(move || {
            let result = work(&service);
            drop(permit);
            result
        });
        task.await.map_err(|e| status::task_failed(&e))?
    }
}

#[tonic::async_trait]
impl TokenizationService for Tokenization {
    async fn tokenize(
        &self,
        request: Request<TokenizeRequest>,
    ) -> Result<Response<TokenizeResponse>, Status> {
        let request = request.into_inner();
        self.service.check_model(&request.model)?;
        Ok(Response::new(self.run(|service| tokenize(service, request)).await?))
    }

    async fn detokenize(
        &self,
        request: Request<DetokenizeRequest>,
    ) -> Result<Response<DetokenizeResponse>, Status> {
        let request = request.into_inner();
        self.service.check_model(&request.model)?;
        Ok(Response::new(self.run(move |service| detokenize(service, &request)).await?))
    }
}

fn tokenize(service: &Service, request: TokenizeRequest) -> Result<TokenizeResponse, Error> {
    let tokenizer = service.tokenizer();
    let encoded = match request.prompt {
        Some(Prompt::Text(text)) => tokenizer.encode(&text, request.add_special_tokens.unwrap_or(true)),
        Some(Prompt::Chat(chat)) => {
            let ChatPrompt { messages, images, tools, template_args, add_generation_prompt } =
                chat_prompt(chat)?;
            if !images.is_empty() {
                return Err(Error::invalid("chat.messages", "images are not tokenized; send text alone"));
            }
            let input =
                ChatInput { messages, tools, template_args, add_generation_prompt, image_marker: None };
            let special = request.add_special_tokens.unwrap_or(false);
            tokenizer.apply_chat_template(&input).and_then(|text| tokenizer.encode(&text, special))
        }
        None => return Err(Error::invalid("prompt", "one of text and chat is required")),
    };
    let token_ids = encoded.map_err(|e| status::tokenizer_error("prompt", &e))?;
    let tokens = match request.return_tokens {
        true => token_ids.iter().map(|&id| tokenizer.id_to_token(id).unwrap_or_default()).collect(),
        false => Vec::new(),
    };
    Ok(TokenizeResponse { token_ids, tokens, max_model_len: service.model().max_model_len() as u32 })
}

fn detokenize(service: &Service, request: &DetokenizeRequest) -> Result<DetokenizeResponse, Error> {
    let tokenizer = service.tokenizer();
    let size = tokenizer.vocab_size();
    if let Some(id) = request.token_ids.iter().find(|&&id| id as usize >= size) {
        return Err(Error::invalid(
            "token_ids",
            format!("token {id} is not in the vocabulary of {size} tokens"),
        ));
    }
    let text = tokenizer.decode(&request.token_ids, request.skip_special_tokens);
    Ok(DetokenizeResponse { text: text.map_err(|e| status::tokenizer_error("token_ids", &e))? })
}
