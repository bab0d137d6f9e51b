//! What compression of computation gains in decode steps, beside what its closed form promises.
//!
//! The layers' time is separated from the rest of a step (embedding, logits, sampling) by a plan that drops
//! all that may be dropped: with T = H + L, and H + L·k of that plan, L = (T − T')/(1 − k).

use std::num::NonZeroUsize;
use std::path::Path;

use model_zoo::Result;
use model_zoo::compression::options::{DropLayers, FfnSkip, SkipDecode};
use model_zoo::compression::{Calibration, CompressionOptions, Context, Offer, Plan, calibration, registry};
use model_zoo::eval::Runner;
use model_zoo::eval::speed::{Load, Timing, decode};
use model_zoo::loader::{LoadOptions, load, weights_sha256};
use model_zoo::models::ModelDims;

const PROMPT: usize = 128;
const TOKENS: usize = 64;
const BATCHES: [usize; 2] = [1, 8];

/// A batch with its name.
struct Case {
    name: String,
    plans: Vec<Plan>,
}

/// Prints one JSON object a batch: realised and predicted speed-up of the layers' part, and of the whole.
///
/// # Errors
/// When the model cannot be loaded, has no shipped calibration, or a step fails.
pub(crate) fn measure(model: &Path, threads: Option<NonZeroUsize>, rounds: usize) -> Result<()> {
    let mut options = LoadOptions::default();
    options.threads = threads.unwrap_or(options.threads);
    let mut loaded = load(model, &options)?;
    let dims = loaded.model.dims().clone();
    let text = calibration::shipped("smollm2-135m").unwrap_or_default();
    let calibration = Calibration::parse(text, dims.num_layers, &weights_sha256(model)?)?;
    let offer = Offer { calibration: Some(calibration), ..Offer::default() };
    let prompt: Vec<u32> = (0..PROMPT).map(|i| (100 + i * 7919 % (dims.vocab_size - 200)) as u32).collect();
    for batch in BATCHES {
        let cases = cases(&dims, &offer, batch)?;
        let batches: Vec<_> = cases.iter().map(|case| case.plans.clone()).collect();
        let mut runner = Runner::new(loaded.model.as_mut(), batch, PROMPT + TOKENS)?;
        let load = Load { prompt: &prompt, tokens: TOKENS, rounds };
        let timings = decode(&mut runner, (&batches, load), |_, _| {})?;
        for (case, own) in cases.iter().zip(&timings).skip(2) {
            report(&format!("{} × {batch}", case.name), (&dims, batch), [&timings[0], &timings[1], own]);
        }
    }
    Ok(())
}

/// Dense, all dropped, then what is measured.
fn cases(dims: &ModelDims, offer: &Offer, batch: usize) -> Result<Vec<Case>> {
    let layers = dims.num_layers;
    let off = CompressionOptions::default;
    let drop = |attention, joint| Some(DropLayers { attention, ffn: 0, joint });
    let skip = SkipDecode { min_layers: Some(layers / 2), horizon: Some(TOKENS), ..SkipDecode::default() };
    let ffn = FfnSkip { target: Some(0.25), warmup: Some(0), ..FfnSkip::default() };
    let methods = [
        ("drop 8 attention", CompressionOptions { drop: drop(8, 0), ..off() }),
        ("skip_decode 0.75", CompressionOptions { skip_decode: Some(skip), ..off() }),
        ("ffn_skip 0.25", CompressionOptions { ffn_skip: Some(ffn), ..off() }),
    ];
    let compile = |options: &CompressionOptions| {
        let context = Context {
            num_layers: layers,
            head_dim: dims.head_dim,
            prompt_len: PROMPT,
            max_tokens: TOKENS,
            images: &[],
            offer,
        };
        registry::compile(options, &context)
    };
    let least = CompressionOptions { drop: drop(0, 2 * (layers - 2)), ..off() };
    let mut cases = vec![
        Case { name: "dense".into(), plans: vec![Plan::dense(layers); batch] },
        Case { name: "least".into(), plans: vec![compile(&least)?; batch] },
        // Against itself: what the figures' noise is.
        Case { name: "dense again".into(), plans: vec![Plan::dense(layers); batch] },
    ];
    let mut compiled = vec![Plan::dense(layers)];
    for (name, options) in &methods {
        let plan = compile(options)?;
        cases.push(Case { name: (*name).into(), plans: vec![plan.clone(); batch] });
        compiled.push(plan);
    }
    if batch > 1 {
        let plans = compiled.iter().cycle().take(batch).cloned().collect();
        cases.push(Case { name: "all four mixed".into(), plans });
    }
    Ok(cases)
}

fn report(what: &str, (dims, batch): (&ModelDims, usize), [dense, least, own]: [&Vec<Timing>; 3]) {
    let [attention, ffn] = dims.sublayer_weights.map(|weights| weights as f64);
    let all = (batch * TOKENS * dims.num_layers) as f64 * (attention + ffn);
    let cost = |timing: &Timing| {
        let [a, f] = timing.sublayers_run.map(|count| count as f64);
        (a * attention + f * ffn) / all
    };
    let mut realised = Vec::new();
    let mut whole = Vec::new();
    for ((dense, least), own) in dense.iter().zip(least).zip(own) {
        let layers = (dense.seconds - least.seconds) / (1.0 - cost(least));
        let rest = dense.seconds - layers;
        realised.push(layers / (own.seconds - rest));
        whole.push(dense.seconds / own.seconds);
    }
    let predicted = own.first().map_or(f64::NAN, |timing| 1.0 / cost(timing));
    let round = |x: f64| (x * 1000.0).round() / 1000.0;
    let [low, middle, high] = quartiles(realised).map(|speedup| round(speedup / predicted));
    println!(
        "{}",
        serde_json::json!({
            "what": what,
            "predicted": round(predicted),
            "realised_over_predicted": middle,
            "quartiles": [low, high],
            "whole_step_speedup": round(quartiles(whole)[1]),
        })
    );
}

/// Lower quartile, median, upper quartile.
fn quartiles(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values.get((share * values.len() as f64) as usize).copied().unwrap_or(f64::NAN);
    [at(0.25), at(0.5), at(0.75)]
}
