//! Intel and AMD processors: RAPL through Linux' powercap files (`/sys/class/powercap/intel-rapl:*`).
//!
//! Counted are every package and the memory beside it (`dram`, which is in no package). Domains inside a package
//! (`core`, `uncore`) are in its figure already, and `psys` is the whole platform, packages included: both are left
//! out. The figures are of the whole machine, whoever uses it. Since 2020 kernels let only root read them, because
//! they tell secrets of other processes; `chmod` or a udev rule lets the server.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::Source;
use super::counter::{Advance, Counter};
use super::meter::{Meter, Reading};

/// The counters' unit.
const MICROJOULE: f64 = 1e-6;

/// The meter of a machine's processors.
#[derive(Debug)]
pub(super) struct RaplMeter {
    domains: Vec<Domain>,
    joules: f64,
}

#[derive(Debug)]
struct Domain {
    path: PathBuf,
    file: File,
    counter: Counter,
    failing: bool,
}

impl RaplMeter {
    /// The meter of the domains below `root`.
    ///
    /// # Errors
    /// Why there is none, as a sentence; when a counter may not be read, what would allow it.
    pub(super) fn open(root: &Path) -> Result<Self, String> {
        let missing = |e: io::Error| format!("RAPL, {}: {e}", root.display());
        let mut folders: Vec<PathBuf> = fs::read_dir(root)
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
            .map_err(missing)?;
        folders.sort();
        let counted = folders.iter().filter(|folder| is_counted(folder));
        let domains = counted.map(|folder| Domain::open(folder)).collect::<Result<Vec<_>, _>>()?;
        if domains.is_empty() {
            return Err(format!("RAPL: {} has no packages", root.display()));
        }
        Ok(Self { domains, joules: 0.0 })
    }
}

/// Whether what the domain counts is in no other domain. Its folder is `intel-rapl:PACKAGE` or
/// `intel-rapl:PACKAGE:PART`; the same counters' `intel-rapl-mmio:*` are not taken.
fn is_counted(folder: &Path) -> bool {
    let file_name = folder.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some(index) = file_name.strip_prefix("intel-rapl:") else { return false };
    let name = fs::read_to_string(folder.join("name")).unwrap_or_default();
    match index.contains(':') {
        false => name.starts_with("package"),
        true => name.trim() == "dram",
    }
}

impl Domain {
    fn open(folder: &Path) -> Result<Self, String> {
        let path = folder.join("energy_uj");
        let fail = |e: io::Error| match e.kind() {
            io::ErrorKind::PermissionDenied => format!(
                "RAPL, {}: {e}; let the server read it (chmod a+r, by a udev rule to survive a restart)",
                path.display()
            ),
            _ => format!("RAPL, {}: {e}", path.display()),
        };
        let file = File::open(&path).map_err(fail)?;
        let count = read(&file).map_err(fail)?;
        let range = fs::read_to_string(folder.join("max_energy_range_uj")).ok();
        let range = range.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        let counter = Counter::new(MICROJOULE, range, (count, Instant::now()));
        Ok(Self { path, file, counter, failing: false })
    }

    fn read(&mut self, at: Instant) -> Advance {
        match read(&self.file) {
            Ok(count) => {
                self.failing = false;
                self.counter.advance(count, at)
            }
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::warn!(%error, file = %self.path.display(), "an energy counter cannot be read for now");
                }
                Advance::Joules(0.0)
            }
        }
    }
}

/// The number that a counter's file holds now. The file stays open: every read computes it anew.
fn read(file: &File) -> io::Result<u64> {
    let mut text = [0; 32];
    let len = file.read_at(&mut text, 0)?;
    let number = std::str::from_utf8(&text[..len]).ok().and_then(|text| text.trim().parse().ok());
    number.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a number"))
}

impl Meter for RaplMeter {
    fn source(&self) -> Source {
        Source::Rapl
    }

    fn read(&mut self) -> Reading {
        let at = Instant::now();
        let mut reset = false;
        for domain in &mut self.domains {
            match domain.read(at) {
                Advance::Joules(joules) => self.joules += joules,
                Advance::Reset => reset = true,
            }
        }
        Reading { at, joules: self.joules, reset }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder as powercap shows a machine of two packages.
    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new() -> Self {
            let tree = Self(tempfile::tempdir().expect("a temporary folder"));
            for (domain, name) in [
                ("intel-rapl:0", "package-0"),
                ("intel-rapl:0:0", "core"),
                ("intel-rapl:0:1", "dram"),
                ("intel-rapl:1", "package-1"),
                ("intel-rapl:2", "psys"),
                ("intel-rapl-mmio:0", "package-0"),
            ] {
                let folder = tree.0.path().join(domain);
                fs::create_dir(&folder).expect("a fresh folder");
                fs::write(folder.join("name"), format!("{name}\n")).expect("writable");
                fs::write(folder.join("max_energy_range_uj"), "1000000000\n").expect("writable");
                tree.set(domain, 999_000_000);
            }
            tree
        }

        fn set(&self, domain: &str, microjoules: u64) {
            let path = self.0.path().join(domain).join("energy_uj");
            fs::write(path, format!("{microjoules}\n")).expect("writable");
        }

        fn open(&self) -> Result<RaplMeter, String> {
            RaplMeter::open(self.0.path())
        }
    }

    #[test]
    fn packages_and_their_memory_count_once_each_over_the_end_of_their_range() {
        let tree = Tree::new();
        let mut meter = tree.open().expect("two packages");
        assert_eq!(meter.domains.len(), 3, "package-0, its dram, package-1");
        assert!(meter.read().joules.abs() < 1e-9);
        tree.set("intel-rapl:0", 999_500_000);
        tree.set("intel-rapl:0:1", 999_250_000);
        tree.set("intel-rapl:1", 2_000_000);
        // In the package already, or counted elsewhere.
        for other in ["intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"] {
            tree.set(other, 999_900_000);
        }
        let reading = meter.read();
        assert!((reading.joules - 3.75).abs() < 1e-9 && !reading.reset, "{reading:?}");
        assert_eq!(meter.source().as_str(), "rapl");
    }

    #[test]
    fn a_counter_that_cannot_be_read_now_is_made_up_for_later() {
        let tree = Tree::new();
        let mut meter = tree.open().expect("two packages");
        let broken = tree.0.path().join("intel-rapl:1/energy_uj");
        fs::write(&broken, "?").expect("writable");
        tree.set("intel-rapl:0", 999_500_000);
        let reading = meter.read();
        assert!((reading.joules - 0.5).abs() < 1e-9 && !reading.reset, "{reading:?}");
        tree.set("intel-rapl:1", 999_750_000);
        assert!((meter.read().joules - 1.25).abs() < 1e-9);
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = RaplMeter::open(Path::new("/nowhere")).expect_err("no such folder");
        assert!(error.contains("/nowhere"), "{error}");
        let empty = tempfile::tempdir().expect("a temporary folder");
        let error = RaplMeter::open(empty.path()).expect_err("no packages");
        assert!(error.contains("has no packages"), "{error}");
        let tree = Tree::new();
        fs::remove_file(tree.0.path().join("intel-rapl:1/energy_uj")).expect("it is there");
        let error = tree.open().expect_err("a package without its counter");
        assert!(error.contains("intel-rapl:1/energy_uj"), "{error}");
    }
}
