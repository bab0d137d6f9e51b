//! Accuracy against what is kept, and against prefill speed.

use std::path::Path;

use plotters::prelude::*;
use plotters::style::register_font;

use super::report::Row;

const SIZE: (u32, u32) = (1400, 560);

/// Draws both charts beside each other into a PNG file.
///
/// # Errors
/// A sentence, when the file cannot be drawn or written.
pub(super) fn draw(path: &Path, title: &str, rows: &[Row]) -> Result<(), String> {
    // The bitmap backend has no fonts of its own, and servers often have none.
    register_font("sans-serif", FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT)
        .map_err(|_| "the built-in font cannot be read".to_owned())?;
    charts(path, title, rows).map_err(|e| format!("{}: {e}", path.display()))
}

fn charts<'a>(path: &'a Path, title: &str, rows: &[Row]) -> Result<(), Box<dyn std::error::Error + 'a>> {
    let root = BitMapBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let root = root.titled(title, ("sans-serif", 24))?;
    let halves = root.split_evenly((1, 2));
    chart(&halves[0], "image tokens kept to the last layer", &places(rows, |row| Some(row.kept)))?;
    let speed = |row: &Row| row.prefill.map(|prefill| prefill.speedup[1]);
    chart(&halves[1], "prefill speed-up over all tokens", &places(rows, speed))?;
    root.present()?;
    Ok(())
}

/// The family of a plan (its name without the number), across, accuracy in percent.
type Place<'a> = (&'a str, f64, f64);

fn places(rows: &[Row], across: impl Fn(&Row) -> Option<f64>) -> Vec<Place<'_>> {
    let family =
        |name: &str| name.len() - name.chars().rev().take_while(|c| c.is_ascii_digit() || *c == ' ').count();
    let place = |row| across(row).map(|x| (x, 100.0 * row.accuracy));
    rows.iter().filter_map(|row| place(row).map(|(x, y)| (&row.name[..family(&row.name)], x, y))).collect()
}

fn chart<'a>(
    area: &DrawingArea<BitMapBackend<'a>, plotters::coord::Shift>,
    label: &str,
    places: &[Place<'_>],
) -> Result<(), Box<dyn std::error::Error + 'a>> {
    let bound = |values: &dyn Fn(&Place<'_>) -> f64, pick: fn(f64, f64) -> f64, start: f64| {
        places.iter().map(values).fold(start, pick)
    };
    let (left, right) = (bound(&|p| p.1, f64::min, f64::MAX), bound(&|p| p.1, f64::max, 0.0));
    if places.is_empty() {
        return Ok(());
    }
    let low = bound(&|p| p.2, f64::min, 100.0);
    let (margin, right) = (0.05 * (right - left).max(0.1), right.max(left + 0.1));
    let mut chart = ChartBuilder::on(area)
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(60)
        .build_cartesian_2d(left - margin..right + 3.0 * margin, (low - 2.0).max(0.0)..101.0)?;
    chart
        .configure_mesh()
        .x_desc(label)
        .y_desc("exact answers, %")
        .label_style(("sans-serif", 15))
        .light_line_style(WHITE)
        .draw()?;
    let mut families: Vec<&str> = places.iter().map(|place| place.0).collect();
    families.sort_unstable();
    families.dedup();
    for (index, family) in families.into_iter().enumerate() {
        let color = [BLUE, RED, RGBColor(0, 140, 60), RGBColor(120, 120, 120), MAGENTA][index % 5];
        let mut points: Vec<(f64, f64)> =
            places.iter().filter(|place| place.0 == family).map(|place| (place.1, place.2)).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        chart.draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)))?;
        chart.draw_series(points.iter().map(|&point| Circle::new(point, 4, color.filled())))?;
        // Families meet where most is kept: names stand where they are apart.
        if let Some(&lowest) = points.iter().min_by(|a, b| a.1.total_cmp(&b.1)) {
            let font = ("sans-serif", 15).into_font().color(&color);
            chart.draw_series([Text::new(format!("  {family}"), lowest, font)])?;
        }
    }
    Ok(())
}
