//! Bytes on their way: a bar on a terminal, log lines elsewhere.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Progress of one file.
pub(super) struct Progress {
    bar: ProgressBar,
    name: String,
    /// The next tenth to log, where there is no terminal.
    next_tenth: Option<u64>,
}

impl Progress {
    /// Progress towards `total` bytes of `name`; nothing is shown unless `shown`.
    pub(super) fn new(name: &str, total: u64, shown: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden());
        if shown && terminal {
            bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        let template = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(name.to_owned());
        Self { bar, name: name.to_owned(), next_tenth: (shown && !terminal).then_some(1) }
    }

    /// `bytes` more are there.
    pub(super) fn add(&mut self, bytes: u64) {
        self.bar.inc(bytes);
        let Some(tenth) = &mut self.next_tenth else { return };
        let (done, total) = (self.bar.position(), self.bar.length().unwrap_or(0).max(1));
        if done * 10 >= *tenth * total {
            tracing::info!(name = self.name, percent = done * 100 / total, "pulling");
            *tenth = done * 10 / total + 1;
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
