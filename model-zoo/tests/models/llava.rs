//! A tiny LLaVA model and pictures of every kind, against Hugging Face transformers.
//!
//! `fixtures/make_images.py` made them and says with what.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use model_zoo::ZooError;
use model_zoo::loader::{LoadOptions, LoadedModel, load};
use model_zoo::step::LogitRows;
use model_zoo::vision::decode::decode;
use model_zoo::vision::processor::ImageProcessor;
use model_zoo::vision::{Encoding, ImageEmbeddings, PromptImage};
use serde_json::json;

use crate::support::{Chunk, Distance, Runner, fixtures};

const MAX_PIXELS: u64 = 1 << 20;

fn expected(folder: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(fixtures().join(folder).join("expected.safetensors"), &Device::Cpu)
        .unwrap()
}

fn largest_difference(found: &[f32], expected: &Tensor) -> f32 {
    let expected: Vec<f32> = expected.flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(found.len(), expected.len());
    found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn file(name: &str) -> Vec<u8> {
    std::fs::read(fixtures().join("images").join(name)).unwrap()
}

/// The embeddings of the fixture's picture.
fn embeddings(model: &mut LoadedModel) -> ImageEmbeddings {
    let vision = model.vision.as_mut().unwrap();
    let pixels = vision.processor.process(&decode(&file("rgb.png"), MAX_PIXELS).unwrap());
    let encoded = vision.encoder.encode(&pixels, Encoding::default()).unwrap();
    let (width, tokens) = (vision.encoder.hidden_size(), vision.encoder.tokens_per_image());
    assert_eq!((encoded.rows.len(), encoded.salience.len()), (tokens * width, tokens));
    ImageEmbeddings::of((width, tokens), encoded, [0; 32])
}

/// Compares a LLaVA folder with the fixture's expectations, in steps of several sizes.
#[track_caller]
fn check_llava(folder: &Path) {
    let expected = expected("llava");
    let tokens: Vec<u32> = expected["tokens"].to_dtype(DType::U32).unwrap().to_vec1().unwrap();
    for chunk in [tokens.len(), 7, 1] {
        let mut model = load(folder, &LoadOptions::default()).unwrap();
        let embeddings = Arc::new(embeddings(&mut model));
        let rows: Vec<f32> = (0..9).flat_map(|row| embeddings.row(row).unwrap().to_vec()).collect();
        let off = largest_difference(&rows, &expected["features"]);
        assert!(off < 2e-4, "features, whose standard deviation is 7, are off by {off}");

        let starts = (0..tokens.len()).filter(|&i| tokens[i] == 255 && tokens[i - 1] != 255);
        let mut runner = Runner::of(model.model, 1, tokens.len());
        let mut sequence = runner.sequence(tokens.len());
        sequence.images =
            starts.map(|start| PromptImage { start, embeddings: Arc::clone(&embeddings) }).collect();
        assert_eq!(sequence.images.len(), 2);
        let mut logits = Vec::new();
        for tokens in tokens.chunks(chunk) {
            let chunk = Chunk { sequence: &mut sequence, tokens, logits: LogitRows::All };
            logits.extend(runner.step(vec![chunk]).unwrap());
        }
        let truth: Vec<Vec<f32>> = expected["logits_f16_kv"].to_vec2().unwrap();
        let Distance { rms, largest } = Distance::between(&logits, &truth);
        println!("in chunks of {chunk}: off by {rms:.1e} (largest {largest:.1e})");
        assert!(rms < 1e-3 && largest < 1.5e-2, "in chunks of {chunk}: off by {rms} (largest {largest})");
    }
}

#[test]
fn a_llava_model_agrees_with_transformers() {
    check_llava(&fixtures().join("llava"));
}

/// The names that checkpoints of other versions of transformers have.
#[test]
fn every_spelling_of_a_llava_checkpoint_is_read() {
    let tensors =
        candle_core::safetensors::load(fixtures().join("llava/model.safetensors"), &Device::Cpu).unwrap();
    let spellings: [fn(&str) -> String; 2] = [
        |name| name.replace("vision_tower.", "vision_tower.vision_model."),
        |name| format!("model.{}", name.replace("language_model.model.", "language_model.")),
    ];
    for spelling in spellings {
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "preprocessor_config.json"] {
            std::fs::copy(fixtures().join("llava").join(name), folder.path().join(name)).unwrap();
        }
        let renamed: HashMap<_, _> = tensors.iter().map(|(name, t)| (spelling(name), t.clone())).collect();
        candle_core::safetensors::save(&renamed, folder.path().join("model.safetensors")).unwrap();
        check_llava(folder.path());
    }
}

