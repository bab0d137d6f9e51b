//! Questions about images, and their prompts.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use model_zoo::compression::{CompressionOptions, Context, Offer, registry};
use model_zoo::eval::vision::Question;
use model_zoo::models::ModelDims;
use model_zoo::tokenizer::{ChatInput, Tokenizer};
use model_zoo::vision::decode::decode;
use model_zoo::vision::{Encoding, ImageEmbeddings, Vision};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::cli::calibrate::read_text;
use crate::images::{ImageLimits, place};

/// Tokens of an answer at most.
pub(super) const ANSWER_TOKENS: usize = 12;

/// A question with its answer.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Asked {
    pub(super) kind: String,
    pub(super) question: String,
    pub(super) answer: String,
}

/// An image and what is asked about it.
#[derive(Debug, Clone)]
pub(super) struct Scene {
    pub(super) image: String,
    pub(super) asked: Vec<Asked>,
}

/// Reads `questions.jsonl` of a folder; questions about an image stand together.
///
/// # Errors
/// A sentence: which line is wrong.
pub(super) fn read(folder: &Path) -> Result<Vec<Scene>, String> {
    #[derive(Deserialize)]
    struct Line {
        image: String,
        #[serde(flatten)]
        asked: Asked,
    }
    let path = folder.join("questions.jsonl");
    let mut scenes: Vec<Scene> = Vec::new();
    for (number, line) in read_text(&path)?.lines().enumerate() {
        let Line { image, asked } =
            serde_json::from_str(line).map_err(|e| format!("{}:{}: {e}", path.display(), number + 1))?;
        match scenes.last_mut().filter(|scene| scene.image == image) {
            Some(scene) => scene.asked.push(asked),
            None => scenes.push(Scene { image, asked: vec![asked] }),
        }
    }
    Ok(scenes)
}

/// Turns scenes into prompts for plans. An image is encoded once for each way in which plans want it encoded.
pub(super) struct Asker<'a> {
    dims: ModelDims,
    offer: &'a Offer,
    vision: Vision,
    tokenizer: &'a Tokenizer,
    folder: PathBuf,
    encoded: HashMap<[u8; 32], Arc<ImageEmbeddings>>,
}

impl<'a> Asker<'a> {
    pub(super) fn new(
        (dims, offer): (ModelDims, &'a Offer),
        (vision, tokenizer): (Vision, &'a Tokenizer),
        folder: PathBuf,
    ) -> Self {
        Self { dims, offer, vision, tokenizer, folder, encoded: HashMap::new() }
    }

    pub(super) fn tokenizer(&self) -> &Tokenizer {
        self.tokenizer
    }

    /// The prompts of a scene's questions under a plan.
    ///
    /// # Errors
    /// A sentence: what cannot be read, or compiled.
    pub(super) fn questions(
        &mut self,
        scene: &Scene,
        options: &CompressionOptions,
    ) -> Result<Vec<Question>, String> {
        let encoding = registry::encoding(options, self.offer).map_err(|e| e.to_string())?;
        let image = self.embeddings(&scene.image, encoding)?;
        let image = registry::prepare(options, self.offer, vec![image]).map_err(|e| e.to_string())?;
        scene.asked.iter().map(|asked| self.question((&asked.question, &image), options)).collect()
    }

    fn question(
        &self,
        (question, image): (&str, &[Arc<ImageEmbeddings>]),
        options: &CompressionOptions,
    ) -> Result<Question, String> {
        let token = self.vision.image_token;
        let parts = serde_json::json!([{"type": "image"}, {"type": "text", "text": question}]);
        let chat = ChatInput {
            messages: vec![serde_json::json!({"role": "user", "content": parts})],
            tools: Vec::new(),
            template_args: serde_json::Map::new(),
            add_generation_prompt: true,
            image_marker: self.tokenizer.id_to_token(token),
        };
        let text = self.tokenizer.apply_chat_template(&chat).map_err(|e| e.to_string())?;
        let prompt = self.tokenizer.encode(&text, false).map_err(|e| e.to_string())?;
        let (tokens, images) = place(token, prompt, image).map_err(|e| e.message)?;
        let context = Context {
            num_layers: self.dims.num_layers,
            head_dim: self.dims.head_dim,
            prompt_len: tokens.len(),
            max_tokens: ANSWER_TOKENS,
            images: &images,
            offer: self.offer,
        };
        let plan = registry::compile(options, &context).map_err(|e| e.to_string())?;
        Ok(Question { tokens, images: images.to_vec(), plan })
    }

    fn embeddings(&mut self, image: &str, encoding: Encoding) -> Result<Arc<ImageEmbeddings>, String> {
        let path = self.folder.join(image);
        let failed = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
        let file = std::fs::read(&path).map_err(|e| failed(&e))?;
        let digest = encoding.digest(Sha256::digest(&file).into());
        if let Some(found) = self.encoded.get(&digest) {
            return Ok(Arc::clone(found));
        }
        let pixels = decode(&file, ImageLimits::default().max_pixels).map_err(|e| failed(&e))?;
        let pixels = self.vision.processor.process(&pixels);
        let encoder = &mut self.vision.encoder;
        let encoded = encoder.encode(&pixels, encoding).map_err(|e| failed(&e))?;
        let size = (encoder.hidden_size(), encoder.tokens_per_image());
        let embeddings = Arc::new(ImageEmbeddings::of(size, encoded, digest));
        self.encoded.insert(digest, Arc::clone(&embeddings));
        Ok(embeddings)
    }
}
