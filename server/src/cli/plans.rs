//! What the measuring subcommands share: the plans that they read, and the files that they write.

use std::path::Path;

use indexmap::IndexMap;
use model_zoo::compression::CompressionOptions;

use super::calibrate::read_text;

/// The plans by name, in the order of the file at `path` or else of `built_in`, the whole model as `whole` before all.
///
/// # Errors
/// The file cannot be read, or is not of plans.
pub(super) fn read(
    path: Option<&Path>,
    built_in: &str,
    whole: &str,
) -> Result<IndexMap<String, CompressionOptions>, String> {
    let (text, origin) = match path {
        Some(path) => (read_text(path)?, path.display().to_string()),
        None => (built_in.to_owned(), "the built-in plans".to_owned()),
    };
    let given: IndexMap<String, CompressionOptions> =
        toml::from_str(&text).map_err(|e| format!("{origin}: {e}"))?;
    let mut plans = IndexMap::from([(whole.to_owned(), CompressionOptions::default())]);
    plans.extend(given.into_iter().filter(|(name, _)| name != whole));
    Ok(plans)
}

/// Writes `eval.json` and `eval.md` to `folder`.
///
/// # Errors
/// A file cannot be written.
pub(super) fn write(folder: &Path, json: String, table: &str) -> Result<(), String> {
    for (name, content) in [("eval.json", json.as_str()), ("eval.md", table)] {
        let path = folder.join(name);
        std::fs::write(&path, content).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(())
}
