//! The table, JSON and the picture.

use crate::fleet::Measured;
use crate::options::Options;
use plotters::prelude::*;
use serde::Serialize;
use std::error::Error;
use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

/// Median and 99th percentile, in µs.
#[derive(Clone, Copy, Serialize)]
pub struct Times {
    p50: f64,
    p99: f64,
}

#[derive(Serialize)]
pub struct Row {
    hosts: u32,
    fan_out: Times,
    tree: Times,
    stragglers: Times,
    loss: Times,
    /// One invalidation with a dead host each, in µs.
    dead: Option<f64>,
    dead_leaf_of_tree: Option<f64>,
    dead_inner_of_tree: Option<f64>,
    /// The share of time that the owner works to keep leases, without a tree and with it.
    owner_busy: f64,
    owner_busy_of_tree: f64,
    pub stale: u64,
}

impl Times {
    fn of(measured: &Measured) -> Self {
        let at = |share: f64| {
            let index = ((measured.times.len() as f64 * share) as usize)
                .min(measured.times.len().saturating_sub(1));
            measured.times.get(index).map_or(0.0, |time| micros(*time))
        };
        Self { p50: at(0.5), p99: at(0.99) }
    }
}

fn micros(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1e3
}

impl Row {
    pub fn new(hosts: u32, measured: &[Measured; 4], killed: &[Option<Measured>; 3]) -> Self {
        let [fan_out, tree, stragglers, loss] = measured;
        let dead = |at: usize| killed[at].as_ref().and_then(|measured| measured.dead).map(micros);
        let all = measured.iter().chain(killed.iter().flatten());
        Self {
            hosts,
            fan_out: Times::of(fan_out),
            tree: Times::of(tree),
            stragglers: Times::of(stragglers),
            loss: Times::of(loss),
            dead: dead(0),
            dead_leaf_of_tree: dead(1),
            dead_inner_of_tree: dead(2),
            owner_busy: fan_out.owner_busy,
            owner_busy_of_tree: tree.owner_busy,
            stale: all.map(|measured| measured.stale).sum(),
        }
    }
}

fn time(micros: f64) -> String {
    let (number, unit) = match micros {
        _ if micros < 1e3 => (micros, "µs"),
        _ if micros < 1e6 => (micros / 1e3, "ms"),
        _ => (micros / 1e6, "s "),
    };
    let digits = if number < 10.0 { 2 } else { usize::from(number < 100.0) };
    format!("{number:>5.digits$} {unit}")
}

fn pair(times: Times) -> String {
    format!("{} {}", time(times.p50), time(times.p99))
}

pub fn table(options: &Options, rows: &[Row]) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "{} GPUs a host, flush {:?} (median), round trip {:?}, {:?} of a processor for each message, term {:?}; seed {}\n",
        options.gpus, options.flush, options.rtt, options.message, options.term, options.seed
    );
    let _ = writeln!(
        text,
        "       │  the owner tells  │ a tree of {:>4}    │ stragglers {:>4}%  │ loss {:>5}%       │   one with a host dead, once   │ its processor,",
        options.fan_out,
        options.stragglers * 1e2,
        options.loss * 1e2
    );
    let _ = writeln!(
        text,
        "       │       them        │                   │                   │                   │                                │ for leases"
    );
    let _ = writeln!(
        text,
        " hosts │    p50      p99   │    p50      p99   │    p50      p99   │    p50      p99   │ in no tree  a leaf  inner host │ no tree   tree"
    );
    let _ = writeln!(
        text,
        "───────┼───────────────────┼───────────────────┼───────────────────┼───────────────────┼────────────────────────────────┼───────────────"
    );
    for row in rows {
        let dead = |time_of: Option<f64>| time_of.map_or_else(|| "       –".into(), time);
        let _ = writeln!(
            text,
            "{:>6} │ {} │ {} │ {} │ {} │ {}  {}   {}  │ {:>5.1} % {:>5.1} %",
            row.hosts,
            pair(row.fan_out),
            pair(row.tree),
            pair(row.stragglers),
            pair(row.loss),
            dead(row.dead),
            dead(row.dead_leaf_of_tree),
            dead(row.dead_inner_of_tree),
            row.owner_busy * 1e2,
            row.owner_busy_of_tree * 1e2
        );
    }
    let stale: u64 = rows.iter().map(|row| row.stale).sum();
    let checked = rows.iter().map(|row| u64::from(row.hosts)).sum::<u64>()
        * u64::from(options.gpus)
        * u64::from(options.invalidations)
        * 4;
    let _ = writeln!(
        text,
        "\n{checked} times a GPU was looked at when memory changed: {stale} could still reach it."
    );
    let _ = writeln!(text, "\n{}", found(options, rows));
    text
}