#[test]
fn pictures_of_every_kind_are_processed_as_transformers_does() {
    let folder = tempfile::tempdir().unwrap();
    let exact = json!({"size": {"height": 40, "width": 40}, "do_center_crop": false, "resample": 2,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 1.0]});
    std::fs::write(folder.path().join("preprocessor_config.json"), exact.to_string()).unwrap();
    let processors = [
        ("clip", ImageProcessor::from_folder(&fixtures().join("llava"), 24).unwrap()),
        ("exact", ImageProcessor::from_folder(folder.path(), 40).unwrap()),
    ];
    let expected = expected("images");
    assert_eq!(expected.len(), 20, "ten pictures, two processors");
    for (key, expected) in &expected {
        let (kind, name) = key.split_once('/').unwrap();
        let (_, processor) = processors.iter().find(|(known, _)| *known == kind).unwrap();
        let found = processor.process(&decode(&file(name), MAX_PIXELS).unwrap());
        let off = largest_difference(&found, expected);
        println!("{key}: off by {off:.1e}");
        // Steps of 1/255 through the smallest deviation: decoders of lossy formats may round differently, and the
        // bilinear kernel puts some values of two pictures right between two steps.
        let lossy = name.ends_with(".jpg") || name == "lossy.webp";
        let between = matches!(key.as_str(), "exact/grey.png" | "exact/small.png");
        let steps = if lossy { 3.0 } else { f32::from(u8::from(between)) };
        assert!(off < steps * (1.0 / 255.0 / 0.25) + 1e-5, "{key} is off by {off}");
    }
}

/// A PNG's first chunk, which claims a size.
fn claims(width: u32, height: u32) -> Vec<u8> {
    let mut png = file("grey.png");
    png[16..20].copy_from_slice(&width.to_be_bytes());
    png[20..24].copy_from_slice(&height.to_be_bytes());
    let crc = crc32(&png[12..29]);
    png[29..33].copy_from_slice(&crc.to_be_bytes());
    png
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(
            crc ^ u32::from(byte),
            |crc, _| if crc & 1 == 1 { 0xEDB8_8320 ^ crc >> 1 } else { crc >> 1 },
        )
    })
}

#[test]
fn images_that_cannot_be_taken_are_refused_with_the_reason() {
    let truncated = |name: &str| {
        let bytes = file(name);
        bytes[..bytes.len() / 2].to_vec()
    };
    for (bytes, says) in [
        (Vec::new(), "not a PNG, JPEG or WebP"),
        (b"GIF89a\x01\x00\x01\x00".to_vec(), "not a PNG, JPEG or WebP"),
        (b"<svg xmlns=\"http://www.w3.org/2000/svg\"/>".to_vec(), "not a PNG, JPEG or WebP"),
        (claims(20_000, 20_000), "20000 × 20000 pixels"),
        (claims(1_048_577, 1), "1048577 × 1 pixels"),
        (claims(u32::MAX >> 1, u32::MAX >> 1), ""),
        (claims(0, 5), ""),
        (truncated("rgb.png"), "damaged"),
        (truncated("wide.webp"), "damaged"),
        (file("rgb.png")[..20].to_vec(), "damaged"),
        (file("turned.jpg")[..200].to_vec(), "damaged"),
    ] {
        let error = decode(&bytes, MAX_PIXELS).expect_err(says);
        assert!(matches!(error, ZooError::Image(_)) && error.to_string().contains(says), "{error}");
    }
    let error = decode(&file("rgb.png"), 1000).expect_err("too many pixels").to_string();
    assert!(error.contains("61 × 37") && error.contains("up to 1000"), "{error}");
}
