//! The invariants of the design that a program can check. Most of them are absences.

use std::fs;
use std::path::{Path, PathBuf};

/// A source file: path relative to the repository's root, and its text.
struct Source {
    path: String,
    text: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests crate lies in the workspace").to_owned()
}

fn collect(dir: &Path, root: &Path, extensions: &[&str], found: &mut Vec<Source>) {
    for entry in fs::read_dir(dir).expect("a readable folder") {
        let path = entry.expect("a readable entry").path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if path.is_dir() {
            let ours = !matches!(name, "target" | ".git" | "__pycache__") && path != root.join("models");
            if ours {
                collect(&path, root, extensions, found);
            }
        } else if extensions.iter().any(|ext| name.ends_with(ext)) {
            let text = fs::read_to_string(&path).unwrap_or_default();
            let path = path.strip_prefix(root).expect("below the root").to_string_lossy().into_owned();
            found.push(Source { path, text });
        }
    }
}

fn sources(extensions: &[&str]) -> Vec<Source> {
    let root = root();
    let mut found = Vec::new();
    collect(&root, &root, extensions, &mut found);
    assert!(!found.is_empty(), "no sources found under {}", root.display());
    found
}

/// The part of a Rust file before its inline test module.
fn without_tests(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod ").next().unwrap_or(text)
}

fn is_test(path: &str) -> bool {
    path.starts_with("tests/")
        || path.contains("/tests/")
        || path.ends_with("tests.rs")
        || path.contains("/examples/")
}

/// Fails with every `path:line: text` of production Rust code that `applies` to a path and `bad` finds.
#[track_caller]
fn forbid(rule: &str, applies: impl Fn(&str) -> bool, bad: impl Fn(&str) -> bool) {
    let mut offences = Vec::new();
    for source in sources(&[".rs"]).iter().filter(|s| !is_test(&s.path) && applies(&s.path)) {
        for (number, line) in without_tests(&source.text).lines().enumerate() {
            let code = line.split("//").next().unwrap_or(line);
            if bad(code) {
                offences.push(format!("{}:{}: {}", source.path, number + 1, line.trim()));
            }
        }
    }
    assert!(offences.is_empty(), "{rule}\n{}", offences.join("\n"));
}

#[test]
fn scheduler_knows_no_candle_and_no_async() {
    forbid(
        "the scheduler is pure: no candle, no async, no clock",
        |path| path.starts_with("server/src/scheduler/"),
        |code| {
            ["candle", "async ", "tokio", ".await", "Instant", "SystemTime"].iter().any(|w| code.contains(w))
        },
    );
}

#[test]
fn zoo_has_no_async_runtime() {
    forbid(
        "model-zoo has no tokio",
        |path| path.starts_with("model-zoo/src/"),
        |code| code.contains("tokio") || code.contains("async fn"),
    );
}

#[test]
fn unsafe_lives_only_in_kernels() {
    forbid(
        "unsafe code lives only under model-zoo/src/kernels/",
        |path| !path.starts_with("model-zoo/src/kernels/"),
        |code| code.contains("unsafe {") || code.contains("unsafe fn") || code.contains("unsafe impl"),
    );
}

#[test]
fn nothing_panics_by_unwrap() {
    forbid("no unwrap outside tests", |_| true, |code| code.contains(".unwrap()"));
}

#[test]
fn channels_are_bounded() {
    forbid(
        "no unbounded channel",
        |_| true,
        |code| code.contains("unbounded_channel") || code.contains("mpsc::channel()"),
    );
}

#[test]
fn json_and_prost_stay_at_the_edge() {
    forbid(
        "only http/ knows the JSON wire types and only grpc/ knows prost",
        |path| {
            path.starts_with("server/src/scheduler/")
                || path.starts_with("server/src/engine/")
                || path.starts_with("server/src/http/")
        },
        |code| code.contains("rheostat_proto") || code.contains("prost::"),
    );
    forbid(
        "the engine and the scheduler know no JSON",
        |path| path.starts_with("server/src/scheduler/") || path.starts_with("server/src/engine/"),
        |code| code.contains("serde_json") || code.contains("axum"),
    );
}

#[test]
fn metric_names_live_in_one_file() {
    forbid(
        "metric names are written in server/src/telemetry only",
        |path| path.starts_with("server/src/") && !path.starts_with("server/src/telemetry"),
        |code| code.contains("\"rheostat_") || code.contains("\"vllm:"),
    );
}

#[test]
fn files_stay_small() {
    let long: Vec<_> = sources(&[".rs", ".cu", ".proto", ".py"])
        .iter()
        .map(|s| (s.text.lines().count(), &s.path))
        .filter(|(lines, _)| *lines > 500)
        .map(|(lines, path)| format!("{path}: {lines} lines"))
        .collect();
    assert!(long.is_empty(), "files have 500 lines at most\n{}", long.join("\n"));
}

#[test]
fn nothing_is_left_undone() {
    let marks = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X:"),
        concat!("#[ig", "nore"),
        concat!("todo", "!("),
    ];
    let left: Vec<_> = sources(&[".rs", ".proto", ".py", ".sh", ".toml"])
        .iter()
        .flat_map(|s| s.text.lines().enumerate().map(move |(n, line)| (&s.path, n + 1, line)))
        .filter(|(path, _, line)| !path.ends_with("tidy.rs") && marks.iter().any(|mark| line.contains(mark)))
        .map(|(path, n, line)| format!("{path}:{n}: {}", line.trim()))
        .collect();
    assert!(left.is_empty(), "no marks of unfinished work\n{}", left.join("\n"));
}
