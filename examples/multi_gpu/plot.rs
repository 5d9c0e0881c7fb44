//! The picture: latency against the number of GPUs, and one invalidation GPU by GPU.

use crate::gpu::Command;
use crate::report::{Report, pairs, time};
use crate::simulation::{Row, Timeline};
use plotters::coord::{CoordTranslate, Shift};
use plotters::prelude::*;
use std::error::Error;
use std::path::Path;

const SINGLE: RGBColor = RGBColor(0xc0, 0x39, 0x2b);
const MULTI: RGBColor = RGBColor(0x1f, 0x6f, 0xb2);
const PREEMPT: RGBColor = RGBColor(0xe0, 0x8e, 0x2b);
const FIRST_PASS: RGBColor = RGBColor(0x10, 0x10, 0x10);
const INK: RGBColor = RGBColor(0x33, 0x33, 0x33);

pub type Canvas<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Writes the picture as SVG. The timelines are of the same invalidation in both modes, single-pass first.
pub fn write(path: &Path, report: &Report, timelines: &[Timeline; 2]) -> Result<(), Box<dyn Error>> {
    let draw = |root: &Canvas<'_>| {
        let (left, right) = root.split_horizontally(470);
        latencies(&left, report)?;
        lanes(&right, timelines)
    };
    Ok(std::fs::write(path, svg((1120, 560), draw)?)?)
}

/// A picture of this size, as the text of an SVG file.
pub fn svg(size: (u32, u32), draw: impl FnOnce(&Canvas<'_>) -> Result<(), Box<dyn Error>>) -> Result<String, Box<dyn Error>> {
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, size).into_drawing_area();
        root.fill(&WHITE)?;
        draw(&root)?;
        root.present()?;
    }
    Ok(text)
}

/// Which part of the invalidations of the most GPUs took no longer than that.
pub fn distribution(area: &Canvas<'_>, report: &Report) -> Result<(), Box<dyn Error>> {
    let Some((single, multi)) = pairs(&report.rows).max_by_key(|(single, _)| single.gpus) else { return Ok(()) };
    let values = || single.percentiles_ns.iter().chain(&multi.percentiles_ns).copied().filter(|ns| *ns > 0);
    let (least, most) = (values().min().unwrap_or(1) as f64, values().max().unwrap_or(1) as f64);
    let mut chart = ChartBuilder::on(area)
        .caption(format!("Distribution with {} GPUs", single.gpus), ("sans-serif", 19).into_font().color(&INK))
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(66)
        .build_cartesian_2d((least / 1.3..most * 1.3).log_scale(), 0.0..100.0)?;
    chart
        .configure_mesh()
        .x_desc("latency of an invalidation")
        .y_desc("% that took no longer")
        .x_label_formatter(&|ns| time(*ns as u64))
        .y_label_formatter(&|percent| format!("{percent:.0}"))
        .light_line_style(WHITE)
        .label_style(("sans-serif", 14).into_font().color(&INK))
        .draw()?;
    for (name, row, color) in [("single-pass", single, SINGLE), ("multi-pass", multi, MULTI)] {
        let points = row.percentiles_ns.iter().zip(0..).map(|(ns, percent)| ((*ns).max(1) as f64, f64::from(percent)));
        chart
            .draw_series(LineSeries::new(points, color.stroke_width(3)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], color.stroke_width(3)));
    }
    name_series(&mut chart, SeriesLabelPosition::LowerRight, 14)
}

