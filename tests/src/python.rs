//! A Python environment with the pinned clients of `tests/clients/requirements.txt`, made once a machine.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// The folder of the client scripts.
pub fn clients_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("clients")
}

/// The interpreter of the environment; the first caller of a machine makes it (pip, about half a minute).
///
/// # Panics
/// When `python3` is missing or pip fails: the tests need both, and the README says so.
pub fn interpreter() -> &'static Path {
    static INTERPRETER: OnceLock<PathBuf> = OnceLock::new();
    INTERPRETER.get_or_init(|| {
        let requirements = clients_dir().join("requirements.txt");
        let pinned = fs::read_to_string(&requirements).expect("tests/clients/requirements.txt is readable");
        let mut hasher = DefaultHasher::new();
        pinned.hash(&mut hasher);
        let home = environment_root().join(format!("clients-{:016x}", hasher.finish()));
        let python = home.join("bin/python");
        if !home.join("complete").exists() {
            create(&home, &requirements);
        }
        python
    })
}

/// Beside the build output, so that a clean clone with a warm build folder finds it again.
fn environment_root() -> PathBuf {
    let exe = std::env::current_exe().expect("a test binary has a path");
    let target = exe.ancestors().find(|dir| dir.join("CACHEDIR.TAG").exists());
    target.unwrap_or(Path::new(env!("CARGO_MANIFEST_DIR"))).join("python")
}

fn create(home: &Path, requirements: &Path) {
    let _ = fs::remove_dir_all(home);
    check(Command::new("python3").args(["-m", "venv"]).arg(home), "python3 -m venv");
    let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"];
    check(Command::new(home.join("bin/python")).args(pip).arg(requirements), "pip install");
    fs::write(home.join("complete"), "").expect("the environment's folder is writable");
}

/// Runs a client script of `tests/clients` with `args` and fails with all of its output unless it succeeds.
#[track_caller]
pub fn run_client(script: &str, args: &[&str]) {
    check(Command::new(interpreter()).arg(clients_dir().join(script)).args(args), script);
}

#[track_caller]
fn check(command: &mut Command, what: &str) {
    let Output { status, stdout, stderr } =
        command.output().unwrap_or_else(|e| panic!("{what} cannot be started: {e}"));
    assert!(
        status.success(),
        "{what} failed ({status})\n--- stdout\n{}\n--- stderr\n{}",
        String::from_utf8_lossy(&stdout),
        String::from_utf8_lossy(&stderr)
    );
}
