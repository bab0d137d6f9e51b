//! Measuring a model once for the methods that need it: importance of sublayers, thresholds of FFN
//! skipping, the spread of key channels, and presets from the measured front of quality and work.
//!
//! The result depends on the model, the text and the instruction set alone: no clock, no random numbers.

mod front;
mod presets;
mod probe;

use crate::compression::calibration::{
    Calibration, FfnCalibration, FfnThreshold, Source, ThinkCalibration, VERSION,
};
use crate::compression::ffn_skip::default_max_skip;
use crate::compression::options::FfnSkip;
use crate::compression::{CompressionOptions, Context, Offer, Plan, Sublayer, registry};
use crate::eval::{Runner, Windows};
use crate::models::CausalLm;
use crate::{Result, ZooError};

/// Targets whose thresholds are searched.
const TARGETS: [f32; 8] = [0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6];
/// Halvings of the interval in which a threshold lies: cosines to 2⁻¹² of it.
const HALVINGS: usize = 12;

/// How much is measured.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Tokens of a window.
    pub window: usize,
    /// Of those, tokens that count as prompt where generation is measured.
    pub prompt: usize,
    /// Windows for similarities.
    pub similarity_windows: usize,
    /// Windows for each try of a threshold.
    pub threshold_windows: usize,
    /// Windows on which presets are chosen.
    pub preset_windows: usize,
}

impl Default for Settings {
    /// 33 thousand tokens in all.
    fn default() -> Self {
        Self { window: 512, prompt: 64, similarity_windows: 40, threshold_windows: 4, preset_windows: 16 }
    }
}

/// The text to calibrate on.
#[derive(Debug, Clone, Copy)]
pub struct Text<'a> {
    /// Its tokens.
    pub tokens: &'a [u32],
    /// Token that begins every window, if the model has one.
    pub bos: Option<u32>,
}

/// How far a stage is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What is being measured.
    pub stage: &'static str,
    /// Parts done.
    pub done: usize,
    /// Parts of the stage.
    pub total: usize,
}

/// Calibrates `model` on `text`.
///
/// # Errors
/// [`ZooError::Compression`] when the text is too short for `settings`; [`ZooError::Step`] when the
/// model fails.
pub fn calibrate(
    model: &mut dyn CausalLm,
    text: Text<'_>,
    (settings, source): (&Settings, Source),
    progress: &mut dyn FnMut(Progress),
) -> Result<Calibration> {
    let parts = Parts::of(text, settings)?;
    let dims = model.dims().clone();
    let mut runner = Runner::new(model, 1, settings.window)?;
    let mut measured = probe::Measured::new(&dims);
    let dense = Plan::dense(dims.num_layers);
    for (index, window) in parts.similarity.iter().enumerate() {
        runner.teach(&dense, &window, Some(&mut measured))?;
        progress(Progress { stage: "similarity", done: index + 1, total: settings.similarity_windows });
    }
    let ffn_similarity = measured.similarity(Sublayer::Ffn);
    let (first_layer, end_layer) = ffn_region(&ffn_similarity);
    let tokens = settings.window * settings.similarity_windows;
    let mut calibration = Calibration {
        version: VERSION,
        source: Source { tokens, ..source },
        attention_similarity: measured.similarity(Sublayer::Attention),
        ffn_similarity,
        ffn_skip: FfnCalibration { first_layer, end_layer, thresholds: Vec::new() },
        think: ThinkCalibration { kept_score: measured.kept_score() },
        profiles: Default::default(),
        front: Vec::new(),
        tried: Vec::new(),
    };
    let mut thresholds = Vec::new();
    for (index, target) in TARGETS.into_iter().enumerate() {
        let Some(found) = search(&mut runner, &parts.threshold, (target, &calibration))? else { break };
        thresholds.push(found);
        progress(Progress { stage: "thresholds", done: index + 1, total: TARGETS.len() });
    }
    calibration.ffn_skip.thresholds = thresholds;
    calibration.tried = presets::try_all(&mut runner, &parts.preset, (&dims, &calibration), progress)?;
    calibration.profiles = presets::choose(&calibration.tried);
    calibration.front = front::choose(&calibration.tried, &calibration.profiles);
    Ok(calibration)
}

