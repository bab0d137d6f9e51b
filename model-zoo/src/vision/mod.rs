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
pub mod merge;
pub mod processor;
mod resize;

pub use embeddings::{EncodedImage, ImageEmbeddings, PromptImage};

use sha2::{Digest, Sha256};

use crate::Result;
use processor::ImageProcessor;

/// Turns an image into rows for the decoder. It is a model of its own beside the decoder, with its own threads,
/// so that it may run while the decoder does.
pub trait ImageEncoder: Send + std::fmt::Debug {
    /// Encodes the image `pixels`, `[3, side, side]` as the processor left them.
    ///
    /// # Errors
    /// [`crate::ZooError::Image`] when there are more or fewer pixels.
    fn encode(&mut self, pixels: &[f32], encoding: Encoding) -> Result<EncodedImage>;

    /// Width of a row: the decoder's hidden size.
    fn hidden_size(&self) -> usize;

    /// Tokens of a prompt that an image takes, and its rows where nothing is merged.
    fn tokens_per_image(&self) -> usize;

    /// Bytes of weights held.
    fn weight_bytes(&self) -> usize;
}

/// How an image is encoded: what of a request changes its embeddings.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Encoding {
    /// Similarity from which neighbouring patches become one token (see [`merge`]); `None` keeps all.
    pub merge: Option<f32>,
}

impl Encoding {
    /// What identifies the embeddings of the image file of digest `file`, encoded so.
    #[must_use]
    pub fn digest(&self, file: [u8; 32]) -> [u8; 32] {
        let Some(threshold) = self.merge else { return file };
        Sha256::new()
            .chain_update(file)
            .chain_update(b"merge")
            .chain_update(threshold.to_le_bytes())
            .finalize()
            .into()
    }
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
