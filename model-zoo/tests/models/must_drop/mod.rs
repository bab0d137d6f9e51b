//! Dropping image tokens, against masking them (methods.md §6 (e)). The kernel's truth is beside the kernel, merging
//! beside the encoder, and the selection rule beside the filter.

mod oracle;

use std::sync::Arc;

use model_zoo::compression::options::Vision;
use model_zoo::compression::{CompressionOptions, Context, Offer, Plan, registry};
use model_zoo::config::llava::LlavaConfig;
use model_zoo::step::LogitRows;
use model_zoo::vision::clip::ClipEncoder;
use model_zoo::vision::{EncodedImage, Encoding, ImageEmbeddings, ImageEncoder, PromptImage};
use model_zoo::weights::renamed::Renamed;
use model_zoo::weights::safetensors::SafetensorsCheckpoint;
use rand::{Rng, SeedableRng};

use crate::support::{Chunk, Distance, Runner, Sequence, fixtures};
use crate::tiny::{LAYERS, write};
use oracle::Oracle;

const TEXT: [u32; 5] = [5, 9, 200, 31, 7];
const QUESTION: [u32; 7] = [81, 14, 3, 99, 120, 44, 61];
const OUTPUT: usize = 6;

/// Text, an image of 30 tokens, text, one of 20 of which 12 have a row, a question.
struct Scene {
    tokens: Vec<u32>,
    images: Vec<PromptImage>,
}

fn scene() -> Scene {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(6);
    let mut image = |num_tokens: usize, places: Option<Vec<usize>>| {
        let rows = places.as_ref().map_or(num_tokens, Vec::len);
        let encoded = EncodedImage {
            rows: (0..64 * rows).map(|_| rng.random_range(-0.8..0.8)).collect(),
            places,
            salience: (0..rows).map(|_| rng.random_range(0.0..1.0)).collect(),
        };
        Arc::new(ImageEmbeddings::of((64, num_tokens), encoded, [num_tokens as u8; 32]))
    };
    let places = vec![0, 1, 4, 5, 6, 9, 11, 12, 13, 16, 18, 19];
    let (first, second) = (image(30, None), image(20, Some(places)));
    let mut tokens = TEXT.to_vec();
    let mut images = Vec::new();
    for (embeddings, after) in [(first, &QUESTION[..2]), (second, &QUESTION[2..])] {
        images.push(PromptImage { start: tokens.len(), embeddings: Arc::clone(&embeddings) });
        tokens.resize(tokens.len() + embeddings.num_tokens(), 0);
        tokens.extend(after);
    }
    Scene { tokens, images }
}

fn compile(scene: &Scene, vision: Option<Vision>) -> Plan {
    let options = CompressionOptions { vision, ..CompressionOptions::default() };
    let context = Context {
        num_layers: LAYERS,
        head_dim: 16,
        prompt_len: scene.tokens.len(),
        max_tokens: OUTPUT,
        images: &scene.images,
        offer: &Offer::default(),
    };
    registry::compile(&options, &context).unwrap()
}

/// Thresholds that drop tokens at all three filters.
fn thresholds() -> Vision {
    Vision {
        key_rate: Some(0.1),
        alpha: Some(0.05),
        beta: Some(0.05),
        layers: Some(vec![1, 2, 4]),
        ..Vision::default()
    }
}

struct Run {
    sequence: Sequence,
    runner: Runner,
    /// Of the prompt's last token and of each output token but the last.
    logits: Vec<Vec<f32>>,
    outputs: Vec<u32>,
}

fn run(folder: &std::path::Path, scene: &Scene, plan: &Plan) -> Run {
    let mut runner = Runner::new(folder, 1, scene.tokens.len() + OUTPUT);
    let mut sequence = runner.sequence_of(plan.clone(), scene.tokens.len() + OUTPUT);
    sequence.images = scene.images.clone();
    let (mut logits, mut outputs, mut next) = (Vec::new(), Vec::new(), scene.tokens.clone());
    while outputs.len() < OUTPUT {
        let chunk = Chunk { sequence: &mut sequence, tokens: &next, logits: LogitRows::Last };
        let one = runner.step(vec![chunk]).unwrap().remove(0);
        assert!(one.iter().all(|v| v.is_finite()), "something unwritten was read");
        let best = one.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as u32;
        logits.push(one);
        outputs.push(best);
        next = vec![best];
    }
    Run { sequence, runner, logits, outputs }
}

