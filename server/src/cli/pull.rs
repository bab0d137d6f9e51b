//! `rheostat pull`

use std::path::PathBuf;

use super::model::{catalogue, pull_options};
use crate::telemetry::logs::{self, LogFormat};

/// `rheostat pull`'s flags.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Name in the catalogue
    name: String,
    /// Folder for pulled models [default: the user's cache folder]
    #[arg(long, env = "RHEOSTAT_CACHE")]
    cache: Option<PathBuf>,
    /// TOML file with further catalogue entries
    #[arg(long, env = "RHEOSTAT_CATALOGUE")]
    catalogue: Option<PathBuf>,
    /// Level of log lines
    #[arg(long, env = "RHEOSTAT_LOG", default_value = "info")]
    log: String,
}

/// Pulls one model and says where it is.
pub(super) fn main(options: &Options) -> Result<(), String> {
    logs::init(&options.log, LogFormat::Text)?;
    let catalogue = catalogue(options.catalogue.as_deref())?;
    let entry = catalogue.get(&options.name).map_err(|e| e.to_string())?;
    let pull = pull_options(options.cache.clone());
    let path = model_zoo::catalogue::pull(entry, &pull).map_err(|e| e.to_string())?;
    println!("{}", path.display());
    Ok(())
}
