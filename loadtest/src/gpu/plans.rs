//! Plans beside the dense one.

use model_zoo::compression::options::{FfnSkip, Think};
use model_zoo::compression::{CompressionOptions, Plan};
use model_zoo::loader::Target;

use super::bench::{BLOCK_SIZE, Bench, Sizes, shown};
use super::shape::{SKIP_HORIZON, Shape};

/// Decode of one row by plans that leave work out: how much faster than dense, beside how many fewer bytes they read.
pub(super) fn compare(shape: &Shape, bench: &mut Bench, target: &Target) -> model_zoo::Result<()> {
    let dense = Plan::dense(shape.sizes.layers);
    let (seconds, _) = bench.decode(1, target)?;
    let bytes = |plan: &Plan, sizes: Sizes| {
        let first = sizes.context + sizes.warm;
        let all = (first..first + sizes.steps).map(|position| shape.bytes(plan, position));
        all.sum::<f64>() / sizes.steps as f64
    };
    let usual = bench.sizes;
    for (what, options) in shape.reductions() {
        // SkipDecode changes from token to token: all of its way is run.
        bench.sizes.steps =
            if options.skip_decode.is_some() { SKIP_HORIZON - usual.warm } else { usual.steps };
        bench.plan = shape.compile(&options, bench.sizes)?;
        let predicted = bytes(&dense, bench.sizes) / bytes(&bench.plan, bench.sizes);
        let (own, joules) = bench.decode_mean(target)?;
        let realised = seconds / own;
        let joules = shown(joules);
        let (name, ms, share) = (shape.name, 1e3 * own, realised / predicted);
        println!(
            "| {name} | {what}, one row | {ms:.3} ms, {realised:.3} of {predicted:.3} times as fast: {share:.3} | \
             {joules} | ≥ 0.9 |"
        );
    }
    (bench.plan, bench.sizes) = (dense, usual);
    Ok(())
}

/// Decode of one row that leaves out saturated FFNs, where all of them are: as many as the cap allows.
pub(super) fn skip_ffns(shape: &Shape, bench: &mut Bench, target: &Target) -> model_zoo::Result<()> {
    let (dense, _) = bench.decode(1, target)?;
    let skip = FfnSkip { target: Some(0.25), threshold: Some(-2.0), warmup: Some(0), ..FfnSkip::default() };
    let options = CompressionOptions { ffn_skip: Some(skip), ..CompressionOptions::default() };
    let plan = std::mem::replace(&mut bench.plan, shape.compile(&options, bench.sizes)?);
    let (seconds, joules) = bench.decode(1, target)?;
    bench.plan = plan;
    let tokens = (bench.sizes.warm + bench.sizes.steps) as f64;
    let left_out = bench.states[0].ffns_skipped as f64 / tokens;
    let whole = shape.bytes(&bench.plan, bench.sizes.context);
    let predicted = whole / (whole - left_out * 2.0 * (3 * shape.sizes.hidden * shape.sizes.ffn) as f64);
    let joules = shown(joules);
    let (name, ms, realised) = (shape.name, 1e3 * seconds, dense / seconds);
    let share = realised / predicted;
    println!(
        "| {name} | {left_out:.1} FFNs a token skipped as it goes, one row | {ms:.3} ms, {realised:.3} of {predicted:.3} \
         times as fast: {share:.3} | {joules} | |"
    );
    Ok(())
}

/// Decode of `batch` rows whose older keys are pruned, beside dense ones, and the pages that they take.
pub(super) fn prune_keys(
    shape: &Shape,
    (bench, batch): (&mut Bench, usize),
    target: &Target,
) -> model_zoo::Result<()> {
    let (dense, _) = bench.decode(batch, target)?;
    let pages = |bench: &Bench| bench.tables[batch - 1].iter().map(Vec::len).sum::<usize>() as f64;
    let all = pages(bench);
    let think = Think { ratio: Some(0.4), ..Think::default() };
    let options = CompressionOptions { think: Some(think), ..CompressionOptions::default() };
    let plan = std::mem::replace(&mut bench.plan, shape.compile(&options, bench.sizes)?);
    let (seconds, joules) = bench.decode(batch, target)?;
    bench.plan = plan;
    let joules = shown(joules);
    let (name, ms, ratio) = (shape.name, 1e3 * seconds, seconds / dense);
    // Of the sequence that has no room for a longer prompt, and without the room for tokens to come.
    let held = (bench.sizes.context.div_ceil(BLOCK_SIZE) * shape.sizes.layers) as f64;
    let more = held / (held - (all - pages(bench))) - 1.0;
    println!(
        "| {name} | ThinK 0.4, decode of {batch} | {ms:.3} ms, {ratio:.3} of dense; {:.1}% more sequences | {joules} | \
         ≤ 1, ≥ 18% |",
        100.0 * more
    );
    Ok(())
}
