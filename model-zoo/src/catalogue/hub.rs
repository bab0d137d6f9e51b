//! Models of the Hugging Face hub, through its own client, which resumes partial files and checks sizes.

use std::fs;
use std::path::{Path, PathBuf};

use hf_hub::api::sync::ApiBuilder;
use hf_hub::{Repo, RepoType};

use super::Entry;
use super::install::{PullOptions, Staged, copy_verified, failure};
use crate::{Result, ZooError};

/// Downloads the repository's files and stages the one file, or the folder of them.
pub(super) fn fetch(
    (repo, revision, files): (&str, &str, &[String]),
    entry: &Entry,
    staging: &Path,
    options: &PullOptions,
) -> Result<Staged> {
    let mut builder = ApiBuilder::from_env()
        .with_cache_dir(staging.join("hub"))
        .with_progress(options.progress)
        .with_retries(3);
    if let Some(endpoint) = &options.hub_endpoint {
        builder = builder.with_endpoint(endpoint.clone());
    }
    let api = builder.build().map_err(|e| failure(format!("the hub's client cannot start: {e}")))?;
    let api = api.repo(Repo::with_revision(repo.to_owned(), RepoType::Model, revision.to_owned()));
    let mut downloaded = Vec::new();
    for file in files {
        let failed = |e| failure(format!("{repo}/{file} could not be downloaded: {e}"));
        downloaded.push((file, api.download(file).map_err(failed)?));
    }
    match &entry.file {
        Some(file) => {
            let joined = copy_verified(entry, &staging.join(file), options.progress, |sink| {
                for (_, path) in &downloaded {
                    let mut reader = fs::File::open(path).map_err(|e| ZooError::io(path, e))?;
                    sink(&mut reader)?;
                }
                Ok(())
            });
            if joined.is_err() {
                // What did not verify is not gone on with.
                let _ = fs::remove_dir_all(staging.join("hub"));
            }
            joined
        }
        None => folder(&downloaded, &staging.join("folder")),
    }
}

/// Moves the files, which the hub's cache holds as links to blobs, into one folder.
fn folder(files: &[(&String, PathBuf)], to: &Path) -> Result<Staged> {
    let _ = fs::remove_dir_all(to);
    let mut bytes = 0;
    for (name, path) in files {
        if name.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
            return Err(failure(format!("{name:?} is not a file inside the model's folder")));
        }
        let target = to.join(name);
        let parent = target.parent().unwrap_or(to);
        fs::create_dir_all(parent).map_err(|e| ZooError::io(parent, e))?;
        let blob = path.canonicalize().map_err(|e| ZooError::io(path, e))?;
        bytes += fs::metadata(&blob).map_err(|e| ZooError::io(&blob, e))?.len();
        fs::rename(&blob, &target).map_err(|e| ZooError::io(&target, e))?;
    }
    Ok(Staged { path: to.to_owned(), bytes, sha256: String::new() })
}
