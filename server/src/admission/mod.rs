//! From a converted request to one that the engine can run without looking at it again: model, limits,
//! tokens, plan, permit. Everything that a client can get wrong ends here, with a sentence that says how
//! to mend it.

mod limits;
mod live;
mod prompt;
mod validate;

pub use limits::Limits;
pub use live::{LiveRequests, QueuePlace};

use std::sync::Arc;
use std::time::Instant;

use model_zoo::ZooError;
use model_zoo::compression::{CompressionOptions, Context, Offer, Plan, registry};
use model_zoo::tokenizer::Tokenizer;
use model_zoo::vision::PromptImage;

use crate::auth::{Charge, Client};
use crate::current::Current;
use crate::engine::Guard;
use crate::error::{Error, ErrorKind};
use crate::governor::Governor;
use crate::images::Images;
use crate::request::{CUSTOM_PROFILE, Caller, GenerateRequest, ImageSource, Prompt, RawRequest};
use crate::service::ModelInfo;

/// Tokens of a text completion whose request names no limit: OpenAI's default.
const DEFAULT_COMPLETION_TOKENS: usize = 16;

/// Admits requests for one model.
#[derive(Debug)]
pub struct Admission {
    model: Arc<ModelInfo>,
    limits: Current<Limits>,
    prompts: prompt::PromptEncoder,
    images: Images,
    live: LiveRequests,
    governor: Option<Arc<Governor>>,
    /// Whether joules are counted, so that a request can be limited in them.
    is_metered: bool,
}

impl Admission {
    /// Admission for `model`, which sees `images` or does not, within `limits`.
    pub fn new(model: Arc<ModelInfo>, tokenizer: Arc<Tokenizer>, images: Images, limits: Limits) -> Self {
        let live = LiveRequests::new(&limits);
        let prompts = prompt::PromptEncoder::new(tokenizer, images.token());
        Self { model, prompts, images, limits: limits.into(), live, governor: None, is_metered: false }
    }

    /// Lets `governor` choose the profile of `auto` requests; without one they are refused.
    #[must_use]
    pub fn governed_by(self, governor: Option<Arc<Governor>>) -> Self {
        Self { governor, ..self }
    }

    /// Says whether joules are counted; where they are not, requests that limit them are refused.
    #[must_use]
    pub fn metered(self, is_metered: bool) -> Self {
        Self { is_metered, ..self }
    }

    /// Bounds requests by `limits` from now on; those that are live already stay.
    pub fn set_limits(&self, limits: Limits) {
        self.live.set_capacity(&limits);
        self.limits.set(limits);
    }

    /// The requests that are live now.
    pub fn live(&self) -> &LiveRequests {
        &self.live
    }

