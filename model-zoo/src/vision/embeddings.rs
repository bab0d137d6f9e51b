//! What an encoder made of an image, and its place in a prompt.

use std::sync::Arc;

/// An image as the decoder sees it: one row for each of its tokens. Immutable, and shared between the
/// requests that show the same image.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageEmbeddings {
    hidden_size: usize,
    /// `[num_tokens, hidden_size]`
    rows: Vec<f32>,
    digest: [u8; 32],
}

impl ImageEmbeddings {
    /// Embeddings `rows`, `[num_tokens, hidden_size]`. `digest` is the SHA-256 of everything that they come
    /// from: images of equal digests are interchangeable.
    ///
    /// # Panics
    /// When `rows` is not a whole number of rows.
    pub fn new(hidden_size: usize, rows: Vec<f32>, digest: [u8; 32]) -> Self {
        assert!(rows.len().is_multiple_of(hidden_size), "invariant: whole rows");
        Self { hidden_size, rows, digest }
    }

    /// Width of a row.
    pub fn hidden_size(&self) -> usize {
        self.hidden_size
    }

    /// Tokens of a prompt that the image takes.
    pub fn num_tokens(&self) -> usize {
        self.rows.len() / self.hidden_size
    }

    /// Row `index`, `[hidden_size]`, if there is one.
    pub fn row(&self, index: usize) -> Option<&[f32]> {
        self.rows.chunks_exact(self.hidden_size).nth(index)
    }

    /// SHA-256 of everything that the embeddings come from.
    pub fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        4 * self.rows.len()
    }
}

/// An image at its place in a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptImage {
    /// Index in the prompt of its first token.
    pub start: usize,
    /// What stands there.
    pub embeddings: Arc<ImageEmbeddings>,
}

impl PromptImage {
    /// The row that one of `images`, in order of their place, puts at token `index` of the prompt.
    pub fn row(images: &[Self], index: usize) -> Option<&[f32]> {
        let after = images.partition_point(|image| image.start <= index);
        let image = &images[after.checked_sub(1)?];
        image.embeddings.row(index - image.start)
    }
}
