//! The figures of each plan, as JSON and as a Markdown table.

use std::collections::BTreeMap;
use std::fmt::Write;

use indexmap::IndexMap;
use model_zoo::compression::CompressionOptions;
use serde::Serialize;

use super::answers::{Answers, OneAnswer};
use super::timing::{Prefill, Times};

/// One plan's figures, means over its questions.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Row {
    pub(super) name: String,
    pub(super) plan: CompressionOptions,
    pub(super) questions: usize,
    pub(super) accuracy: f64,
    /// Over that of the first plan.
    pub(super) relative_accuracy: f64,
    pub(super) by_kind: BTreeMap<String, f64>,
    pub(super) kept: f64,
    pub(super) mean_kept: f64,
    pub(super) image_kv_bytes: f64,
    /// Less than the first plan's, as a share.
    pub(super) image_kv_saved: f64,
    pub(super) gflops: f64,
    pub(super) prefill: Option<Prefill>,
}

/// The figures of every plan that has answers.
pub(super) fn rows(
    plans: &IndexMap<String, CompressionOptions>,
    answers: &Answers,
    times: Times,
) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for (name, plan) in plans {
        let Some(answers) = answers.get(name).filter(|answers| !answers.is_empty()) else { continue };
        let mean = |of: fn(&OneAnswer) -> f64| answers.iter().map(of).sum::<f64>() / answers.len() as f64;
        let accuracy = mean(|answer| f64::from(u8::from(answer.right)));
        let image_kv_bytes = mean(|answer| answer.image_kv_bytes);
        let first = rows.first().map_or((accuracy, image_kv_bytes), |row| (row.accuracy, row.image_kv_bytes));
        rows.push(Row {
            name: name.clone(),
            plan: plan.clone(),
            questions: answers.len(),
            accuracy,
            relative_accuracy: accuracy / first.0,
            by_kind: by_kind(answers),
            kept: mean(|answer| answer.kept),
            mean_kept: mean(|answer| answer.mean_kept),
            image_kv_bytes,
            image_kv_saved: 1.0 - image_kv_bytes / first.1,
            gflops: 1e-9 * mean(|answer| answer.flops),
            prefill: times.get(name).copied(),
        });
    }
    rows
}

fn by_kind(answers: &[OneAnswer]) -> BTreeMap<String, f64> {
    let mut counts: BTreeMap<String, (f64, f64)> = BTreeMap::new();
    for answer in answers {
        let (right, all) = counts.entry(answer.kind.clone()).or_default();
        *right += f64::from(u8::from(answer.right));
        *all += 1.0;
    }
    counts.into_iter().map(|(kind, (right, all))| (kind, right / all)).collect()
}

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
         | plan | questions | exact answers | of all's | tokens kept: final, mean of layers | prefill, ms | speed-up (quartiles) | GFLOP | image KV, MiB | less |\n\
         |---|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n"
    );
    for row in rows {
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "| {} | {} | {:.1}% | {:.1}% | {:.0}, {:.0} |",
            row.name,
            row.questions,
            100.0 * row.accuracy,
            100.0 * row.relative_accuracy,
            row.kept,
            row.mean_kept,
        );
        let _ = match row.prefill {
            Some(Prefill { ms, speedup: [low, median, high] }) => {
                write!(text, " {ms:.0} | {median:.2} ({low:.2}–{high:.2}) |")
            }
            None => write!(text, " | |"),
        };
        let (mib, less) = (row.image_kv_bytes / f64::from(1 << 20), 100.0 * row.image_kv_saved);
        let _ = writeln!(text, " {:.1} | {mib:.2} | {less:.1}% |", row.gflops);
    }
    let kinds: Vec<&String> = rows.first().map_or(Vec::new(), |row| row.by_kind.keys().collect());
    let _ = write!(text, "\n| exact answers, % |");
    kinds.iter().for_each(|kind| text.push_str(&format!(" {kind} |")));
    let _ = write!(text, "\n|---|{}\n", "---:|".repeat(kinds.len()));
    for row in rows {
        let _ = write!(text, "| {} |", row.name);
        for kind in &kinds {
            let share = row.by_kind.get(*kind).copied().unwrap_or(f64::NAN);
            let _ = write!(text, " {:.1} |", 100.0 * share);
        }
        text.push('\n');
    }
    text
}
