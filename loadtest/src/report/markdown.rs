//! Tables for people.

use std::fmt::Write;

use crate::run::Report;
use crate::summary::{Percentiles, Summary};

/// The report as Markdown.
pub fn markdown(report: &Report) -> String {
    let mut text = format!("### {}\n\n{}; seed {}.\n\n", report.title, report.load, report.seed);
    section(&mut text, &report.summary);
    for (name, summary) in &report.shares {
        // Writing to a string cannot fail.
        let _ = write!(text, "\n#### {name}\n\n");
        section(&mut text, summary);
    }
    text
}

fn section(text: &mut String, summary: &Summary) {
    text.push_str("| ms | mean | p50 | p90 | p99 | max |\n|---|---:|---:|---:|---:|---:|\n");
    for (name, latency) in [
        ("time to first token", &summary.ttft_ms),
        ("time per token", &summary.tpot_ms),
        ("end to end", &summary.e2e_ms),
    ] {
        if let Some(Percentiles { mean, p50, p90, p99, max, .. }) = latency {
            let _ = writeln!(text, "| {name} | {mean:.1} | {p50:.1} | {p90:.1} | {p99:.1} | {max:.1} |");
        }
    }
    text.push_str("\n| what | value |\n|---|---:|\n");
    let mut row = |name: &str, value: String| {
        let _ = writeln!(text, "| {name} | {value} |");
    };
    row("requests due", summary.requests.to_string());
    row("answered", summary.completed.to_string());
    for (kind, count) in &summary.errors {
        row(&format!("failed: {kind}"), count.to_string());
    }
    row("tokens of a request, prompt + output", {
        let [prompt, output] = summary.tokens_per_request;
        format!("{prompt:.0} + {output:.0}")
    });
    row("requests/s", format!("{:.2}", summary.requests_per_second));
    row("output tokens/s", format!("{:.1}", summary.output_tokens_per_second));
    row("prompt tokens/s", format!("{:.1}", summary.prompt_tokens_per_second));
    if let Some(goodput) = &summary.goodput {
        let targets = goodput.targets;
        let named =
            [("TTFT", targets.ttft_ms), ("per token", targets.tpot_ms), ("end to end", targets.e2e_ms)];
        let named: Vec<_> =
            named.iter().filter_map(|(name, ms)| ms.map(|ms| format!("{name} ≤ {ms} ms"))).collect();
        row(&format!("within {}", named.join(", ")), format!("{:.1}%", 100.0 * goodput.share));
        row("goodput, requests/s", format!("{:.2}", goodput.requests_per_second));
    }
    if let Some(joules) = summary.joules_per_token {
        let source = summary.joules_source.as_deref().unwrap_or("source unknown");
        row(&format!("joules per output token ({source})"), format!("{joules:.4}"));
    }
    for (profile, count) in &summary.profiles {
        row(&format!("answered as `{profile}`"), count.to_string());
    }
    row("p99 of this program's own delay in sending, ms", format!("{:.2}", summary.send_delay_p99_ms));
}
