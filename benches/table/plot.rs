//! The curves as a picture.

use crate::curves::Curve;
use plotters::prelude::*;
use std::error::Error;
use std::path::Path;

/// Where "none" is drawn, for which a logarithmic axis has no place.
const ZERO: f64 = 0.3;

/// As it is read on an axis: 10k, 4M.
fn short(number: f64) -> String {
    match number {
        1e6.. => format!("{}M", number / 1e6),
        1e3.. => format!("{}k", number / 1e3),
        1.0.. | 0.0 => format!("{number}"),
        // Between none and one.
        _ => String::new(),
    }
}

/// Those with more than four points are curves; the others are comparisons that the table shows
/// better.
pub fn write(path: &Path, curves: &[Curve]) -> Result<(), Box<dyn Error>> {
    let curves: Vec<&Curve> = curves.iter().filter(|curve| curve.points.len() > 4).collect();
    let rows = curves.len().div_ceil(2).max(1);
    let root = SVGBackend::new(path, (1000, 380 * rows as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    for (area, curve) in root.split_evenly((rows, 2)).iter().zip(curves) {
        let most_x = curve.points.iter().map(|point| point.0).fold(1.0, f64::max);
        let most_y = curve.points.iter().map(|point| point.1).fold(1.0, f64::max);
        let least_x = if curve.points.iter().any(|point| point.0 < 1.0) { ZERO * 0.8 } else { 0.8 };
        let mut chart = ChartBuilder::on(area)
            .caption(curve.name, ("sans-serif", 13))
            .margin(12)
            .x_label_area_size(38)
            .y_label_area_size(58)
            .build_cartesian_2d((least_x..most_x * 1.4).log_scale(), 0.0..most_y * 1.15)?;
        chart
            .configure_mesh()
            .x_desc(curve.x)
            .y_desc(curve.y)
            .x_label_formatter(&|x| short(*x))
            .y_label_formatter(&|y| short(*y))
            .light_line_style(WHITE)
            .draw()?;
        let points: Vec<(f64, f64)> = curve.points.iter().map(|(x, y)| (x.max(ZERO), *y)).collect();
        chart.draw_series(LineSeries::new(points.iter().copied(), BLUE.stroke_width(2)))?;
        chart.draw_series(points.iter().map(|point| Circle::new(*point, 3, BLUE.filled())))?;
        let zeros = points.into_iter().filter(|point| point.0 < 1.0);
        chart.draw_series(zeros.map(|point| {
            EmptyElement::at(point) + Text::new("none", (6, 4), ("sans-serif", 11))
        }))?;
    }
    root.present()?;
    Ok(())
}
