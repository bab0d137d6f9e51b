//! MustDrop (arXiv 2411.10803; methods.md §6): image tokens that nobody looks at are dropped.
//!
//! **What it changes.** *Stage 1*, in the encoder: after its first layer, neighbouring patches that look alike become
//! one token ([`crate::vision::merge`]), and the tokens that its class token looks at most are *key tokens*, which are
//! never dropped. *Stage 2*, while the prompt is computed: after the attention of a few decoder layers, a token goes on
//! only if it is a key token, if its share of what the text after the image looks at reaches `alpha`, or if some text
//! token looks at it with at least `beta` ([`filter`]). *Stage 3*, when the prompt is computed: the KV of the layers
//! between the filters keeps the tokens that went on to the end. Every token keeps the position that it has in the
//! prompt. `keep` is a hard cap, ours and not the paper's: at the first filter layer at most three times as many tokens
//! of an image go on, at the second one and a half times as many, from the third on `keep`, and stage 3 then covers the
//! layers before the first filter too. Within the cap, key tokens take at most half of the places, and the text's
//! attention chooses the others.
//!
//! **What it really saves.** Layers after a filter run for the tokens that go on, so prefill is faster in proportion;
//! KV pages are freed when the prompt is computed, and every decode step reads less. All of it is per row, whatever
//! else is in the batch. Not saved: the encoder; the layers up to the first filter; pages that the prompt holds until
//! it is computed. What depends on the question (stages 2 and 3) is not shared by the prefix cache: an image with two
//! questions is prefilled twice; the text before it is shared as ever. Nor is it cut into chunks: all that comes after
//! the first image's beginning runs in one step, up to [`MAX_WHOLE`] tokens.
//!
//! **Knobs** ([`Vision`]): `keep` 1 or more; `merge` from 0, above 1 is off; `key_rate` and `alpha` 0 to 1; `beta` from
//! 0; `layers` ascending, empty turns stages 2 and 3 off. `baseline` keeps `keep` tokens without looking instead, before
//! the first layer: `pool` (means over a grid) and `random` (drawn by `seed`); those need no whole prompt and are
//! shared by the prefix cache.
//!
//! **Cannot be combined** with `think`, whose packed prefix has one length in all layers; nor, at a filter layer, with
//! dropped attention, which there is nothing to read from.

mod baseline;
pub mod filter;
pub mod step;

use std::sync::Arc;

use super::options::Vision;
use super::{Context, Plan, Sublayer, refuse};
use crate::vision::{Encoding, ImageEmbeddings};
use crate::{Result, ZooError};
use filter::{FilteredImage, VisualFilter};

/// Tokens from the first image's beginning to the prompt's end that run in one step at most: bounds the memory of its
/// activations.
pub const MAX_WHOLE: usize = 4096;

const MERGE: f32 = 0.8;
const KEY_RATE: f32 = 0.08;
const ALPHA: f32 = 0.001;
const BETA: f32 = 0.001;
/// The published filter layers, of [`PUBLISHED_DEPTH`].
const LAYERS: [usize; 4] = [2, 6, 10, 14];
const PUBLISHED_DEPTH: usize = 32;

/// How the encoder has to encode the images of a request with these options.
///
/// # Errors
/// [`ZooError::Compression`] for an option outside its range.
pub(super) fn encoding(options: &Vision) -> Result<Encoding> {
    check(options, usize::MAX)?;
    // No cosine is above 1: the threshold only stands for "off" there.
    Ok(Encoding { merge: merge(options).filter(|&threshold| threshold <= 1.0) })
}

/// The threshold of merging. Under a cap, merging saves little and costs answers, and is off unless it is asked for.
fn merge(options: &Vision) -> Option<f32> {
    let is_free = options.keep.is_none() && options.baseline.is_none();
    options.merge.or(is_free.then_some(MERGE))
}

/// What the decoder is to see of an image: what a baseline keeps of it, or all of it.
pub(super) fn prepare(options: &Vision, image: Arc<ImageEmbeddings>) -> Arc<ImageEmbeddings> {
    match (options.baseline, options.keep) {
        (Some(baseline), Some(keep)) if keep < image.num_rows() => {
            Arc::new(baseline::kept(baseline, &image, (keep, options.seed.unwrap_or(0))))
        }
        _ => image,
    }
}

