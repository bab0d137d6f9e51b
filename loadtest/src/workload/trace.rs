//! Requests from a file: one JSON object a line.

use std::path::Path;
use std::time::Duration;

use serde::Deserialize;

/// One request of a trace. What it leaves out is drawn from the workload's distributions.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Seconds from the start at which the request is due.
    pub at: Option<f64>,
    /// The prompt itself.
    pub prompt: Option<String>,
    /// Else its length in tokens.
    pub prompt_tokens: Option<usize>,
    /// Tokens to generate.
    pub output_tokens: Option<usize>,
}

/// Reads a trace.
///
/// # Errors
/// The line that is wrong, and how.
pub fn read(path: &Path) -> Result<Vec<Entry>, String> {
    let fail = |what: String| format!("{}: {what}", path.display());
    let text = std::fs::read_to_string(path).map_err(|e| fail(e.to_string()))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let entries = lines
        .map(|(index, line)| entry(line).map_err(|what| fail(format!("line {}: {what}", index + 1))))
        .collect::<Result<Vec<_>, _>>()?;
    if entries.is_empty() {
        return Err(fail("the trace has no requests".into()));
    }
    let timed = entries.iter().filter(|entry| entry.at.is_some()).count();
    if timed != 0 && timed != entries.len() {
        return Err(fail("either every line has `at` or none has".into()));
    }
    Ok(entries)
}

fn entry(line: &str) -> Result<Entry, String> {
    let entry: Entry = serde_json::from_str(line).map_err(|e| e.to_string())?;
    if entry.at.is_some_and(|at| Duration::try_from_secs_f64(at).is_err()) {
        return Err("`at` must be a number of seconds, 0 or more".into());
    }
    Ok(entry)
}
