//! A run as JSON, Markdown and a plot.

mod markdown;
mod plot;

use std::path::Path;

pub use markdown::markdown;

use crate::run::Report;

/// Writes load.json, load.md and load.png into `folder`.
///
/// # Errors
/// The file that cannot be written, and why.
pub fn write(folder: &Path, report: &Report) -> Result<(), String> {
    std::fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let write = |name: &str, content: String| {
        let path = folder.join(name);
        std::fs::write(&path, content).map_err(|e| format!("{}: {e}", path.display()))
    };
    write("load.json", serde_json::to_string_pretty(report).map_err(|e| e.to_string())?)?;
    write("load.md", markdown(report))?;
    plot::draw(&folder.join("load.png"), report)
}
