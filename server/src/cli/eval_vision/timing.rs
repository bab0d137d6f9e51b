//! Prefill times, the plans in turn so that a drifting machine meets all of them alike.

use std::path::Path;
use std::time::Instant;

use indexmap::IndexMap;
use model_zoo::compression::CompressionOptions;
use model_zoo::eval::Runner;
use model_zoo::eval::vision::prefill;
use model_zoo::models::CausalLm;
use serde::{Deserialize, Serialize};

use super::answers::CAPACITY;
use super::scenes::{Asker, Scene};
use crate::cli::calibrate::read_text;

/// How much is timed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    pub(super) questions: usize,
    pub(super) rounds: usize,
}

/// One plan's prefill.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Prefill {
    /// Median time in milliseconds.
    pub(super) ms: f64,
    /// Time of the first plan ÷ this one's, for the same question in the same round: quartiles.
    pub(super) speedup: [f64; 3],
}

/// Times by plan.
pub(super) type Times = IndexMap<String, Prefill>;

/// Times the decoder's prefill of a question of each of the first scenes, and writes the times to `path`.
///
/// # Errors
/// A sentence.
pub(super) fn run(
    model: &mut dyn CausalLm,
    asker: &mut Asker<'_>,
    (scenes, plans, load): (&[Scene], &IndexMap<String, CompressionOptions>, Load),
    path: &Path,
) -> Result<(), String> {
    let mut runner = Runner::new(model, 1, CAPACITY).map_err(|e| e.to_string())?;
    let mut seconds = vec![Vec::new(); plans.len()];
    // The first round warms up.
    for round in 0..=load.rounds {
        for scene in scenes.iter().take(load.questions) {
            for (seconds, options) in seconds.iter_mut().zip(plans.values()) {
                let questions = asker.questions(scene, options)?;
                let Some(question) = questions.first() else { continue };
                let begin = Instant::now();
                prefill(&mut runner, question).map_err(|e| e.to_string())?;
                if round > 0 {
                    seconds.push(begin.elapsed().as_secs_f64());
                }
            }
        }
    }
    let mut times = Times::new();
    for (plan, own) in plans.keys().zip(&seconds) {
        let speedups = seconds[0].iter().zip(own).map(|(first, own)| first / own).collect();
        times.insert(
            plan.clone(),
            Prefill { ms: 1e3 * quartiles(own.clone())[1], speedup: quartiles(speedups) },
        );
    }
    let text = serde_json::to_string_pretty(&times).map_err(|e| e.to_string())?;
    std::fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
}

/// The times of the last run that measured any.
///
/// # Errors
/// A sentence, when there is a file that cannot be read.
pub(super) fn read(path: &Path) -> Result<Times, String> {
    if !path.exists() {
        return Ok(Times::new());
    }
    serde_json::from_str(&read_text(path)?).map_err(|e| format!("{}: {e}", path.display()))
}

fn quartiles(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    [1, 2, 3].map(|quarter| values.get(quarter * values.len() / 4).copied().unwrap_or(f64::NAN))
}
