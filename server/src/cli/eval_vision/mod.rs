//! `rheostat eval-vision`

mod answers;
mod plot;
mod report;
mod scenes;
mod timing;

use std::path::PathBuf;

use model_zoo::compression::Offer;

use super::calibrate::Bar;
use super::model::ModelFlags;
use super::plans;
use crate::config::device::DeviceChoice;
use crate::telemetry::logs::{self, LogFormat};

/// `rheostat eval-vision`'s flags.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    #[command(flatten)]
    model: ModelFlags,
    /// Folder with `questions.jsonl`, a line `{"image", "kind", "question", "answer"}` a question, and the images
    #[arg(long)]
    questions: PathBuf,
    /// TOML file with a table a plan: `[NAME]`, then what a request has under `compression` [default: 192, 64 and 128 tokens, by attention, pooled and drawn]
    #[arg(long)]
    plans: Option<PathBuf>,
    /// Folder for eval.json, eval.md, eval.png, and for answers.jsonl, from which a run that was cut off goes on
    #[arg(long, default_value = "eval-vision")]
    out: PathBuf,
    /// Images to ask about [default: all]
    #[arg(long)]
    images: Option<usize>,
    /// Questions whose prefill is timed, one an image; 0 keeps the times of the last run
    #[arg(long, default_value_t = 0)]
    timed: usize,
    /// Rounds of timed prefills, every plan in turn
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Level of log lines
    #[arg(long, env = "RHEOSTAT_LOG", default_value = "info")]
    log: String,
}

/// The plan without dropping.
const ALL: &str = "all";

/// Answers what is not answered yet, times what is asked for, and writes the three files.
pub(super) fn main(options: &Options) -> Result<(), String> {
    logs::init(&options.log, LogFormat::Text)?;
    let plans = plans::read(options.plans.as_deref(), include_str!("plans.toml"), ALL)?;
    let mut scenes = scenes::read(&options.questions)?;
    scenes.truncate(options.images.unwrap_or(usize::MAX));
    let found = options.model.find()?;
    let (mut loaded, tokenizer) = options.model.load(&found, (DeviceChoice::Cpu, None))?;
    let Some(vision) = loaded.vision.take() else {
        return Err(format!("{} does not see images", found.name));
    };
    std::fs::create_dir_all(&options.out).map_err(|e| format!("{}: {e}", options.out.display()))?;
    let dims = loaded.model.dims().clone();
    let offer = Offer::default();
    let mut asker = scenes::Asker::new((dims, &offer), (vision, &tokenizer), options.questions.clone());
    let mut bar = Bar::default();
    let path = options.out.join("answers.jsonl");
    let done = answers::run(loaded.model.as_mut(), &mut asker, (&scenes, &plans, &path), &mut |progress| {
        bar.show(progress);
    })?;
    let times = options.out.join("times.json");
    if options.timed > 0 {
        let load = timing::Load { questions: options.timed, rounds: options.rounds };
        timing::run(loaded.model.as_mut(), &mut asker, (&scenes, &plans, load), &times)?;
    }
    let rows = report::rows(&plans, &done, timing::read(&times)?);
    let title = format!("{} on {} images", found.name, scenes.len());
    let table = report::markdown(&title, &rows);
    plans::write(&options.out, report::json(&title, &rows)?, &table)?;
    plot::draw(&options.out.join("eval.png"), &title, &rows)?;
    println!("{table}");
    Ok(())
}