pub fn latencies(area: &Canvas<'_>, report: &Report) -> Result<(), Box<dyn Error>> {
    let rows: Vec<(&Row, &Row)> = pairs(&report.rows).collect();
    let most_gpus = rows.iter().map(|(single, _)| single.gpus).max().unwrap_or(1) as f64;
    let values = || rows.iter().flat_map(|(single, multi)| [single.p50_ns, single.p99_ns, multi.p50_ns, multi.p99_ns]);
    let (least, most) = (values().filter(|ns| *ns > 0).min().unwrap_or(1) as f64, values().max().unwrap_or(1) as f64);
    let mut chart = ChartBuilder::on(area)
        .caption("Latency of an invalidation", ("sans-serif", 19).into_font().color(&INK))
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(66)
        .build_cartesian_2d((0.9..most_gpus * 1.15).log_scale().base(2.0), (least / 1.6..most * 1.6).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("GPUs that mirror the memory")
        .x_label_formatter(&|gpus| format!("{gpus:.0}"))
        .y_label_formatter(&|ns| time(*ns as u64))
        .light_line_style(WHITE)
        .label_style(("sans-serif", 14).into_font().color(&INK))
        .draw()?;
    type Value = fn(&Row) -> u64;
    let curves: [(&str, bool, Value, RGBColor, u32); 4] = [
        ("single-pass, p99", true, |row| row.p99_ns, SINGLE, 1),
        ("single-pass, median", true, |row| row.p50_ns, SINGLE, 3),
        ("multi-pass, p99", false, |row| row.p99_ns, MULTI, 1),
        ("multi-pass, median", false, |row| row.p50_ns, MULTI, 3),
    ];
    for (name, single, value, color, width) in curves {
        let points: Vec<_> = rows
            .iter()
            .map(|(of_single, of_multi)| (of_single.gpus as f64, value(if single { of_single } else { of_multi }).max(1) as f64))
            .collect();
        let style = color.stroke_width(width);
        chart
            .draw_series(LineSeries::new(points.iter().copied(), style))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], style));
        chart.draw_series(points.iter().map(|point| Circle::new(*point, 3, color.filled())))?;
    }
    name_series(&mut chart, SeriesLabelPosition::LowerRight, 14)
}

pub fn lanes(area: &Canvas<'_>, timelines: &[Timeline; 2]) -> Result<(), Box<dyn Error>> {
    let most = timelines.iter().map(|timeline| (timeline.ended - timeline.began).as_nanos()).max().unwrap_or(1).max(1) as f64;
    let halves = area.split_evenly((2, 1));
    for ((area, timeline), (name, color, corner)) in halves
        .iter()
        .zip(timelines)
        .zip([("Single-pass", SINGLE, SeriesLabelPosition::LowerLeft), ("Multi-pass", MULTI, SeriesLabelPosition::LowerRight)])
    {
        let gpus = timeline.lanes.iter().map(|lane| lane.gpu + 1).max().unwrap_or(1);
        let took = (timeline.ended - timeline.began).as_nanos();
        let what = timeline.event.map_or("no invalidation", |event| event.name());
        let caption = format!("{name}: one invalidation ({what}) took {}", time(took as u64));
        let mut chart = ChartBuilder::on(area)
            .caption(caption, ("sans-serif", 19).into_font().color(&INK))
            .margin(14)
            .x_label_area_size(40)
            .y_label_area_size(44)
            .build_cartesian_2d(0.0..most * 1.02, gpus as f64..0.0)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .light_line_style(WHITE)
            .x_desc("time since it began")
            .y_desc("GPU")
            .y_labels(9)
            .y_label_formatter(&|gpu| format!("{gpu:.0}"))
            .x_label_formatter(&|ns| time(*ns as u64))
            .label_style(("sans-serif", 13).into_font().color(&INK))
            .draw()?;
        let since = |at: std::time::Duration| at.saturating_sub(timeline.began).as_nanos() as f64;
        // The wait of each GPU, from its first pass to the end of its work …
        chart.draw_series(timeline.lanes.iter().map(|lane| {
            let color = if lane.command == Command::Preempt { PREEMPT } else { color };
            let lane_at = lane.gpu as f64;
            Rectangle::new([(since(lane.first_pass), lane_at + 0.12), (since(lane.done), lane_at + 0.88)], color.filled())
        }))?;
        // … and its first pass.
        let width = most * 0.004;
        chart.draw_series(timeline.lanes.iter().map(|lane| {
            let (at, lane_at) = (since(lane.first_pass), lane.gpu as f64);
            Rectangle::new([(at - width / 2.0, lane_at), (at + width / 2.0, lane_at + 1.0)], FIRST_PASS.filled())
        }))?;
        let legend = [("first pass", FIRST_PASS), ("wait: TLB flush", color), ("wait: preemption", PREEMPT)];
        for (text, color) in legend {
            chart
                .draw_series(std::iter::empty::<Circle<(f64, f64), i32>>())?
                .label(text)
                .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], color.filled()));
        }
        name_series(&mut chart, corner, 13)?;
    }
    Ok(())
}

/// Names the series of a chart, in one of its corners.
fn name_series<'a, 'b: 'a, C: CoordTranslate>(
    chart: &mut ChartContext<'a, SVGBackend<'b>, C>,
    corner: SeriesLabelPosition,
    size: i32,
) -> Result<(), Box<dyn Error>> {
    let mut labels = chart.configure_series_labels();
    labels.position(corner).label_font(("sans-serif", size).into_font().color(&INK));
    labels.background_style(WHITE.mix(0.9)).border_style(INK.mix(0.3)).draw()?;
    Ok(())
}