/// The text's parts, one a stage.
struct Parts<'a> {
    similarity: Windows<'a>,
    threshold: Windows<'a>,
    preset: Windows<'a>,
}

impl<'a> Parts<'a> {
    fn of(text: Text<'a>, settings: &Settings) -> Result<Self> {
        let Settings { window, prompt, similarity_windows, threshold_windows, preset_windows } = *settings;
        let needed = window * (similarity_windows + threshold_windows + preset_windows);
        if text.tokens.len() < needed {
            return Err(ZooError::Compression(format!(
                "calibration needs a text of {needed} tokens, this one has {}: give a longer one, or measure fewer windows",
                text.tokens.len()
            )));
        }
        let (similarity, rest) = text.tokens.split_at(window * similarity_windows);
        let (threshold, preset) = rest.split_at(window * threshold_windows);
        let windows = |tokens, prompt, max| Windows { tokens, len: window, prompt, max, bos: text.bos };
        Ok(Self {
            similarity: windows(similarity, 0, similarity_windows),
            threshold: windows(threshold, prompt, threshold_windows),
            // Half is prompt, so that pruned keys make up much of what is attended to.
            preset: windows(preset, window / 2, preset_windows),
        })
    }
}

/// Layers whose FFNs may be skipped: not the first fifth, not the last, and of the few before it none
/// that turns the stream more than the region's middle does (methods.md §4c).
fn ffn_region(similarity: &[f64]) -> (usize, usize) {
    let layers = similarity.len();
    let first = layers.div_ceil(5);
    let mut end = layers.saturating_sub(2).max(first);
    let mut sorted = similarity[first..end].to_vec();
    sorted.sort_by(f64::total_cmp);
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or(0.0);
    while end > first && end + 4 > layers && similarity[end - 1] < median {
        end -= 1;
    }
    (first, end)
}

/// The context of a window whose tokens after the prompt count as generated.
fn context<'a>(runner: &Runner<'_>, windows: &Windows<'_>, offer: &'a Offer) -> Context<'a> {
    Context {
        num_layers: runner.num_layers(),
        head_dim: runner.head_dim(),
        prompt_len: windows.prompt,
        max_tokens: windows.len - windows.prompt,
        images: &[],
        offer,
    }
}

/// The threshold that comes nearest to skipping `target` of all FFNs, by halving: a higher threshold
/// never lets more be skipped by one token. `None` when no threshold reaches so far.
fn search(
    runner: &mut Runner<'_>,
    windows: &Windows<'_>,
    (target, calibration): (f32, &Calibration),
) -> Result<Option<FfnThreshold>> {
    let offer = Offer { calibration: Some(calibration.clone()), ..Offer::default() };
    let runner_layers = runner.num_layers();
    let mut reached = |threshold: f32| -> Result<f32> {
        let skip = FfnSkip {
            target: Some(target),
            threshold: Some(threshold),
            warmup: Some(0),
            ..FfnSkip::default()
        };
        let options = CompressionOptions { ffn_skip: Some(skip), ..CompressionOptions::default() };
        let plan = registry::compile(&options, &context(runner, windows, &offer))?;
        let (mut skipped, mut all) = (0, 0);
        for window in windows.iter() {
            skipped += runner.teach(&plan, &window, None)?.ffns_skipped;
            all += (windows.len - windows.prompt) * plan.num_layers();
        }
        Ok(skipped as f32 / all as f32)
    };
    let (mut low, mut high) = (0f32, 1f32);
    if reached(low)? < target {
        return Ok(None);
    }
    for _ in 0..HALVINGS {
        let middle = (low + high) / 2.0;
        *(if reached(middle)? >= target { &mut low } else { &mut high }) = middle;
    }
    let cold = calibration.ffn_region();
    let max_skip = default_max_skip(target, runner_layers, cold);
    Ok(Some(FfnThreshold { target, threshold: low, max_skip, reached: reached(low)? }))
}