/// What the numbers say, from the numbers.
fn found(options: &Options, rows: &[Row]) -> String {
    let deep = |row: &&Row| row.hosts > options.fan_out;
    let wins = rows.iter().filter(deep).find(|row| row.tree.p50 < row.fan_out.p50);
    let mut text = match wins {
        Some(row) => format!(
            "Found: from {} hosts on, a tree is faster than telling every host by oneself ({} against {})",
            row.hosts,
            time(row.tree.p50).trim(),
            time(row.fan_out.p50).trim()
        ),
        None => "Found: telling every host by oneself is faster than a tree, or as fast, at each of these sizes".into(),
    };
    if let Some(row) = rows.iter().rfind(deep)
        && let (Some(flat), Some(inner)) = (row.dead, row.dead_inner_of_tree)
    {
        let _ = write!(
            text,
            "; but a dead inner host costs {} instead of {}",
            time(inner).trim(),
            time(flat).trim()
        );
    }
    if rows.iter().any(|row| deep(&row)) {
        let _ = write!(
            text,
            ".\nAn inner host is waited for longer than the others: its lease covers the time that the hosts below it may take"
        );
    }
    // Two messages there and two back a renewal, five renewals a term.
    let full = options.term.as_secs_f64() / (10.0 * options.message.as_secs_f64());
    let _ = write!(
        text,
        ".\nRenewals alone keep the owner's processor busy at {full:.0} hosts (10 messages a term and host)."
    );
    text
}

pub fn json(options: &Options, rows: &[Row]) -> String {
    let object = serde_json::json!({
        "gpus": options.gpus, "rtt_us": micros(options.rtt), "message_us": micros(options.message), "flush_us": micros(options.flush),
        "term_us": micros(options.term), "fan_out": options.fan_out, "seed": options.seed, "rows": rows,
    });
    object.to_string()
}

pub fn plot(path: &Path, rows: &[Row]) -> Result<(), Box<dyn Error>> {
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, (760, 460)).into_drawing_area();
        root.fill(&WHITE)?;
        let last = f64::from(rows.iter().map(|row| row.hosts).max().unwrap_or(1)).max(2.0);
        let values = |row: &Row| [row.fan_out.p50, row.tree.p50, row.stragglers.p50, row.loss.p99];
        let least = rows.iter().flat_map(values).fold(f64::MAX, f64::min) / 1e3;
        let most = rows.iter().flat_map(values).fold(0.0, f64::max) / 1e3;
        let mut chart = ChartBuilder::on(&root)
            .caption("One invalidation of all GPUs, against hosts", ("sans-serif", 18))
            .margin(16)
            .x_label_area_size(40)
            .y_label_area_size(64)
            .build_cartesian_2d((1.0..last).log_scale(), (least * 0.8..most * 1.3).log_scale())?;
        let number = |value: &f64| format!("{value}");
        chart
            .configure_mesh()
            .x_desc("hosts")
            .y_desc("ms")
            .x_label_formatter(&number)
            .y_label_formatter(&number)
            .light_line_style(TRANSPARENT)
            .draw()?;
        let line = |of: fn(&Row) -> f64| {
            rows.iter().map(|row| (f64::from(row.hosts), of(row) / 1e3)).collect::<Vec<_>>()
        };
        type Series = (&'static str, RGBColor, fn(&Row) -> f64);
        let series: [Series; 4] = [
            ("the owner tells every host", RGBColor(0x1f, 0x6f, 0xb2), |row| row.fan_out.p50),
            ("a tree", RGBColor(0x2a, 0x9d, 0x5c), |row| row.tree.p50),
            ("with stragglers", RGBColor(0xe0, 0x8e, 0x2b), |row| row.stragglers.p50),
            ("with loss (p99)", RGBColor(0xc0, 0x39, 0x2b), |row| row.loss.p99),
        ];
        for (name, color, of) in series {
            let points = line(of);
            chart.draw_series(points.iter().map(|point| Circle::new(*point, 3, color.filled())))?;
            let drawn = chart.draw_series(LineSeries::new(points, color.stroke_width(2)))?;
            drawn.label(name).legend(move |(x, y)| {
                PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2))
            });
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.8))
            .draw()?;
        root.present()?;
    }
    Ok(std::fs::write(path, text)?)
}
