//! The picture of the passes: latency against devices.
#![forbid(unsafe_code)]

use crate::passes::{Mode, Passes, Row};
use crate::report::millis;
use plotters::prelude::*;
use std::error::Error;
use std::path::Path;

const INK: RGBColor = RGBColor(0x33, 0x33, 0x33);

fn color(mode: Mode) -> RGBColor {
    match mode {
        Mode::OneByOne => RGBColor(0xc0, 0x39, 0x2b),
        Mode::AllAtOnce => RGBColor(0x1f, 0x6f, 0xb2),
    }
}

/// Writes the picture as SVG.
pub fn write(path: &Path, passes: &Passes) -> Result<(), Box<dyn Error>> {
    let mut text = String::new();
    draw(&SVGBackend::with_string(&mut text, (760, 520)).into_drawing_area(), passes)?;
    Ok(std::fs::write(path, text)?)
}

fn draw(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    passes: &Passes,
) -> Result<(), Box<dyn Error>> {
    area.fill(&WHITE)?;
    let most = passes.rows.iter().map(|row| row.devices).max().unwrap_or(1) as f64;
    let values = || {
        passes
            .rows
            .iter()
            .flat_map(|row| [row.total_ns, row.slowest_ns, row.sum_ns])
            .filter(|ns| *ns > 0)
    };
    let (least, longest) = (values().min().unwrap_or(1) as f64, values().max().unwrap_or(1) as f64);
    let mut chart = ChartBuilder::on(area)
        .caption(
            "One invalidation and several Vulkan devices",
            ("sans-serif", 19).into_font().color(&INK),
        )
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(66)
        .build_cartesian_2d(
            (0.9..most * 1.15).log_scale().base(2.0),
            (least / 1.6..longest * 1.6).log_scale(),
        )?;
    chart
        .configure_mesh()
        .x_desc(format!(
            "devices, each with {} × {} ms of work in flight",
            passes.depth, passes.work_ms
        ))
        .x_label_formatter(&|devices| format!("{devices:.0}"))
        .y_label_formatter(&|ns| millis(*ns as u64))
        .light_line_style(WHITE)
        .label_style(("sans-serif", 14).into_font().color(&INK))
        .draw()?;
    type Value = fn(&Row) -> u64;
    let series: [(Mode, &str, Value, u32); 4] = [
        (Mode::OneByOne, "total", |row| row.total_ns, 3),
        (Mode::OneByOne, "sum of the waits", |row| row.sum_ns, 1),
        (Mode::AllAtOnce, "total", |row| row.total_ns, 3),
        (Mode::AllAtOnce, "slowest wait", |row| row.slowest_ns, 1),
    ];
    for (mode, name, value, width) in series {
        let rows = passes.rows.iter().filter(|row| row.mode == mode);
        let points: Vec<_> =
            rows.map(|row| (row.devices as f64, value(row).max(1) as f64)).collect();
        let style = color(mode).stroke_width(width);
        chart
            .draw_series(LineSeries::new(points.iter().copied(), style))?
            .label(format!("{}, {name}", mode.name()))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], style));
        chart
            .draw_series(points.iter().map(|point| Circle::new(*point, 3, color(mode).filled())))?;
    }
    let mut labels = chart.configure_series_labels();
    labels
        .position(SeriesLabelPosition::UpperLeft)
        .label_font(("sans-serif", 13).into_font().color(&INK));
    labels.background_style(WHITE.mix(0.9)).border_style(INK.mix(0.3)).draw()?;
    area.present()?;
    Ok(())
}
