//! `rheostat calibrate`

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use model_zoo::calibrate::{Progress, Settings, Text, calibrate};
use model_zoo::compression::calibration::Source;
use model_zoo::loader::weights_sha256;
use sha2::{Digest, Sha256};

use super::model::ModelFlags;
use super::offer::artefact_path;
use crate::config::device::DeviceChoice;
use crate::telemetry::logs::{self, LogFormat};

/// `rheostat calibrate`'s flags.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    #[command(flatten)]
    model: ModelFlags,
    /// UTF-8 text like that which the model is to serve, 33 thousand tokens at least
    #[arg(long)]
    text: PathBuf,
    /// Where the artefact goes [default: beside the weights, where the server finds it]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Level of log lines
    #[arg(long, env = "RHEOSTAT_LOG", default_value = "info")]
    log: String,
}

/// Measures one model and writes its artefact.
pub(super) fn main(options: &Options) -> Result<(), String> {
    logs::init(&options.log, LogFormat::Text)?;
    let text = read_text(&options.text)?;
    let found = options.model.find()?;
    let (mut loaded, tokenizer) = options.model.load(&found, (DeviceChoice::Cpu, None))?;
    let tokens = tokenizer.encode(&text, false).map_err(|e| e.to_string())?;
    let source = Source {
        model: found.name.clone(),
        weights_sha256: weights_sha256(&found.path).map_err(|e| e.to_string())?,
        text: options.text.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
        text_sha256: Sha256::digest(&text).iter().map(|byte| format!("{byte:02x}")).collect(),
        tokens: 0,
    };
    let mut bar = Bar::default();
    let text = Text { tokens: &tokens, bos: tokenizer.special().bos };
    let calibration =
        calibrate(loaded.model.as_mut(), text, (&Settings::default(), source), &mut |progress| {
            bar.show(progress)
        })
        .map_err(|e| e.to_string())?;
    let out = options.out.clone().unwrap_or_else(|| artefact_path(&found.path));
    let artefact = calibration.to_toml().map_err(|e| e.to_string())?;
    std::fs::write(&out, artefact).map_err(|e| format!("{}: {e}", out.display()))?;
    println!("{}", out.display());
    Ok(())
}

/// A text file's content.
///
/// # Errors
/// The path and what is wrong with it.
pub(super) fn read_text(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}

/// A bar a stage on a terminal, a log line a stage elsewhere.
#[derive(Debug, Default)]
pub(super) struct Bar {
    bar: Option<(&'static str, ProgressBar)>,
}

impl Bar {
    pub(super) fn show(&mut self, Progress { stage, done, total }: Progress) {
        if self.bar.as_ref().is_none_or(|(shown, _)| *shown != stage) {
            self.bar = Some((stage, Self::start(stage, total)));
        }
        let Some((_, bar)) = &self.bar else { return };
        bar.set_position(done as u64);
        if done == total {
            bar.finish();
            tracing::info!(stage, parts = total, seconds = bar.elapsed().as_secs(), "measured");
        }
    }

    fn start(stage: &'static str, total: usize) -> ProgressBar {
        let bar = ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::hidden());
        if std::io::stderr().is_terminal() {
            bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}") {
            bar.set_style(style);
        }
        bar.set_message(stage);
        bar
    }
}