/// Sets what `plan` drops of the request's images.
///
/// # Errors
/// [`ZooError::Compression`] for an option outside its range or of no use, and for a prompt that is too long to be
/// run whole.
pub(super) fn apply(options: &Vision, context: &Context<'_>, plan: &mut Plan) -> Result<()> {
    check(options, context.num_layers)?;
    let filled = if options.baseline.is_some() {
        Vision { seed: Some(options.seed.unwrap_or(0)), ..options.clone() }
    } else {
        Vision {
            merge: merge(options),
            key_rate: Some(options.key_rate.unwrap_or(KEY_RATE)),
            alpha: Some(options.alpha.unwrap_or(ALPHA)),
            beta: Some(options.beta.unwrap_or(BETA)),
            layers: Some(options.layers.clone().unwrap_or_else(|| default_layers(context.num_layers))),
            ..options.clone()
        }
    };
    let layers = filled.layers.clone().unwrap_or_default();
    if let (Some(first), false) = (context.images.first(), layers.is_empty()) {
        check_layers(&layers, plan)?;
        let filter = VisualFilter {
            first: first.start,
            prompt_len: context.prompt_len,
            images: images(&filled, context)?,
            alpha: filled.alpha.unwrap_or(ALPHA),
            beta: filled.beta.unwrap_or(BETA),
            keep: filled.keep,
            layers,
        };
        let whole = filter.prompt_len - filter.first;
        if whole > MAX_WHOLE {
            return refuse(format!(
                "compression.vision runs a prompt whole from its first image on, which are {whole} tokens here; {MAX_WHOLE} are possible: show fewer images, put long text before them, or send `layers: []` or a baseline"
            ));
        }
        plan.share_at_most(filter.first);
        plan.set_filter(Arc::new(filter));
    }
    plan.options_mut().vision = Some(filled);
    Ok(())
}

/// The images as the filter sees them, with their key tokens.
fn images(options: &Vision, context: &Context<'_>) -> Result<Vec<FilteredImage>> {
    let rate = options.key_rate.unwrap_or(KEY_RATE);
    let of = |image: &crate::vision::PromptImage| {
        let embeddings = &image.embeddings;
        let salience = &embeddings.encoded().salience;
        if salience.is_empty() && rate > 0.0 {
            return refuse(
                "compression.vision.key_rate needs the attention of the encoder's class token, which this model's checkpoint does not tell; send key_rate 0",
            );
        }
        let tokens: Vec<usize> = embeddings.places().map(|place| image.start + place).collect();
        let num_keys = (rate * tokens.len() as f32).ceil() as usize;
        let mut order: Vec<usize> = (0..tokens.len()).collect();
        if num_keys > 0 {
            order.sort_by(|&a, &b| salience[b].total_cmp(&salience[a]).then(a.cmp(&b)));
        }
        // `[tokens]`: their rank among the key tokens.
        let mut ranks = vec![None; tokens.len()];
        order.iter().take(num_keys).enumerate().for_each(|(rank, &token)| ranks[token] = Some(rank));
        Ok(FilteredImage { range: image.range(), tokens, keys: ranks })
    };
    context.images.iter().map(of).collect()
}

fn default_layers(num_layers: usize) -> Vec<usize> {
    let scaled = |layer: usize| (layer * num_layers + PUBLISHED_DEPTH / 2) / PUBLISHED_DEPTH;
    let mut layers: Vec<usize> = LAYERS.iter().map(|&layer| scaled(layer)).collect();
    layers.dedup();
    // The last layer's filter would find nothing left to save.
    layers.retain(|&layer| layer + 1 < num_layers);
    layers
}

fn check(options: &Vision, num_layers: usize) -> Result<()> {
    let Vision { keep, baseline, seed, merge, key_rate, alpha, beta, layers } = options;
    if *keep == Some(0) {
        return refuse("compression.vision.keep must be at least 1");
    }
    match (baseline, keep) {
        (Some(_), None) => return refuse("compression.vision.baseline needs compression.vision.keep"),
        (Some(_), Some(_)) => {
            let others =
                [merge, key_rate, alpha, beta].iter().any(|option| option.is_some()) || layers.is_some();
            if others {
                return refuse(
                    "compression.vision.baseline keeps tokens without looking at them: of the other options it takes `keep` and `seed` only",
                );
            }
        }
        (None, _) if seed.is_some() => {
            return refuse("compression.vision.seed belongs to the baseline `random`");
        }
        (None, _) => {}
    }
    for (name, value, most) in [
        ("merge", merge, f32::MAX),
        ("key_rate", key_rate, 1.0),
        ("alpha", alpha, 1.0),
        ("beta", beta, f32::MAX),
    ] {
        if let Some(value) = value.filter(|value| !(0.0..=most).contains(value)) {
            let range = if most > 1.0 { "0 or more".to_owned() } else { format!("from 0 to {most}") };
            return refuse(format!("compression.vision.{name} must be {range}, got {value}"));
        }
    }
    let layers = layers.as_deref().unwrap_or(&[]);
    if !layers.is_sorted_by(|a, b| a < b) || layers.last().is_some_and(|&last| last >= num_layers) {
        return refuse(format!(
            "compression.vision.layers must ascend and be layers of the model, 0 to {}, got {layers:?}",
            num_layers - 1
        ));
    }
    Ok(())
}

/// Refuses filter layers whose attention never runs.
fn check_layers(layers: &[usize], plan: &Plan) -> Result<()> {
    match layers.iter().find(|&&layer| !plan.runs(layer, Sublayer::Attention, 0)) {
        None => Ok(()),
        Some(layer) => Err(ZooError::Compression(format!(
            "compression.vision looks at the attention of layer {layer}, which compression.drop leaves out; name other layers in compression.vision.layers, or drop less attention"
        ))),
    }
}

#[cfg(test)]
mod tests;
