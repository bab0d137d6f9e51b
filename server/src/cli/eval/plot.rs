//! Quality against speed and against memory, with the Pareto front of each.

use std::path::Path;

use plotters::prelude::*;
use plotters::style::register_font;

use super::measure::Row;

/// Least increase of perplexity shown on the logarithmic axis, in percent.
const FLOOR: f64 = 0.1;
const SIZE: (u32, u32) = (1400, 640);

/// A plan's place in one of the two charts.
struct Point<'a> {
    name: &'a str,
    /// Better to the right.
    x: f64,
    /// Increase of perplexity in percent: better below.
    y: f64,
}

/// Draws both charts beside each other into a PNG file.
///
/// # Errors
/// A sentence, when the file cannot be drawn or written.
pub(super) fn front(path: &Path, title: &str, rows: &[Row]) -> Result<(), String> {
    register_fonts()?;
    draw(path, title, rows).map_err(|e| format!("{}: {e}", path.display()))
}

/// Gives plots a font: the bitmap backend has none of its own, and servers often have none.
///
/// # Errors
/// When the built-in font cannot be read.
pub(in crate::cli) fn register_fonts() -> Result<(), String> {
    register_font("sans-serif", FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT)
        .map_err(|_| "the built-in font cannot be read".to_owned())
}

fn draw<'a>(path: &'a Path, title: &str, rows: &[Row]) -> Result<(), Box<dyn std::error::Error + 'a>> {
    let root = BitMapBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let root = root.titled(title, ("sans-serif", 24))?;
    let halves = root.split_evenly((1, 2));
    let dense_kv = rows.first().map_or(1.0, |row| row.kv_bytes as f64);
    let speed = |row: &Row| row.decode.last().map_or(1.0, |decode| decode.speedup);
    let kv_saved = |row: &Row| 100.0 * (1.0 - row.kv_bytes as f64 / dense_kv);
    let batch = rows.first().and_then(|row| row.decode.last()).map_or(1, |decode| decode.batch);
    chart(&halves[0], &format!("decode speed-up over dense, batch {batch}"), &points(rows, speed))?;
    chart(&halves[1], "KV bytes saved, %", &points(rows, kv_saved))?;
    root.present()?;
    Ok(())
}

fn points<'a>(rows: &'a [Row], x: impl Fn(&Row) -> f64) -> Vec<Point<'a>> {
    let point = |row: &'a Row| Point { name: &row.name, x: x(row), y: 100.0 * row.perplexity_increase };
    rows.iter().map(point).collect()
}

/// The points that no other point beats in both, from left to right.
fn pareto<'a>(points: &'a [Point<'a>]) -> Vec<&'a Point<'a>> {
    let beats = |a: &Point<'_>, b: &Point<'_>| a.x >= b.x && a.y <= b.y && (a.x > b.x || a.y < b.y);
    let mut front: Vec<_> = points.iter().filter(|p| !points.iter().any(|other| beats(other, p))).collect();
    front.sort_by(|a, b| a.x.total_cmp(&b.x));
    front
}

fn chart<'a>(
    area: &DrawingArea<BitMapBackend<'a>, plotters::coord::Shift>,
    label: &str,
    points: &[Point<'_>],
) -> Result<(), Box<dyn std::error::Error + 'a>> {
    let most = |of: fn(&Point<'_>) -> f64| points.iter().map(of).fold(f64::NEG_INFINITY, f64::max);
    let (low, high) = (points.iter().map(|p| p.x).fold(f64::INFINITY, f64::min), most(|p| p.x));
    let width = (high - low).max(0.05);
    // Names stand to the right of their points.
    let across = (low - 0.05 * width)..(high + 0.35 * width);
    let down = (0.8 * FLOOR..2.0 * most(|p| p.y).max(FLOOR)).log_scale();
    let mut chart = ChartBuilder::on(area)
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(60)
        .build_cartesian_2d(across, down)?;
    chart
        .configure_mesh()
        .x_desc(label)
        .y_desc("perplexity over dense, % (0.1 and less at the bottom)")
        .label_style(("sans-serif", 15))
        .light_line_style(WHITE)
        .draw()?;
    let front = pareto(points);
    chart.draw_series(LineSeries::new(front.iter().map(|p| (p.x, p.y.max(FLOOR))), BLUE.stroke_width(2)))?;
    for point in points {
        let on_front = front.iter().any(|other| std::ptr::eq(*other, point));
        let color = if on_front { BLUE } else { RGBColor(150, 150, 150) };
        chart.draw_series([Circle::new((point.x, point.y.max(FLOOR)), 4, color.filled())])?;
        let text = Text::new(
            format!("  {}", point.name),
            (point.x, point.y.max(FLOOR)),
            ("sans-serif", 13).into_font().color(&color),
        );
        chart.draw_series([text])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_front_is_what_nothing_beats() {
        let point = |name, x, y| Point { name, x, y };
        let points = [point("d", 1.0, 0.0), point("a", 1.2, 3.0), point("b", 1.1, 5.0), point("c", 1.5, 9.0)];
        let names: Vec<_> = pareto(&points).iter().map(|p| p.name).collect();
        assert_eq!(names, ["d", "a", "c"]);
    }
}
