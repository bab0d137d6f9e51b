//! What is deployed asks for metrics that the server has: dashboards, rules, autoscalers and the endpoint picker
//! under `deploy/`, checked against a rendered `/metrics` page. (`deploy/validate` checks the rest of that folder.)

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use rheostat::energy::Source;
use rheostat::telemetry::{Metrics, MetricsCompat, ServedModel};

/// Labels that Prometheus puts on every series, by what it scrapes.
const TARGET_LABELS: [&str; 5] = ["namespace", "job", "instance", "pod", "le"];

/// A mention of a metric: where, its name, and the labels that are matched in the braces after it.
#[derive(Debug)]
struct Mention {
    file: String,
    name: String,
    labels: Vec<String>,
}

/// Every series name of a page that has seen a request of each front end, and the labels it has.
fn series() -> BTreeMap<String, BTreeSet<String>> {
    let served = ServedModel { model: "toy".into(), ..ServedModel::default() };
    let metrics = Metrics::new(&served, MetricsCompat::Vllm);
    metrics.http_request("/v1/models", "GET", 200);
    metrics.grpc_request("rheostat.v1.ModelService/ListModels", tonic::Code::Ok);
    metrics.energy(Source::Estimate).watts(0.0);
    metrics.sequence_energy("dense", Some(1.0), 1);
    metrics.key("a key").admitted();
    metrics.verbosity_flagged("chat");
    metrics.verbosity_action("demote");
    let page = metrics.render();
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in page.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let (name, labels) = name_and_labels(line);
        found.entry(name).or_default().extend(labels);
    }
    // A histogram without a sample has no line of its own; its type is told all the same.
    for (name, kind) in page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' ')) {
        if kind == "histogram" {
            let labels = found.get(&format!("{name}_count")).cloned().unwrap_or_default();
            for suffix in ["_bucket", "_sum", "_count"] {
                found.entry(format!("{name}{suffix}")).or_default().extend(labels.clone());
            }
        }
    }
    found
}

/// The name at the start of `text`, and the names of the labels in the braces right after it.
fn name_and_labels(text: &str) -> (String, Vec<String>) {
    let end = text.find(|c: char| !is_name(c)).unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    let braces = rest.strip_prefix('{').and_then(|rest| rest.split('}').next()).unwrap_or_default();
    let labels =
        braces.split(',').filter_map(|matcher| matcher.split_once(['=', '!'])).map(|(l, _)| l.trim());
    (name.to_owned(), labels.filter(|l| !l.is_empty() && l.chars().all(is_name)).map(String::from).collect())
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == ':'
}

/// Every name in `text` that contains `rheostat_` or begins with `vllm:`.
fn mentions(file: &str, text: &str) -> Vec<Mention> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(start) = rest.find(is_name) {
        rest = &rest[start..];
        let (name, labels) = name_and_labels(rest);
        rest = &rest[name.len()..];
        // A key of YAML or JSON, or a sentence, may end in a colon.
        let name = name.trim_end_matches(':').to_owned();
        if name.contains("rheostat_") || name.starts_with("vllm:") {
            found.push(Mention { file: file.to_owned(), name, labels });
        }
    }
    found
}

fn texts(folder: &Path, found: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(folder).expect("a readable folder") {
        let path: PathBuf = entry.expect("a readable entry").path();
        let name = path.to_string_lossy().into_owned();
        if path.is_dir() {
            texts(&path, found);
        } else if [".yaml", ".json", ".toml", ".tpl"].iter().any(|ext| name.ends_with(ext)) {
            found.push((name, fs::read_to_string(&path).expect("readable text")));
        }
    }
}

#[test]
fn deployed_files_name_only_metrics_that_exist() {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").join("deploy");
    let mut files = Vec::new();
    texts(&deploy, &mut files);
    let series = series();
    let recorded: BTreeSet<&str> = files
        .iter()
        .flat_map(|(_, text)| text.lines())
        .filter_map(|line| line.trim_start().strip_prefix("- record: "))
        .collect();
    let all: Vec<_> = files.iter().flat_map(|(file, text)| mentions(file, text)).collect();
    let wrong: Vec<_> = all
        .iter()
        .filter_map(|mention| {
            if recorded.contains(mention.name.as_str()) {
                return None;
            }
            let Some(known) = series.get(&mention.name) else {
                return Some(format!("{}: no metric {}", mention.file, mention.name));
            };
            let strange: Vec<_> = mention
                .labels
                .iter()
                .filter(|label| !known.contains(*label) && !TARGET_LABELS.contains(&label.as_str()))
                .collect();
            (!strange.is_empty()).then(|| format!("{}: {} has no {strange:?}", mention.file, mention.name))
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // The walk did find what it is about.
    let names: BTreeSet<_> = all.iter().map(|mention| mention.name.as_str()).collect();
    for name in [
        "rheostat_sequences_waiting",
        "rheostat_time_to_first_token_seconds_bucket",
        "vllm:cache_config_info",
    ] {
        assert!(names.contains(name), "{name} is nowhere in {names:?}");
    }
}
