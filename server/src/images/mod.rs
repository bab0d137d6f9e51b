//! From the images that a request shows to what the decoder takes in their place.
//!
//! The way of an image: fetch it, if it is a URL ([`fetch`], guarded) → look for it in the cache by the SHA-256
//! of its file and by how it is to be encoded → decode, process, encode → cache. Decoding and encoding run on blocking threads, with an encoder
//! that is a model of its own beside the decoder: the engine thread goes on with its steps, and other
//! requests only share the cores. One image is encoded at a time, and few are decoded.
//!
//! Invariants: no lock is held over an await; everything held is bounded: files by `max_bytes`, decoded images
//! by `max_pixels` and [`TURNS`], cached embeddings by `cache`, those of live requests by `live`.

mod cache;
mod data_url;
pub mod fetch;
mod guard;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use model_zoo::vision::decode::decode;
use model_zoo::vision::{Encoding, ImageEmbeddings, ImageEncoder, PromptImage, Vision};
use sha2::{Digest, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::energy::Energy;
use crate::error::{Error, ErrorKind};
use crate::request::ImageSource;
use crate::telemetry::Metrics;
use cache::EmbeddingCache;
use fetch::Fetcher;

/// Images that are decoded at once.
const TURNS: usize = 2;
/// Unit in which the embeddings of live requests are counted.
const ROOM_UNIT: usize = 1024;

/// What images requests may show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageLimits {
    /// Fetch `http:` and `https:` URLs.
    pub fetch: bool,
    /// Hosts that may be fetched from: `host`, `host:port`, `*.domain`, or `*` for every public one.
    pub allow_hosts: Vec<String>,
    /// Bytes of an image's file at most.
    pub max_bytes: usize,
    /// Pixels of an image at most.
    pub max_pixels: u64,
    /// Images of a request at most.
    pub max_images: usize,
    /// Time for fetching one image, redirects included.
    pub timeout: Duration,
    /// Bytes of embeddings that are kept for images shown again.
    pub cache_bytes: usize,
    /// Bytes of embeddings that live requests hold; more wait.
    pub live_bytes: usize,
}

impl Default for ImageLimits {
    fn default() -> Self {
        Self {
            fetch: false,
            allow_hosts: Vec::new(),
            max_bytes: 8 << 20,
            max_pixels: 16 << 20,
            max_images: 8,
            timeout: Duration::from_secs(10),
            cache_bytes: 64 << 20,
            live_bytes: 256 << 20,
        }
    }
}

/// The images of one request, encoded.
#[derive(Debug)]
pub struct Shown {
    /// In the order in which they were shown.
    pub embeddings: Vec<Arc<ImageEmbeddings>>,
    /// Joules that encoding those that no earlier request had encoded was charged; `None` where nobody knows.
    pub joules: Option<f64>,
    /// Held as long as the request lives.
    pub room: Option<OwnedSemaphorePermit>,
}

/// Encodes images for one model, or refuses them for one that does not see. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Images(Option<Arc<Seeing>>);

/// What a model that sees needs.
#[derive(Debug)]
struct Seeing {
    limits: ImageLimits,
    fetcher: Fetcher,
    vision: Mutex<Box<dyn ImageEncoder>>,
    processor: model_zoo::vision::processor::ImageProcessor,
    image_token: u32,
    embeddings_bytes: usize,
    cache: Mutex<EmbeddingCache>,
    turns: Arc<Semaphore>,
    room: Arc<Semaphore>,
    metrics: Arc<Metrics>,
    energy: Arc<Energy>,
}

impl Images {
    /// Images for a model with `vision`, within `limits`, whose encoding is metered by `energy`.
    pub fn new(
        vision: Option<Vision>,
        limits: ImageLimits,
        metrics: Arc<Metrics>,
        energy: Arc<Energy>,
    ) -> Self {
        Self(vision.map(|vision| {
            let Vision { processor, encoder, image_token } = vision;
            let embeddings_bytes = 4 * encoder.tokens_per_image() * encoder.hidden_size();
            // At least one request must find room.
            let live = limits.live_bytes.max(limits.max_images * embeddings_bytes).div_ceil(ROOM_UNIT);
            Arc::new(Seeing {
                fetcher: Fetcher::new(&limits),
                vision: Mutex::new(encoder),
                processor,
                image_token,
                embeddings_bytes,
                cache: Mutex::new(EmbeddingCache::new(limits.cache_bytes)),
                turns: Arc::new(Semaphore::new(TURNS)),
                room: Arc::new(Semaphore::new(live.min(Semaphore::MAX_PERMITS))),
                metrics,
                energy,
                limits,
            })
        }))
    }

    /// Id of the token that stands for an image, if the model sees.
    pub fn token(&self) -> Option<u32> {
        self.0.as_ref().map(|seeing| seeing.image_token)
    }

    /// Encodes what a request shows, as its compression needs it.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] that says which image cannot be taken, and why.
    pub async fn embed(&self, sources: Vec<ImageSource>, encoding: Encoding) -> Result<Shown, Error> {
        if sources.is_empty() {
            return Ok(Shown { embeddings: Vec::new(), joules: Some(0.0), room: None });
        }
        let Some(seeing) = &self.0 else {
            let message = "this model does not see images; send text alone, or serve a model with vision";
            return Err(Error::invalid("messages", message));
        };
        let (count, most) = (sources.len(), seeing.limits.max_images);
        if count > most {
            let message = format!("the request shows {count} images; {most} are allowed (images.max_images)");
            return Err(Error::invalid("messages", message));
        }
        let room = seeing.room(count).await?;
        let (mut embeddings, mut joules) = (Vec::with_capacity(count), Some(0.0));
        for (index, source) in sources.into_iter().enumerate() {
            let refuse = |error: Error| match error.kind {
                ErrorKind::InvalidArgument => Error::invalid(
                    "messages",
                    format!("image {} cannot be taken: {}", index + 1, error.message),
                ),
                _ => error,
            };
            let (image, own) = Seeing::embed(seeing, source, encoding).await.map_err(refuse)?;
            embeddings.push(image);
            joules = joules.zip(own).map(|(sum, own)| sum + own);
        }
        Ok(Shown { embeddings, joules, room: Some(room) })
    }

