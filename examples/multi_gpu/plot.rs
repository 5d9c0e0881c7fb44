//! The picture: latency against the number of GPUs, and one invalidation GPU by GPU.

use crate::profile::Command;
use crate::report::{Report, by_gpus, modes, time};
use crate::simulation::{Mode, Timeline};
use crate::tally::Row;
use plotters::coord::{CoordTranslate, Shift};
use plotters::prelude::*;
use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

const JOBS: RGBColor = RGBColor(0xc9, 0xc2, 0xb0);
const PREEMPT: RGBColor = RGBColor(0xe0, 0x8e, 0x2b);
const FIRST_PASS: RGBColor = RGBColor(0x10, 0x10, 0x10);
const INK: RGBColor = RGBColor(0x33, 0x33, 0x33);

fn color(mode: Mode) -> RGBColor {
    match mode {
        Mode::SinglePass => RGBColor(0xc0, 0x39, 0x2b),
        Mode::TwoPass => RGBColor(0x8e, 0x44, 0xad),
        Mode::RoundRobin => RGBColor(0x2a, 0x9d, 0x5c),
        Mode::PollDriven => RGBColor(0x1f, 0x6f, 0xb2),
    }
}

/// One invalidation in each mode.
pub type Example = BTreeMap<Mode, Timeline>;

pub type Canvas<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Writes the picture as SVG, with the same invalidation in each mode.
pub fn write(path: &Path, report: &Report, example: &Example) -> Result<(), Box<dyn Error>> {
    let draw = |root: &Canvas<'_>| {
        let (left, right) = root.split_horizontally(470);
        latencies(&left, report)?;
        lanes(&right, example)
    };
    Ok(std::fs::write(path, svg((1200, 720), draw)?)?)
}

/// A picture of this size, as the text of an SVG file.
pub fn svg(
    size: (u32, u32),
    draw: impl FnOnce(&Canvas<'_>) -> Result<(), Box<dyn Error>>,
) -> Result<String, Box<dyn Error>> {
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
    let groups = by_gpus(&report.rows);
    let Some((gpus, rows)) = groups.last_key_value() else { return Ok(()) };
    let values =
        || rows.values().flat_map(|row| row.percentiles_ns.iter().copied()).filter(|ns| *ns > 0);
    let (least, most) = (values().min().unwrap_or(1) as f64, values().max().unwrap_or(1) as f64);
    let mut chart = ChartBuilder::on(area)
        .caption(
            format!("Distribution with {gpus} GPUs"),
            ("sans-serif", 19).into_font().color(&INK),
        )
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
    for (mode, row) in rows {
        let style = color(*mode).stroke_width(3);
        let points = row
            .percentiles_ns
            .iter()
            .zip(0..)
            .map(|(ns, percent)| ((*ns).max(1) as f64, f64::from(percent)));
        chart
            .draw_series(LineSeries::new(points, style))?
            .label(mode.name())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], style));
    }
    name_series(&mut chart, SeriesLabelPosition::LowerRight, 14)
}

pub fn latencies(area: &Canvas<'_>, report: &Report) -> Result<(), Box<dyn Error>> {
    let most_gpus = report.rows.iter().map(|row| row.gpus).max().unwrap_or(1) as f64;
    let values = || report.rows.iter().flat_map(|row| [row.p50_ns, row.p99_ns]);
    let (least, most) = (
        values().filter(|ns| *ns > 0).min().unwrap_or(1) as f64,
        values().max().unwrap_or(1) as f64,
    );
    let mut chart = ChartBuilder::on(area)
        .caption("Latency of an invalidation", ("sans-serif", 19).into_font().color(&INK))
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(66)
        .build_cartesian_2d(
            (0.9..most_gpus * 1.15).log_scale().base(2.0),
            (least / 1.6..most * 1.6).log_scale(),
        )?;
    chart
        .configure_mesh()
        .x_desc("GPUs that mirror the memory")
        .x_label_formatter(&|gpus| format!("{gpus:.0}"))
        .y_label_formatter(&|ns| time(*ns as u64))
        .light_line_style(WHITE)
        .label_style(("sans-serif", 14).into_font().color(&INK))
        .draw()?;
    type Value = fn(&Row) -> u64;
    let values: [(&str, Value, u32); 2] =
        [("p99", |row| row.p99_ns, 1), ("median", |row| row.p50_ns, 3)];
    for (mode, (name, value, width)) in
        modes(&report.rows).into_iter().flat_map(|mode| values.map(|value| (mode, value)))
    {
        let rows = report.rows.iter().filter(|row| row.mode == mode);
        let points: Vec<_> = rows.map(|row| (row.gpus as f64, value(row).max(1) as f64)).collect();
        let style = color(mode).stroke_width(width);
        chart
            .draw_series(LineSeries::new(points.iter().copied(), style))?
            .label(format!("{}, {name}", mode.name()))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], style));
        chart
            .draw_series(points.iter().map(|point| Circle::new(*point, 3, color(mode).filled())))?;
    }
    name_series(&mut chart, SeriesLabelPosition::UpperLeft, 13)
}

