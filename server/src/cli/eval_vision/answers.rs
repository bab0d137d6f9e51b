//! Answers under every plan, kept in a file as they come, so that a run can be cut off and go on.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;

use indexmap::IndexMap;
use model_zoo::calibrate::Progress;
use model_zoo::compression::CompressionOptions;
use model_zoo::eval::Runner;
use model_zoo::eval::vision::answer;
use model_zoo::models::CausalLm;
use serde::{Deserialize, Serialize};

use super::scenes::{ANSWER_TOKENS, Asked, Asker, Scene};
use crate::cli::calibrate::read_text;

/// Tokens of a prompt with its answer at most.
pub(super) const CAPACITY: usize = 2048;

/// A line of the file: an image's questions under a plan.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Answered {
    plan: String,
    options: CompressionOptions,
    image: String,
    pub(super) answers: Vec<OneAnswer>,
}

/// One question's answer, and what its prompt cost.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct OneAnswer {
    pub(super) kind: String,
    pub(super) text: String,
    pub(super) right: bool,
    pub(super) kept: f64,
    pub(super) mean_kept: f64,
    pub(super) image_kv_bytes: f64,
    pub(super) flops: f64,
}

/// Answers, by plan, in the order of the plans.
pub(super) type Answers = IndexMap<String, Vec<OneAnswer>>;

/// Runs plan after plan over all scenes, but for what the file at `path` has already.
///
/// # Errors
/// A sentence; what was answered before is in the file.
pub(super) fn run(
    model: &mut dyn CausalLm,
    asker: &mut Asker<'_>,
    (scenes, plans, path): (&[Scene], &IndexMap<String, CompressionOptions>, &Path),
    progress: &mut dyn FnMut(Progress),
) -> Result<Answers, String> {
    let known = read(path, plans)?;
    let failed = |e: std::io::Error| format!("{}: {e}", path.display());
    let mut file = OpenOptions::new().create(true).append(true).open(path).map_err(failed)?;
    let mut runner = Runner::new(model, 1, CAPACITY).map_err(|e| e.to_string())?;
    let mut answers = Answers::new();
    for (plan_index, (plan, options)) in plans.iter().enumerate() {
        for (index, scene) in scenes.iter().enumerate() {
            let line = match known.get(&(plan.clone(), scene.image.clone())) {
                Some(line) => line.clone(),
                None => {
                    let answers = ask(&mut runner, asker, (scene, options))?;
                    let (plan, image) = (plan.clone(), scene.image.clone());
                    let line = Answered { plan, options: options.clone(), image, answers };
                    append(&mut file, &line).map_err(failed)?;
                    line
                }
            };
            answers.entry(plan.clone()).or_default().extend(line.answers);
            let (done, total) = (plan_index * scenes.len() + index + 1, plans.len() * scenes.len());
            progress(Progress { stage: "answers", done, total });
        }
    }
    Ok(answers)
}

fn ask(
    runner: &mut Runner<'_>,
    asker: &mut Asker<'_>,
    (scene, options): (&Scene, &CompressionOptions),
) -> Result<Vec<OneAnswer>, String> {
    let questions = asker.questions(scene, options)?;
    let ends = asker.tokenizer().special().eos.clone();
    let answers = answer(runner, &questions, (ANSWER_TOKENS, &ends)).map_err(|e| e.to_string())?;
    let one = |(Asked { kind, answer: truth, .. }, answer): (&Asked, model_zoo::eval::vision::Answer)| {
        let text = asker.tokenizer().decode(&answer.tokens, true).map_err(|e| e.to_string())?;
        let text = text.trim().to_owned();
        let cost = answer.cost;
        Ok(OneAnswer {
            kind: kind.clone(),
            right: text == *truth,
            text,
            kept: cost.kept,
            mean_kept: cost.mean_kept,
            image_kv_bytes: cost.image_kv_bytes,
            flops: cost.flops,
        })
    };
    scene.asked.iter().zip(answers).map(one).collect()
}

fn append(file: &mut File, line: &Answered) -> std::io::Result<()> {
    let mut text = serde_json::to_string(line)?;
    text.push('\n');
    file.write_all(text.as_bytes())
}

/// The lines of the file, by plan and image. A last line that was cut off is left out.
fn read(
    path: &Path,
    plans: &IndexMap<String, CompressionOptions>,
) -> Result<HashMap<(String, String), Answered>, String> {
    if !path.exists() {
        return Ok(HashMap::new());
    }
    let mut known = HashMap::new();
    let text = read_text(path)?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    if whole.len() + 1 < text.len() {
        // The next line has to begin on its own.
        std::fs::write(path, format!("{whole}\n").trim_start())
            .map_err(|e| format!("{}: {e}", path.display()))?;
    }
    for (number, line) in whole.lines().enumerate() {
        let place = || format!("{}:{}", path.display(), number + 1);
        let line: Answered = serde_json::from_str(line).map_err(|e| format!("{}: {e}", place()))?;
        match plans.get(&line.plan) {
            Some(options) if *options != line.options => {
                let plan = &line.plan;
                return Err(format!(
                    "{}: plan {plan:?} had other options: name it otherwise, or another --out",
                    place()
                ));
            }
            _ => drop(known.insert((line.plan.clone(), line.image.clone()), line)),
        }
    }
    Ok(known)
}
