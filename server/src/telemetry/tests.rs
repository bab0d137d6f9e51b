use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::*;

fn served() -> ServedModel {
    ServedModel { model: "toy".into(), block_size: 16, num_pages: 64, ..ServedModel::default() }
}

/// Metrics of a server that has run a little of everything.
fn used(compat: MetricsCompat) -> Metrics {
    let metrics = Metrics::new(&served(), compat);
    metrics.first_token(Duration::from_millis(30));
    metrics.inter_token(Duration::from_millis(8));
    metrics.sequence_started(10, 10, 4);
    metrics.preempted(2);
    let phases = [Duration::from_micros(20); 4];
    metrics.step(&StepSample { tokens: 11, sampled: 1, phases });
    metrics.scheduler(&SchedulerGauges {
        running: 3,
        waiting: 1,
        pages_used: 16,
        pages_cached: 8,
        pages_free: 40,
    });
    metrics.sequence_finished(&SequenceTimings {
        queue: Some(Duration::from_millis(1)),
        prefill: Some(Duration::from_millis(29)),
        decode: Some(Duration::from_millis(40)),
        total: Duration::from_millis(70),
        prompt_tokens: 10,
        completion_tokens: 5,
        max_tokens: 5,
        n: 1,
        reason: FinishReason::Length,
    });
    metrics.http_request("/v1/models", "GET", 200);
    metrics.grpc_request("rheostat.v1.Rheostat/Generate", tonic::Code::Ok);
    metrics
}

fn value(text: &str, series: &str) -> f64 {
    let line = text.lines().find(|l| l.strip_prefix(series).is_some_and(|rest| rest.starts_with(' ')));
    line.unwrap_or_else(|| panic!("no series {series} in\n{text}"))
        .rsplit(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap()
}

#[test]
fn responses_are_counted_by_their_labels() {
    let metrics = used(MetricsCompat::Vllm);
    metrics.http_request("/v1/models", "GET", 200);
    metrics.http_request("/v1/models", "GET", 401);
    metrics.grpc_request("rheostat.v1.Rheostat/Generate", tonic::Code::Ok);
    metrics.grpc_request("rheostat.v1.Rheostat/Generate", tonic::Code::Aborted);
    let text = metrics.render();
    let http = |status| {
        format!(r#"rheostat_http_requests_total{{route="/v1/models",method="GET",status="{status}"}}"#)
    };
    let grpc = |code| {
        format!(r#"rheostat_grpc_requests_total{{method="rheostat.v1.Rheostat/Generate",code="{code}"}}"#)
    };
    assert_eq!([value(&text, &http(200)), value(&text, &http(401))], [2.0, 1.0]);
    assert_eq!([value(&text, &grpc("Ok")), value(&text, &grpc("Aborted"))], [2.0, 1.0]);
}

#[test]
fn samples_arrive_under_both_names() {
    let text = used(MetricsCompat::Vllm).render();
    let vllm = r#"model_name="toy",engine="0""#;
    assert_eq!(value(&text, "rheostat_sequences_running"), 3.0);
    assert_eq!(value(&text, &format!("vllm:num_requests_running{{{vllm}}}")), 3.0);
    assert_eq!(value(&text, &format!("vllm:kv_cache_usage_perc{{{vllm}}}")), 0.25);
    assert_eq!(value(&text, &format!("vllm:prompt_tokens_total{{{vllm}}}")), 10.0);
    assert_eq!(value(&text, &format!("vllm:prefix_cache_hits_total{{{vllm}}}")), 4.0);
    assert_eq!(
        value(&text, &format!(r#"vllm:request_success_total{{{vllm},finished_reason="length"}}"#)),
        1.0
    );
    assert_eq!(value(&text, r#"rheostat_sequences_finished_total{reason="stop"}"#), 0.0);
    assert_eq!(value(&text, r#"rheostat_kv_pages{state="free"}"#), 40.0);
    // Buckets differ: the wait of a millisecond is below our second bucket and below vLLM's first.
    assert_eq!(value(&text, r#"rheostat_request_queue_seconds_bucket{le="0.005"}"#), 1.0);
    assert_eq!(value(&text, &format!(r#"vllm:request_queue_time_seconds_bucket{{{vllm},le="0.3"}}"#)), 1.0);
    assert_eq!(value(&text, "rheostat_time_per_output_token_seconds_sum"), 0.01);
    let geometry = format!(r#"vllm:cache_config_info{{{vllm},block_size="16",num_gpu_blocks="64"}}"#);
    assert_eq!(value(&text, &geometry), 1.0);
}

#[test]
fn compat_none_emits_only_our_names() {
    let text = used(MetricsCompat::None).render();
    assert!(!text.contains("vllm:"), "{text}");
    assert!(
        text.lines().filter(|l| !l.is_empty() && !l.starts_with('#')).all(|l| l.starts_with("rheostat_"))
    );
}

#[test]
fn every_metric_is_exposed_before_its_first_sample() {
    let text = Metrics::new(&served(), MetricsCompat::Vllm).render();
    let front_ends = [responses::HTTP_REQUESTS.name, responses::GRPC_REQUESTS.name];
    for name in DEFINITIONS.iter().flat_map(|d| [d.name, d.vllm]) {
        let missing = !text.contains(&format!("# TYPE {name} "));
        assert!(name.is_empty() || !missing || front_ends.contains(&name), "{name} is missing");
    }
}

/// The rules of Prometheus' linter that a definition can break, restated.
#[test]
fn names_follow_prometheus_conventions() {
    for def in DEFINITIONS.iter().chain(keys::DEFINITIONS).filter(|d| !d.name.is_empty()) {
        let name = def.name;
        let histogram = !def.buckets.is_empty();
        let suffix = |s: &str| name.ends_with(s);
        assert!(name.starts_with("rheostat_"), "{name}");
        assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{name}: characters");
        assert!(!def.help.is_empty() && !def.help.ends_with('.'), "{name}: help");
        assert!(!["_bucket", "_count", "_sum", "_info_total"].iter().any(|s| suffix(s)), "{name}: suffix");
        assert!(!(histogram && suffix("_total")), "{name}: a histogram is no total");
        for part in name.split('_') {
            let bad = ["counter", "gauge", "histogram", "ms", "milliseconds", "sec", "kb", "mb", "percent"];
            assert!(!bad.contains(&part), "{name}: {part}");
        }
        assert_eq!(def.unit == Unit::Seconds, suffix("_seconds"), "{name}: unit");
        assert_eq!(def.unit == Unit::Bytes, suffix("_bytes"), "{name}: unit");
        assert!(def.buckets.is_sorted_by(|a, b| a < b), "{name}: buckets");
    }
}

/// Prometheus' own linter where it is installed: nothing about our names, only the colon about vLLM's.
#[test]
fn promtool_finds_nothing() {
    let findings = |metrics: &Metrics| -> Option<String> {
        let mut child = Command::new("promtool")
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .ok()?;
        child.stdin.take().unwrap().write_all(metrics.render().as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        Some(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    let Some(ours) = findings(&used(MetricsCompat::None)) else {
        eprintln!("promtool is not installed (Debian package `prometheus`): its lint is not run here");
        return;
    };
    assert_eq!(ours, "");
    let both = findings(&used(MetricsCompat::Vllm)).unwrap();
    let other: Vec<_> = both.lines().filter(|l| !l.starts_with("vllm:")).collect();
    assert!(other.is_empty(), "{other:?}");
}