    /// Validates and tokenizes `raw`, compiles its plan, and takes a permit, which the guard holds.
    ///
    /// # Errors
    /// The client's mistakes, named; [`ErrorKind::RateLimited`] when it is over a limit of its API key;
    /// [`ErrorKind::Overloaded`] when every permit is taken or the queue is full.
    pub async fn admit(&self, raw: RawRequest) -> Result<(GenerateRequest, Guard), Error> {
        self.model.check_name(&raw.model)?;
        let limits = self.limits.get();
        let n = validate::choices(raw.n, &limits)?;
        let budget = validate::budget(&raw, self.is_metered, Instant::now())?;
        let mut sampling = raw.sampling;
        validate::sampling(&sampling, &limits, &self.model)?;
        validate::prompt_size(&raw.prompt, &limits)?;
        let client = raw.caller.client.as_ref();
        let place = client.map(Client::enter).transpose()?;
        let queued = self.live.queue()?;
        let guard = self.live.enter(&raw.id, &raw.caller)?;
        let is_chat = matches!(raw.prompt, Prompt::Chat(_));
        let mut prompt = raw.prompt;
        let compression = self.governed(raw.compression);
        let offer = self.model.offer.get();
        let encoding = registry::encoding(&compression, &offer).map_err(refuse_options)?;
        let shown = self.images.embed(take_images(&mut prompt), encoding).await?;
        let prompt = self.prompts.encode(prompt, raw.add_special_tokens).await?;
        let image_joules = shown.joules;
        let prepared = registry::prepare(&compression, &offer, shown.embeddings).map_err(refuse_options)?;
        let (prompt, images) = self.images.place(prompt, &prepared)?;
        let longest = self.model.max_model_len();
        validate::tokens(&prompt, &self.model, longest)?;
        let room = longest - prompt.len();
        let default = if is_chat { room } else { room.min(DEFAULT_COMPLETION_TOKENS) };
        let max_tokens = match raw.max_tokens {
            None => default,
            Some(asked) => validate::max_tokens(asked, prompt.len(), longest)?,
        };
        if max_tokens == 0 && !raw.prompt_logprobs && !raw.echo {
            let message = "max_tokens must be at least 1, or 0 together with echo or prompt logprobs";
            return Err(Error::invalid("max_tokens", message));
        }
        limits.check_total(n, max_tokens)?;
        let plan = self.plan(&compression, (prompt.len(), max_tokens, &images), &offer)?;
        let charge = charge(client, prompt.len() + n * max_tokens)?;
        sampling.seed = Some(sampling.seed.unwrap_or_else(rand::random));
        let request = GenerateRequest {
            id: guard.id().to_owned(),
            prompt: prompt.into(),
            images,
            image_joules,
            sampling: Arc::new(sampling),
            max_tokens,
            n,
            prompt_logprobs: raw.prompt_logprobs,
            plan: Arc::new(plan),
            profile: profile(&compression).into(),
            cache_salt: salt(&raw.cache_salt),
            budget,
            is_chat,
            client: client.map(|client| client.name().into()),
            charge,
            queued: Some(Arc::new(queued)),
            span: None,
        };
        Ok((request, Box::new((guard, place, shown.room))))
    }

    /// The options with the governor's choice in place of `auto`.
    fn governed(&self, mut options: CompressionOptions) -> CompressionOptions {
        if let Some(governor) = &self.governor
            && options.profile.as_deref() == Some(registry::AUTO)
        {
            options.profile = Some(governor.choose());
        }
        options
    }

    /// What of the model the request runs.
    fn plan(
        &self,
        options: &CompressionOptions,
        (prompt_len, max_tokens, images): (usize, usize, &[PromptImage]),
        offer: &Offer,
    ) -> Result<Plan, Error> {
        let dims = &self.model.dims;
        let context = Context {
            num_layers: dims.num_layers,
            head_dim: dims.head_dim,
            prompt_len,
            max_tokens,
            images,
            offer,
        };
        registry::compile(options, &context).map_err(refuse_options)
    }

    /// Fails unless a request of this id is live and the caller's to touch.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]: other clients' requests are none of the caller's business.
    pub fn check_live(&self, id: &str, caller: &Caller) -> Result<(), Error> {
        if self.live.contains(id, caller) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::NotFound, format!("no live request has the id `{id}`")))
    }
}

/// The client's mistake in its compression options.
fn refuse_options(error: ZooError) -> Error {
    let message = error.to_string();
    // The sentence begins with the field that it is about.
    let first = message.split([' ', ':']).next().unwrap_or_default();
    let param = if first.starts_with("compression.") { first } else { "compression" };
    Error::invalid(&String::from(param), message)
}

/// The images that a chat shows.
fn take_images(prompt: &mut Prompt) -> Vec<ImageSource> {
    match prompt {
        Prompt::Chat(chat) => std::mem::take(&mut chat.images),
        Prompt::Text(_) | Prompt::Tokens(_) => Vec::new(),
    }
}

/// The profile's name, for people and metrics; compilation has checked that there is such a one.
fn profile(options: &CompressionOptions) -> &str {
    let unnamed = if options.methods().is_empty() { registry::DENSE } else { CUSTOM_PROFILE };
    options.profile.as_deref().unwrap_or(unnamed)
}

/// Takes what the request can cost at most, `tokens` tokens, from the buckets of its client's key.
fn charge(client: Option<&Client>, tokens: usize) -> Result<Option<Arc<Charge>>, Error> {
    client.map(|client| client.charge(tokens).map(Arc::new)).transpose()
}

/// 0 for no salt; else a digest of it.
fn salt(text: &str) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    if text.is_empty() {
        return 0;
    }
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish().max(1)
}

#[cfg(test)]
mod tests;
