//! What an encoder made of an image, and its place in a prompt.

use std::sync::Arc;

/// What an encoder makes of an image.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EncodedImage {
    /// `[rows, hidden_size]`
    pub rows: Vec<f32>,
    /// `[rows]`: at which of the image's tokens each row stands, ascending; `None` where each has its own.
    pub places: Option<Vec<usize>>,
    /// `[rows]`: how much the encoder's class token looks at each; empty where that is not known.
    pub salience: Vec<f32>,
}

/// An image as the decoder sees it: rows at some or all of its tokens. Immutable, and shared between the
/// requests that show the same image.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageEmbeddings {
    hidden_size: usize,
    num_tokens: usize,
    encoded: EncodedImage,
    digest: [u8; 32],
}

impl ImageEmbeddings {
    /// Embeddings `rows`, `[num_tokens, hidden_size]`, one for each token. `digest` is the SHA-256 of everything that
    /// they come from: images of equal digests are interchangeable.
    ///
    /// # Panics
    /// When `rows` is not a whole number of rows.
    pub fn new(hidden_size: usize, rows: Vec<f32>, digest: [u8; 32]) -> Self {
        let num_tokens = rows.len() / hidden_size;
        Self::of((hidden_size, num_tokens), EncodedImage { rows, ..EncodedImage::default() }, digest)
    }

    /// What an encoder made of an image that takes `num_tokens` tokens of a prompt. Tokens without a row run nowhere.
    ///
    /// # Panics
    /// When there is not a row for each place, or places do not ascend within the image.
    pub fn of((hidden_size, num_tokens): (usize, usize), encoded: EncodedImage, digest: [u8; 32]) -> Self {
        assert!(encoded.rows.len().is_multiple_of(hidden_size), "invariant: whole rows");
        let num_rows = encoded.rows.len() / hidden_size;
        match &encoded.places {
            None => assert_eq!(num_rows, num_tokens, "invariant: a row for each token"),
            Some(places) => {
                assert_eq!(num_rows, places.len(), "invariant: a row for each place");
                assert!(places.is_sorted_by(|a, b| a < b), "invariant: places ascend");
                assert!(
                    places.last().is_none_or(|&last| last < num_tokens),
                    "invariant: places lie in the image"
                );
            }
        }
        Self { hidden_size, num_tokens, encoded, digest }
    }

    /// Width of a row.
    pub fn hidden_size(&self) -> usize {
        self.hidden_size
    }

    /// Tokens of a prompt that the image takes.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// Rows: tokens that run.
    pub fn num_rows(&self) -> usize {
        self.encoded.rows.len() / self.hidden_size
    }

    /// The rows, where they stand, and how much the encoder looked at them.
    pub fn encoded(&self) -> &EncodedImage {
        &self.encoded
    }

    /// Tokens of the image that have a row, ascending.
    pub fn places(&self) -> impl Iterator<Item = usize> {
        let all = if self.encoded.places.is_none() { 0..self.num_tokens } else { 0..0 };
        all.chain(self.encoded.places.iter().flatten().copied())
    }

    /// Whether every token has a row.
    pub fn is_whole(&self) -> bool {
        self.num_rows() == self.num_tokens
    }

    /// The row at token `index` of the image, `[hidden_size]`, if it has one.
    pub fn row(&self, index: usize) -> Option<&[f32]> {
        let row = match &self.encoded.places {
            None => index,
            Some(places) => places.binary_search(&index).ok()?,
        };
        self.encoded.rows.get(row * self.hidden_size..(row + 1) * self.hidden_size)
    }

    /// SHA-256 of everything that the embeddings come from.
    pub fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let EncodedImage { rows, places, salience } = &self.encoded;
        4 * (rows.len() + salience.len()) + 8 * places.as_ref().map_or(0, Vec::len)
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

    /// Tokens of the prompt that the image takes.
    pub fn range(&self) -> std::ops::Range<usize> {
        self.start..self.start + self.embeddings.num_tokens()
    }
}
