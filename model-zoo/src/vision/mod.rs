//! Images in prompts: an encoder turns each into embeddings that stand where tokens' embeddings would.

mod embeddings;

pub use embeddings::{ImageEmbeddings, PromptImage};
