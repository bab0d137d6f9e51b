//! Latency over the run, and how it is distributed.

use std::path::Path;
use std::time::Duration;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;

use crate::drive::{Record, Timing};
use crate::run::Report;

const SIZE: (u32, u32) = (1400, 560);
/// The least latency that the logarithmic axes show, in milliseconds.
const FLOOR_MS: f64 = 0.1;
const FAILED: RGBColor = RGBColor(200, 40, 40);

/// A kind of latency, its name and its colour.
type Series = (&'static str, RGBColor, fn(&Timing) -> Option<Duration>);

const SERIES: [Series; 3] = [
    ("time to first token", RGBColor(31, 119, 180), |timing| timing.first_token),
    ("time per token", RGBColor(44, 160, 44), |timing| timing.per_token),
    ("end to end", RGBColor(120, 120, 120), |timing| Some(timing.total)),
];

type Drawn<'a> = Result<(), Box<dyn std::error::Error + 'a>>;

/// Draws both charts beside each other into a PNG file.
///
/// # Errors
/// A sentence, when the file cannot be drawn or written.
pub(super) fn draw(path: &Path, report: &Report) -> Result<(), String> {
    // The bitmap backend has no fonts of its own, and servers often have none.
    register_font("sans-serif", FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT)
        .map_err(|_| "the built-in font cannot be read".to_owned())?;
    both(path, report).map_err(|e| format!("{}: {e}", path.display()))
}

fn both<'a>(path: &'a Path, report: &Report) -> Drawn<'a> {
    let root = BitMapBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let root = root.titled(&report.title, ("sans-serif", 22))?;
    let halves = root.split_evenly((1, 2));
    over_time(&halves[0], &report.records)?;
    distribution(&halves[1], &report.records)?;
    root.present()?;
    Ok(())
}

fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1000.0).max(FLOOR_MS)
}

/// The longest latency, for the axes.
fn longest(records: &[Record]) -> f64 {
    let totals = records.iter().map(|record| ms(record.end.saturating_sub(record.due)));
    totals.fold(10.0 * FLOOR_MS, f64::max)
}

fn over_time<'a>(area: &DrawingArea<BitMapBackend<'a>, Shift>, records: &[Record]) -> Drawn<'a> {
    let last = records.iter().map(|record| record.due.as_secs_f64()).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .margin(14)
        .x_label_area_size(42)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..last, (FLOOR_MS..1.5 * longest(records)).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("when the request was due, s")
        .y_desc("ms, from when it was due")
        .label_style(("sans-serif", 14))
        .light_line_style(WHITE)
        .draw()?;
    for (_, color, of) in SERIES {
        let points = records.iter().filter_map(|record| {
            let latency = of(record.outcome.as_ref().ok()?)?;
            Some(Circle::new((record.due.as_secs_f64(), ms(latency)), 2, color.filled()))
        });
        chart.draw_series(points)?;
    }
    let failed = records.iter().filter(|record| record.outcome.is_err());
    chart.draw_series(failed.map(|record| {
        let wait = record.end.saturating_sub(record.due);
        Cross::new((record.due.as_secs_f64(), ms(wait)), 4, FAILED.stroke_width(2))
    }))?;
    Ok(())
}

fn distribution<'a>(area: &DrawingArea<BitMapBackend<'a>, Shift>, records: &[Record]) -> Drawn<'a> {
    let mut chart = ChartBuilder::on(area)
        .margin(14)
        .x_label_area_size(42)
        .y_label_area_size(52)
        .build_cartesian_2d((FLOOR_MS..1.5 * longest(records)).log_scale(), 0.0..100.0)?;
    chart
        .configure_mesh()
        .x_desc("ms")
        .y_desc("% of all requests that took at most this")
        .label_style(("sans-serif", 14))
        .light_line_style(WHITE)
        .draw()?;
    for (name, color, of) in SERIES {
        let mut values: Vec<f64> =
            records.iter().filter_map(|record| of(record.outcome.as_ref().ok()?)).map(ms).collect();
        values.sort_by(f64::total_cmp);
        // Of all requests: failed ones keep the curve below 100%.
        let share = |rank: usize| 100.0 * (rank + 1) as f64 / records.len() as f64;
        let line = values.iter().enumerate().map(|(rank, &value)| (value, share(rank)));
        chart
            .draw_series(LineSeries::new(line, color.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| Rectangle::new([(x, y - 4), (x + 14, y + 4)], color.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .label_font(("sans-serif", 14))
        .draw()?;
    Ok(())
}
