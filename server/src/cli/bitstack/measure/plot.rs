//! Perplexity against size.

use std::path::Path;

use plotters::prelude::*;

use super::Row;
use crate::cli::eval::plot::register_fonts;

const SIZE: (u32, u32) = (1000, 640);

/// Draws the stack's curve and the other types' points into a PNG file.
///
/// # Errors
/// A sentence, when the file cannot be drawn or written.
pub(super) fn draw(path: &Path, title: &str, rows: &[Row]) -> Result<(), String> {
    register_fonts()?;
    chart(path, title, rows).map_err(|e| format!("{}: {e}", path.display()))
}

fn chart<'a>(path: &'a Path, title: &str, rows: &[Row]) -> Result<(), Box<dyn std::error::Error + 'a>> {
    let root = BitMapBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let root = root.titled(title, ("sans-serif", 24))?;
    let mib = |row: &Row| row.bytes as f64 / f64::from(1 << 20);
    let ends = |of: &dyn Fn(&Row) -> f64| {
        let all = || rows.iter().map(of).filter(|value| value.is_finite());
        (all().fold(f64::INFINITY, f64::min), all().fold(f64::NEG_INFINITY, f64::max))
    };
    let ((left, right), (low, high)) = (ends(&mib), ends(&|row: &Row| row.perplexity));
    let mut chart = ChartBuilder::on(&root)
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(70)
        .build_cartesian_2d(0.95 * left..1.08 * right, (0.9 * low..1.2 * high).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("all weights, MiB")
        .y_desc("perplexity")
        .label_style(("sans-serif", 15))
        .light_line_style(WHITE)
        .draw()?;
    let (stack, others): (Vec<_>, Vec<_>) = rows.iter().partition(|row| row.asked.is_some());
    let places = || stack.iter().map(|row| (mib(row), row.perplexity));
    chart.draw_series(LineSeries::new(places(), BLUE.stroke_width(2)))?;
    chart.draw_series(places().map(|place| Circle::new(place, 4, BLUE.filled())))?;
    for row in others {
        let place = (mib(row), row.perplexity);
        chart.draw_series([TriangleMarker::new(place, 6, RED.filled())])?;
        let style = ("sans-serif", 14).into_font().color(&RED);
        chart.draw_series([Text::new(format!("  {}", row.name), place, style)])?;
    }
    root.present()?;
    Ok(())
}