pub fn lanes(area: &Canvas<'_>, example: &Example) -> Result<(), Box<dyn Error>> {
    let took = |timeline: &Timeline| (timeline.ended - timeline.began).as_nanos() as f64;
    let most = example.values().map(took).fold(1.0, f64::max);
    let halves = area.split_evenly((example.len().max(1), 1));
    for (area, (mode, timeline)) in halves.iter().zip(example) {
        let gpus = timeline.lanes.iter().map(|lane| lane.gpu + 1).max().unwrap_or(1);
        let what = timeline.event.map_or("no invalidation", |event| event.name());
        let caption = format!(
            "{}: one invalidation ({what}) took {}",
            mode.name(),
            time(took(timeline) as u64)
        );
        let mut chart = ChartBuilder::on(area)
            .caption(caption, ("sans-serif", 17).into_font().color(&INK))
            .margin(8)
            .x_label_area_size(34)
            .y_label_area_size(44)
            .build_cartesian_2d(0.0..most * 1.02, gpus as f64..0.0)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .light_line_style(WHITE)
            .x_desc("time since it began")
            .y_desc("GPU")
            .y_labels(5)
            .y_label_formatter(&|gpu| format!("{gpu:.0}"))
            .x_label_formatter(&|ns| time(*ns as u64))
            .label_style(("sans-serif", 12).into_font().color(&INK))
            .draw()?;
        let since = |at: std::time::Duration| at.saturating_sub(timeline.began).as_nanos() as f64;
        // The steps of each GPU, from the submission of each to its fence …
        let steps = timeline
            .lanes
            .iter()
            .flat_map(|lane| lane.steps.iter().map(|step| (lane.gpu as f64, *step)));
        let steps = steps.filter(|(_, step)| !step.latency.is_zero());
        chart.draw_series(steps.map(|(at, step)| {
            let color = match step.command {
                Command::Jobs => JOBS,
                Command::Preempt => PREEMPT,
                Command::TlbFlush => color(*mode),
            };
            Rectangle::new(
                [(since(step.submitted), at + 0.12), (since(step.done), at + 0.88)],
                color.filled(),
            )
        }))?;
        // … and its first pass.
        let width = most * 0.003;
        chart.draw_series(timeline.lanes.iter().map(|lane| {
            let (at, lane_at) = (since(lane.first_pass), lane.gpu as f64);
            Rectangle::new(
                [(at - width / 2.0, lane_at), (at + width / 2.0, lane_at + 1.0)],
                FIRST_PASS.filled(),
            )
        }))?;
        let legend = [
            ("first pass", FIRST_PASS),
            ("jobs in flight", JOBS),
            ("preemption", PREEMPT),
            ("TLB flush", color(*mode)),
        ];
        for (text, color) in legend {
            chart.draw_series(std::iter::empty::<Circle<(f64, f64), i32>>())?.label(text).legend(
                move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], color.filled()),
            );
        }
        let corner = if *mode == Mode::SinglePass {
            SeriesLabelPosition::LowerLeft
        } else {
            SeriesLabelPosition::LowerRight
        };
        name_series(&mut chart, corner, 11)?;
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
