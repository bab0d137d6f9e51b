//! The list of compression methods, in the order in which they are applied, and their compilation.

use std::sync::Arc;

use super::options::CompressionOptions;
use super::{Context, Offer, Plan, bitstack, drop, ffn_skip, must_drop, refuse, skip_decode, think};
use crate::Result;
use crate::vision::{Encoding, ImageEmbeddings};

/// The profile that every model has.
pub const DENSE: &str = "dense";

/// The name by which a request leaves the choice to the server. A server that has a front puts one of its points
/// in this name's place before it compiles.
pub const AUTO: &str = "auto";

/// Compiles `options` for the request that `context` describes. Methods apply in the order of
/// methods.md §0.4.
///
/// # Errors
/// [`crate::ZooError::Compression`] when the profile is unknown, an option does not fit the model, or two
/// options exclude each other.
pub fn compile(options: &CompressionOptions, context: &Context<'_>) -> Result<Plan> {
    let options = with_profile(options, context.offer)?;
    check_together(&options)?;
    let mut plan = Plan::dense(context.num_layers);
    plan.show(context.images);
    if let Some(options) = options.bitstack {
        bitstack::serve::apply(options, context, &mut plan)?;
    }
    if let Some(options) = &options.drop {
        drop::apply(options, context, &mut plan)?;
    }
    if let Some(options) = &options.vision {
        must_drop::apply(options, context, &mut plan)?;
    }
    if let Some(options) = &options.think {
        think::apply(options, context, &mut plan)?;
    }
    if let Some(options) = &options.skip_decode {
        skip_decode::apply(options, context, &mut plan)?;
    }
    if let Some(options) = &options.ffn_skip {
        ffn_skip::apply(options, context, &mut plan)?;
    }
    plan.seal_key();
    Ok(plan)
}

/// How the images of a request with these options are to be encoded.
///
/// # Errors
/// As [`compile`], when the profile is unknown or an option outside its range.
pub fn encoding(options: &CompressionOptions, offer: &Offer) -> Result<Encoding> {
    let options = with_profile(options, offer)?;
    options.vision.as_ref().map_or(Ok(Encoding::default()), must_drop::encoding)
}

/// What the decoder is to see of an image that was encoded as [`encoding`] says: all of it, or what a baseline keeps.
///
/// # Errors
/// As [`compile`], when the profile is unknown.
pub fn prepare(
    options: &CompressionOptions,
    offer: &Offer,
    images: Vec<Arc<ImageEmbeddings>>,
) -> Result<Vec<Arc<ImageEmbeddings>>> {
    let options = with_profile(options, offer)?;
    let prepared = |image| match &options.vision {
        Some(options) => must_drop::prepare(options, image),
        None => image,
    };
    Ok(images.into_iter().map(prepared).collect())
}

/// The options with what their profile adds; a profile takes nothing that another profile is.
fn with_profile(options: &CompressionOptions, offer: &Offer) -> Result<CompressionOptions> {
    let Some(name) = options.profile.as_deref().filter(|&name| name != DENSE) else {
        return Ok(options.clone());
    };
    if name == AUTO {
        return refuse(
            "compression.profile \"auto\" needs a calibrated front of this model; the operator makes one with `rheostat calibrate`, until then name a profile",
        );
    }
    let Some(profile) = offer.profile(name) else {
        let known = offer.profile_names();
        let known: Vec<_> = known.iter().map(|name| format!("\"{name}\"")).collect();
        return refuse(format!(
            "compression.profile \"{name}\" is not a profile of this model; it has {}",
            known.join(", ")
        ));
    };
    let mut merged = options.clone().or(profile);
    // What is asked for by name wins over what the profile brings along, where the two exclude each other.
    if options.ffn_skip.is_some() && options.skip_decode.is_none() {
        merged.skip_decode = None;
    }
    if options.skip_decode.is_some() && options.ffn_skip.is_none() {
        merged.ffn_skip = None;
    }
    if options.vision.is_some() && options.think.is_none() {
        merged.think = None;
    }
    if options.think.is_some() && options.vision.is_none() {
        merged.vision = None;
    }
    Ok(merged)
}

fn check_together(options: &CompressionOptions) -> Result<()> {
    let skips_ffn = options.ffn_skip.filter(|skip| skip.target != Some(0.0));
    if skips_ffn.is_some() && options.skip_decode.is_some() {
        return refuse(
            "compression.skip_decode and compression.ffn_skip exclude each other: both leave out work of the same tokens, and their thresholds were never measured together; send one of them",
        );
    }
    if options.vision.is_some() && options.think.is_some() {
        return refuse(
            "compression.think and compression.vision exclude each other: packed keys need a prompt that is as long in one layer as in another, and dropping image tokens makes it differ; send one of them",
        );
    }
    let drops = options.drop.is_some_and(|drop| drop.attention + drop.ffn + drop.joint > 0);
    if drops
        && skips_ffn.is_some_and(|skip| {
            skip.threshold.is_none() && skip.selection.unwrap_or_default() == Default::default()
        })
    {
        return refuse(
            "compression.drop and compression.ffn_skip together need compression.ffn_skip.threshold: the calibrated ones hold for the model without dropped layers",
        );
    }
    Ok(())
}
