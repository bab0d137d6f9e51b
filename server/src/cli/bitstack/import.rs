//! `rheostat bitstack import`

use std::path::PathBuf;

use model_zoo::compression::bitstack::artefact::{EXTENSION, Provenance};
use model_zoo::compression::bitstack::import::import;
use model_zoo::loader::weights_sha256;

/// `rheostat bitstack import`'s flags.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Folder of a decomposed model: config.json, safetensors, compression_config.json, tokenizer.json
    folder: PathBuf,
    /// Where the stack goes [default: beside the folder]
    #[arg(long)]
    out: Option<PathBuf>,
}

/// Makes a stack of one published checkpoint and says where it is.
pub(super) fn main(options: &Options) -> Result<(), String> {
    let folder = options.folder.canonicalize().map_err(|e| format!("{}: {e}", options.folder.display()))?;
    let provenance = Provenance {
        model: folder.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
        weights_sha256: weights_sha256(&folder).map_err(|e| e.to_string())?,
        ..Provenance::default()
    };
    let out = options.out.clone().unwrap_or_else(|| folder.with_extension(EXTENSION));
    import(&folder, provenance, &out).map_err(|e| e.to_string())?;
    println!("{}", out.display());
    Ok(())
}
