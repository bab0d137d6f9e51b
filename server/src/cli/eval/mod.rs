//! `rheostat eval`

mod measure;
pub(super) mod plot;
mod report;

use std::path::PathBuf;

use model_zoo::compression::Offer;

use super::calibrate::{Bar, read_text};
use super::model::ModelFlags;
use super::{offer, plans};
use crate::config::device::DeviceChoice;
use crate::telemetry::logs::{self, LogFormat};

/// `rheostat eval`'s flags.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    #[command(flatten)]
    model: ModelFlags,
    /// UTF-8 text to score, not the one that the model was calibrated on
    #[arg(long)]
    text: PathBuf,
    /// TOML file with a table a plan: `[NAME]`, then what a request has under `compression` [default: a list of all methods]
    #[arg(long)]
    plans: Option<PathBuf>,
    /// Artefact of `rheostat calibrate` [default: the one beside the weights, else the shipped one]
    #[arg(long, env = "RHEOSTAT_CALIBRATION")]
    calibration: Option<PathBuf>,
    /// Folder for eval.json, eval.md and eval.png
    #[arg(long, default_value = "eval")]
    out: PathBuf,
    /// Windows of 1024 tokens to score, each with 512 tokens of prompt
    #[arg(long, default_value_t = 16)]
    windows: usize,
    /// Rounds of timed decoding
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Level of log lines
    #[arg(long, env = "RHEOSTAT_LOG", default_value = "info")]
    log: String,
}

/// Measures the plans and writes the three files.
pub(super) fn main(options: &Options) -> Result<(), String> {
    logs::init(&options.log, LogFormat::Text)?;
    let text = read_text(&options.text)?;
    let plans = plans::read(options.plans.as_deref(), include_str!("plans.toml"), "dense")?;
    let found = options.model.find()?;
    let (mut loaded, tokenizer) = options.model.load(&found, (DeviceChoice::Cpu, None))?;
    let dims = loaded.model.dims().clone();
    let calibration = offer::calibration(&found, options.calibration.as_deref(), &dims)?;
    let offer = offer::checked(Offer { calibration, ..Offer::default() }, &dims)?;
    let mut bar = Bar::default();
    let subject = measure::Subject { dims, offer: &offer, tokenizer: &tokenizer, text: &text };
    let settings = measure::Settings { windows: options.windows, rounds: options.rounds };
    let rows = measure::all(loaded.model.as_mut(), &subject, (&plans, &settings), &mut |progress| {
        bar.show(progress)
    })
    .map_err(|e| e.to_string())?;
    let title =
        format!("{} on {}", found.name, options.text.file_name().unwrap_or_default().to_string_lossy());
    std::fs::create_dir_all(&options.out).map_err(|e| format!("{}: {e}", options.out.display()))?;
    let table = report::markdown(&title, &rows);
    plans::write(&options.out, report::json(&title, &rows)?, &table)?;
    plot::front(&options.out.join("eval.png"), &title, &rows)?;
    println!("{table}");
    Ok(())
}