/// Inputs of the oracle: embeddings of tokens, rows of images, nothing where an image has none.
fn inputs(oracle: &Oracle, scene: &Scene, outputs: &[u32]) -> (Vec<Vec<f32>>, Vec<usize>) {
    let (mut rows, mut absent) = (Vec::new(), Vec::new());
    for (position, &token) in scene.tokens.iter().chain(outputs).enumerate() {
        let image = scene.images.iter().find(|image| image.range().contains(&position));
        rows.push(match image {
            None => oracle.embedding(token),
            Some(image) => image.embeddings.row(position - image.start).map_or_else(
                || {
                    absent.push(position);
                    vec![0.0; 64]
                },
                <[f32]>::to_vec,
            ),
        });
    }
    (rows, absent)
}

/// methods.md §6 (e) 7: gathering what goes on, and moving its KV, equals masking what does not, through the prompt and
/// every output token, with original positions; and what goes on is chosen alike.
#[test]
fn dropping_equals_masking() {
    let folder = write(|_| false);
    let oracle = Oracle::open(folder.path(), LAYERS);
    let scene = scene();
    let whole = run(folder.path(), &scene, &compile(&scene, None));
    for vision in [
        thresholds(),
        Vision { keep: Some(4), ..thresholds() },
        Vision { keep: Some(9), ..Vision::default() },
    ] {
        let plan = compile(&scene, Some(vision.clone()));
        let filter = plan.filter().unwrap();
        let found = run(folder.path(), &scene, &plan);
        let (rows, absent) = inputs(&oracle, &scene, &found.outputs[..OUTPUT - 1]);
        let prompt_len = scene.tokens.len();
        let (seen, last) = oracle.filtered(&rows[..prompt_len], &absent, filter);
        let outcome = found.sequence.state.visual.clone().unwrap();
        let is_visual = |token: &usize| scene.images.iter().any(|image| image.range().contains(token));
        let survivors: Vec<usize> = (0..prompt_len).filter(|&token| last[token]).filter(is_visual).collect();
        assert_eq!(outcome.survivors, survivors, "{vision:?}");
        assert!(survivors.len() < 42 && outcome.ran[0] == 42);
        let sees = |layer: usize, query: usize, key: usize| {
            key >= prompt_len || {
                let after = query >= prompt_len && filter.compacts(layer);
                if after { last[key] } else { seen[layer][key] }
            }
        };
        let truth = oracle.logits(&rows, prompt_len - 1, &sees);
        let Distance { rms, largest } = Distance::between(&found.logits, &truth);
        println!("{} of 42 tokens go on; off by {rms:.1e} (largest {largest:.1e})", survivors.len());
        assert!(rms < 1e-4 && largest < 1e-3, "off by {rms} (largest {largest}) with {vision:?}");
        let other = Distance::between(&found.logits[..1], &whole.logits[..1]);
        assert!(other.rms > 30.0 * rms, "dropping changes something: {other:?}");
    }
}

/// methods.md §6 (e) 6, and 5: which tokens' KV is held, layer by layer.
#[test]
fn kv_holds_what_the_stages_leave() {
    let folder = write(|_| false);
    let scene = scene();
    let text = TEXT.len() + QUESTION.len();
    let whole = run(folder.path(), &scene, &compile(&scene, None));
    for keep in [None, Some(4)] {
        let plan = compile(&scene, Some(Vision { keep, ..thresholds() }));
        let found = run(folder.path(), &scene, &plan);
        let outcome = found.sequence.state.visual.clone().unwrap();
        let kept = outcome.survivors.len();
        let slots = |layer| plan.kv_len(layer, scene.tokens.len(), &found.sequence.state);
        // Layers before the first filter keep every token, but under a cap.
        let first = text + if keep.is_some() { kept } else { 42 };
        assert_eq!(slots(0), first);
        assert!((1..LAYERS).all(|layer| slots(layer) == text + kept), "{outcome:?}");
        assert_eq!(outcome.ran[..2], [42, 42]);
        assert!(outcome.ran[2] < 42 && outcome.ran.is_sorted_by(|a, b| a >= b) && outcome.ran[5] == kept);
        if let Some(keep) = keep {
            assert!(kept <= 2 * keep && outcome.ran[2] <= 2 * 3 * keep);
        }
        // Up to the first filter layer the stream is that of the whole model: the KV of the tokens that are left is its.
        let is_visual = |token: &usize| scene.images.iter().any(|image| image.range().contains(token));
        let identities: Vec<usize> = (0..scene.tokens.len())
            .filter(|token| !is_visual(token) || outcome.survivors.contains(token))
            .collect();
        let present: Vec<usize> = (0..scene.tokens.len())
            .filter(|&token| {
                scene
                    .images
                    .iter()
                    .all(|i| !i.range().contains(&token) || i.embeddings.row(token - i.start).is_some())
            })
            .collect();
        let layers = if keep.is_some() { 0..2 } else { 1..2 };
        for layer in layers {
            for (slot, token) in identities.iter().enumerate() {
                let before = present.iter().position(|other| other == token).unwrap();
                assert_eq!(
                    kv(&found, layer, slot),
                    kv(&whole, layer, before),
                    "layer {layer}, token {token}"
                );
            }
        }
    }
}

