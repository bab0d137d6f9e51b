//! The figures as JSON and as a Markdown table.

use std::fmt::Write;

use super::measure::Row;

/// Everything, for programs.
///
/// # Errors
/// When a figure is not a number.
pub(super) fn json(title: &str, rows: &[Row]) -> Result<String, String> {
    let report = serde_json::json!({"title": title, "rows": rows});
    serde_json::to_string_pretty(&report).map_err(|e| e.to_string())
}

/// A table for people.
pub(super) fn markdown(title: &str, rows: &[Row]) -> String {
    let mut text = format!(
        "### {title}\n\n\
         | plan | perplexity | over dense | agreement | KL, nats | short answers | needles | layer work | KV, MiB | tokens/s × 1 | speed-up × 1 | tokens/s × 8 | speed-up × 8 |\n\
         |---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n"
    );
    for row in rows {
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "| {} | {:.3} | {:+.1}% | {:.1}% | {:.4} | {:.0}% | {:.0}% | {:.3} | {:.2} |",
            row.name,
            row.perplexity,
            100.0 * row.perplexity_increase,
            100.0 * row.agreement,
            row.kl_nats,
            100.0 * row.short_answers,
            100.0 * row.needles,
            row.layer_work,
            row.kv_bytes as f64 / f64::from(1 << 20),
        );
        for decode in &row.decode {
            let _ = write!(text, " {:.1} | {:.2} |", decode.tokens_per_second, decode.speedup);
        }
        text.push('\n');
    }
    text
}
