//! The figures as JSON and as a Markdown table.

use std::fmt::Write;

use super::Row;

/// Everything, for programs.
///
/// # Errors
/// When a figure is not a number.
pub(super) fn json((title, settings): (&str, &str), rows: &[Row]) -> Result<String, String> {
    let report = serde_json::json!({"title": title, "settings": settings, "rows": rows});
    serde_json::to_string_pretty(&report).map_err(|e| e.to_string())
}

/// A table for people, by size.
pub(super) fn markdown((title, settings): (&str, &str), rows: &[Row]) -> String {
    let mut rows: Vec<_> = rows.iter().collect();
    rows.sort_by_key(|row| row.bytes);
    let mut text = format!(
        "### {title}\n\nStack: {settings}. Sizes are those of all weights, as stored.\n\n\
         | weights | asked, MiB | held, MiB | short of it, bytes | next block, bytes | bits a weight | perplexity |\n\
         |---|---:|---:|---:|---:|---:|---:|\n"
    );
    let mib = |bytes: u64| format!("{:.2}", bytes as f64 / f64::from(1 << 20));
    let count = |number: Option<u64>| number.map_or_else(|| "–".to_owned(), |number| number.to_string());
    for row in rows {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {:.2} | {:.2} |",
            row.name,
            row.asked.map_or_else(|| "–".to_owned(), mib),
            mib(row.bytes),
            count(row.asked.map(|asked| asked - row.bytes)),
            count(row.next_block),
            row.bits,
            row.perplexity,
        );
    }
    text
}