/// K and V of a slot.
fn kv(run: &Run, layer: usize, slot: usize) -> Vec<u16> {
    let page = run.runner.kv.pages().page(run.sequence.block_tables[layer][slot / 16]);
    let keys = (0..32).map(|channel| page[channel * 16 + slot % 16]);
    let values = (0..32).map(|channel| page[512 + (channel / 16 * 16 + slot % 16) * 16 + channel % 16]);
    keys.chain(values).collect()
}

/// methods.md §6 (e) 2: only key tokens are left where nothing else may stay.
#[test]
fn alpha_1_and_a_large_beta_leave_the_key_tokens() {
    let folder = write(|_| false);
    let scene = scene();
    let plan = compile(&scene, Some(Vision { alpha: Some(1.0), beta: Some(1e9), ..thresholds() }));
    let found = run(folder.path(), &scene, &plan);
    let keys = plan.filter().unwrap().images.iter().flat_map(|image| {
        image.tokens.iter().zip(&image.keys).filter(|(_, rank)| rank.is_some()).map(|(&token, _)| token)
    });
    assert_eq!(found.sequence.state.visual.unwrap().survivors, keys.collect::<Vec<_>>());
}

#[test]
fn a_prompt_that_is_cut_is_an_error_and_not_another_answer() {
    let folder = write(|_| false);
    let scene = scene();
    let plan = compile(&scene, Some(thresholds()));
    let mut runner = Runner::new(folder.path(), 1, scene.tokens.len());
    let mut sequence = runner.sequence_of(plan, scene.tokens.len());
    sequence.images = scene.images.clone();
    let chunk = Chunk { sequence: &mut sequence, tokens: &scene.tokens[..40], logits: LogitRows::None };
    let error = runner.step(vec![chunk]).unwrap_err().to_string();
    assert!(error.contains("runs whole from 5"), "{error}");
}

/// methods.md §6 (e) 3 and 4 on the shipped encoder: what merging leaves, and what the class token looks at.
#[test]
fn the_shipped_encoder_merges_and_tells_what_matters() {
    let folder = fixtures().join("../../weights/smollm2-vision");
    let config = LlavaConfig::from_hf(&folder.join("config.json"), false).unwrap();
    let checkpoint = SafetensorsCheckpoint::open(&folder).unwrap();
    let mut encoder = ClipEncoder::load(&config, &Renamed::llava(&checkpoint), (576, 2)).unwrap();
    let grey = vec![0.1; 3 * 192 * 192];
    let whole = encoder.encode(&grey, Encoding::default()).unwrap();
    assert_eq!((whole.rows.len(), whole.salience.len(), &whole.places), (576 * 576, 576, &None));
    let total: f32 = whole.salience.iter().sum();
    assert!(total > 0.0 && total < 1.0, "what is left goes to the class token itself: {total}");
    let mut most = 577;
    for threshold in [1.1, 0.95, 0.8, -1.0] {
        let merged = encoder.encode(&grey, Encoding { merge: Some(threshold) }).unwrap();
        let places = merged.places.unwrap();
        assert_eq!(merged.rows.len(), 576 * places.len());
        assert_eq!(merged.salience.len(), places.len());
        assert!(places.len() <= most && places.len() >= 64 && (576 - places.len()).is_multiple_of(8));
        most = places.len();
        println!("{threshold}: {most} tokens");
    }
    assert_eq!(most, 64, "below every cosine all windows merge");
}
