//! Images in prompts: an encoder turns each into embeddings that stand where tokens' embeddings would.
//!
//! The way of an image: [`decode`] (PNG, JPEG or WebP to RGB) → [`processor`] (resize, crop, normalise, as
//! the checkpoint's own processor does) → [`ImageEncoder`] ([`clip`], then the projector) →
//! [`ImageEmbeddings`] in the prompt's [`PromptImage`].
//!
//! The encoder is our own code over our kernels, not candle-transformers' CLIP: dropping image tokens needs the
//! hidden states after its first layer and the class token's attention in its last, which that hides; and
//! candle's products would take every core from the engine, where ours run on the threads that they are given.

pub mod clip;
pub mod decode;
mod embeddings;
pub mod processor;
mod resize;

pub use embeddings::{ImageEmbeddings, PromptImage};

use crate::Result;
use processor::ImageProcessor;

/// Turns an image into rows for the decoder. It is a model of its own beside the decoder, with its own threads,
/// so that it may run while the decoder does.
pub trait ImageEncoder: Send + std::fmt::Debug {
    /// Rows `[tokens, hidden_size]` of the image `pixels`, `[3, side, side]` as the processor left them.
    ///
    /// # Errors
    /// [`crate::ZooError::Image`] when there are more or fewer pixels.
    fn encode(&mut self, pixels: &[f32]) -> Result<Vec<f32>>;

    /// Width of a row: the decoder's hidden size.
    fn hidden_size(&self) -> usize;

    /// Rows of an image.
    fn tokens_per_image(&self) -> usize;

    /// Bytes of weights held.
    fn weight_bytes(&self) -> usize;
}

/// What a model that sees has besides its decoder.
#[derive(Debug)]
pub struct Vision {
    /// Makes the encoder's input.
    pub processor: ImageProcessor,
    /// Makes the decoder's input.
    pub encoder: Box<dyn ImageEncoder>,
    /// Id of the token that stands for an image in a prompt, and is replaced by as many as it has rows.
    pub image_token: u32,
}
