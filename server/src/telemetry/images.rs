//! Metrics of images in prompts: their names, and their handles.

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram};
use model_zoo::compression::VisualUse;
use model_zoo::compression::options::{Vision, VisionBaseline};

use super::instruments::{Definition, Instruments, Paired};
use super::{REQUEST_BUCKETS, bytes, label, plain, seconds};

const ENCODE: Definition = seconds(
    "rheostat_image_encode_seconds",
    "",
    "Time to decode and encode an image that was not cached, waiting for its turn included",
    [REQUEST_BUCKETS, &[]],
);
const IMAGES: Definition =
    plain("rheostat_images_total", "", "Images in admitted prompts by where their embeddings came from");
const FETCHES: Definition = plain("rheostat_image_fetches_total", "", "Image URLs by outcome");
const CACHE_BYTES: Definition = bytes("rheostat_image_cache_bytes", "Embeddings kept for images shown again");

const TOKENS: Definition = plain(
    "rheostat_image_tokens_total",
    "",
    "Image tokens of computed prompts by the method that drops them: shown in prompts, and kept to the last layer",
);

/// Every definition of this file.
pub(super) const DEFINITIONS: &[Definition] = &[ENCODE, IMAGES, FETCHES, CACHE_BYTES, TOKENS];

/// The `method` label of image tokens.
const METHODS: [&str; 4] = ["none", "vision", "pool", "random"];

/// Handles of the metrics of images.
#[derive(Debug)]
pub struct ImageMetrics {
    encode: Paired<Histogram>,
    encoded: Paired<Counter>,
    cached: Paired<Counter>,
    fetched: Paired<Counter>,
    refused: Paired<Counter>,
    cache_bytes: Paired<Gauge>,
    /// `[method][shown, kept]`
    tokens: [[Paired<Counter>; 2]; METHODS.len()],
}

impl ImageMetrics {
    pub(super) fn new(instruments: &Instruments) -> Self {
        let images = |source| instruments.counter(&IMAGES, label("source", source), Vec::new());
        let fetches = |outcome| instruments.counter(&FETCHES, label("outcome", outcome), Vec::new());
        let tokens = |method| {
            ["shown", "kept"].map(|state| {
                let labels = [label("method", method), label("state", state)].concat();
                instruments.counter(&TOKENS, labels, Vec::new())
            })
        };
        Self {
            tokens: METHODS.map(tokens),
            encode: instruments.histogram(&ENCODE, Vec::new()),
            encoded: images("encoder"),
            cached: images("cache"),
            fetched: fetches("fetched"),
            refused: fetches("refused"),
            cache_bytes: instruments.gauge(&CACHE_BYTES, Vec::new(), Vec::new()),
        }
    }

    /// An image was encoded in `time`; the cache holds `cache_bytes` now.
    pub fn encoded(&self, time: Duration, cache_bytes: usize) {
        self.encoded.add(1);
        self.encode.record(time.as_secs_f64());
        self.cache_bytes.set(cache_bytes as f64);
    }

    /// A prompt with images was computed, under these options.
    pub fn prompt(&self, options: Option<&Vision>, visual: VisualUse) {
        let method = match options.map(|options| options.baseline) {
            None => 0,
            Some(None) => 1,
            Some(Some(VisionBaseline::Pool)) => 2,
            Some(Some(VisionBaseline::Random)) => 3,
        };
        let [shown, kept] = &self.tokens[method];
        shown.add(visual.shown as u64);
        kept.add(visual.kept as u64);
    }

    /// An image's embeddings were in the cache.
    pub fn hit(&self) {
        self.cached.add(1);
    }

    /// A URL was fetched, or refused, or failed.
    pub fn fetched(&self, fetched: bool) {
        if fetched { self.fetched.add(1) } else { self.refused.add(1) }
    }
}