    /// Replaces each image token of `prompt` by as many as its image has rows, and says where images lie.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when there are not as many image tokens as images: the text spelled one.
    pub fn place(
        &self,
        prompt: Vec<u32>,
        shown: &[Arc<ImageEmbeddings>],
    ) -> Result<(Vec<u32>, Arc<[PromptImage]>), Error> {
        match self.token() {
            Some(token) => place(token, prompt, shown),
            None => Ok((prompt, Arc::default())),
        }
    }
}

/// [`Images::place`] for the image token `token`.
///
/// # Errors
/// The same.
pub(crate) fn place(
    token: u32,
    prompt: Vec<u32>,
    shown: &[Arc<ImageEmbeddings>],
) -> Result<(Vec<u32>, Arc<[PromptImage]>), Error> {
    let places = prompt.iter().filter(|&&id| id == token).count();
    if places != shown.len() {
        let count = shown.len();
        return Err(Error::invalid(
            "messages",
            format!(
                "the prompt has {places} places for {count} images: text must not spell the model's image token (id {token}), and only messages of a chat can show images"
            ),
        ));
    }
    if shown.is_empty() {
        return Ok((prompt, Arc::default()));
    }
    let rows: usize = shown.iter().map(|image| image.num_tokens()).sum();
    let (mut placed, mut images) = (Vec::with_capacity(prompt.len() + rows), Vec::new());
    let mut next = shown.iter();
    for id in prompt {
        match next.as_slice().first().filter(|_| id == token) {
            Some(embeddings) => {
                let start = placed.len();
                images.push(PromptImage { start, embeddings: Arc::clone(embeddings) });
                placed.resize(start + embeddings.num_tokens(), token);
                next.next();
            }
            None => placed.push(id),
        }
    }
    Ok((placed, images.into()))
}

/// An image's embeddings, and the joules that they were charged now.
type Embedded = (Arc<ImageEmbeddings>, Option<f64>);

impl Seeing {
    /// Waits until live requests leave room for the embeddings of `count` images.
    async fn room(&self, count: usize) -> Result<OwnedSemaphorePermit, Error> {
        let units = (count * self.embeddings_bytes).div_ceil(ROOM_UNIT);
        let units = u32::try_from(units).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.room).acquire_many_owned(units).await;
        room.map_err(|_| Error::new(ErrorKind::Unavailable, "the server is stopping"))
    }

    async fn embed(seeing: &Arc<Self>, source: ImageSource, encoding: Encoding) -> Result<Embedded, Error> {
        let bytes = match source {
            ImageSource::Bytes(bytes) => bytes,
            ImageSource::Url(url) if data_url::is(&url) => {
                data_url::decode(&url, seeing.limits.max_bytes).map_err(refuse)?
            }
            ImageSource::Url(url) => {
                let fetched = seeing.fetcher.fetch(&url).await;
                seeing.metrics.images.fetched(fetched.is_ok());
                fetched.map_err(|e| refuse(e.to_string()))?
            }
        };
        let (len, most) = (bytes.len(), seeing.limits.max_bytes);
        if len > most {
            return Err(refuse(format!("it has {len} bytes; {most} are allowed (images.max_bytes)")));
        }
        let turn = Arc::clone(&seeing.turns).acquire_owned().await;
        let seeing = Arc::clone(seeing);
        // The turn goes with the work, which goes on when its client is gone.
        let work = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            seeing.embed_bytes(&bytes, encoding)
        });
        work.await.map_err(|_| Error::new(ErrorKind::Internal, "the image could not be encoded"))?
    }

    fn embed_bytes(&self, bytes: &[u8], encoding: Encoding) -> Result<Embedded, Error> {
        let digest = encoding.digest(Sha256::digest(bytes).into());
        if let Some(found) = self.cached(&digest) {
            self.metrics.images.hit();
            return Ok((found, Some(0.0)));
        }
        let begin = Instant::now();
        let image = decode(bytes, self.limits.max_pixels).map_err(|e| refuse(e.to_string()))?;
        let pixels = self.processor.process(&image);
        drop(image);
        let mut encoder = self.vision.lock().unwrap_or_else(PoisonError::into_inner);
        // The same image may have been encoded while this one waited for the encoder.
        if let Some(found) = self.cached(&digest) {
            self.metrics.images.hit();
            return Ok((found, Some(0.0)));
        }
        let meter = self.energy.encode();
        let encoded = encoder.encode(&pixels, encoding).map_err(|e| refuse(e.to_string()))?;
        let joules = meter.end();
        let size = (encoder.hidden_size(), encoder.tokens_per_image());
        let embeddings = Arc::new(ImageEmbeddings::of(size, encoded, digest));
        drop(encoder);
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        cache.insert(&embeddings);
        self.metrics.images.encoded(begin.elapsed(), cache.bytes());
        Ok((embeddings, joules))
    }

    fn cached(&self, digest: &[u8; 32]) -> Option<Arc<ImageEmbeddings>> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner).get(digest)
    }
}

fn refuse(what: String) -> Error {
    Error::invalid("messages", what)
}
