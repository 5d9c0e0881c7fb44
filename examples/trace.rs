//! The spans of the multi-GPU run, for Perfetto (<https://ui.perfetto.dev>) or `chrome://tracing`,
//! and one invalidation of it as a picture.
//!
//! `cargo run --release --features tracing --example trace -- trace.json trace.svg`. The library
//! makes a span of each invalidation; the driver's own spans, one for each wait for a device, lie
//! inside it, because first passes run there. In real time, on tokio.
#![allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    unused_imports,
    clippy::print_stdout,
    clippy::print_stderr
)]

#[path = "multi_gpu/driver.rs"]
mod driver;
#[path = "multi_gpu/fault.rs"]
mod fault;
#[path = "multi_gpu/gpu.rs"]
mod gpu;
#[path = "multi_gpu/memory/mod.rs"]
mod memory;
#[path = "multi_gpu/oracle.rs"]
mod oracle;
#[path = "multi_gpu/profile.rs"]
mod profile;
#[path = "multi_gpu/record.rs"]
mod record;
#[path = "multi_gpu/recording/mod.rs"]
mod recording;
#[path = "multi_gpu/runtime.rs"]
mod runtime;
#[path = "multi_gpu/schedule.rs"]
mod schedule;
#[path = "multi_gpu/simulation.rs"]
mod simulation;
#[path = "multi_gpu/tally.rs"]
mod tally;

use plotters::prelude::*;
use serde::Deserialize;
use simulation::{Mode, Settings};
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tracing_subscriber::layer::SubscriberExt;

const GPUS: usize = 8;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [json, svg] = arguments.as_slice() else {
        eprintln!(
            "usage: trace TRACE.json PICTURE.svg\n  TRACE.json is for https://ui.perfetto.dev, PICTURE.svg shows one invalidation of it"
        );
        return ExitCode::from(2);
    };
    match record(json).and_then(|()| draw(json, svg)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

/// Runs 60 invalidations of a recorded program, and writes their spans.
fn record(json: &str) -> Result<(), Box<dyn Error>> {
    let file = std::fs::File::create(json)
        .map_err(|error| format!("{json} cannot be written: {error}"))?;
    let (layer, written) = tracing_chrome::ChromeLayerBuilder::new()
        .writer(file)
        .trace_style(tracing_chrome::TraceStyle::Async)
        .include_args(true)
        .build();
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(layer))?;
    let (_, recording) = recording::open(&[], false)?;
    let micros = Duration::from_micros;
    let model = profile::Model {
        seed: 1,
        profile: profile::Profile::Mixed,
        costs: profile::Costs {
            zap: micros(1),
            submit: micros(2),
            interrupt: micros(1),
            wake: micros(2),
        },
        floor: micros(300),
        dma_interval: micros(250),
        resident_pages: 4,
        fault: micros(30),
        change: micros(2),
        reclaim: Duration::ZERO,
    };
    let settings = Settings {
        model,
        gpus: GPUS,
        mode: Mode::PollDriven,
        fault: None,
        real_time: true,
        threads: true,
        all_processes: false,
        most_invalidations: Some(60),
    };
    let plan = schedule::Plan::new(&recording, micros(50), 1);
    let row = simulation::run(&Arc::new(plan), settings, || ())?.row;
    drop(written);
    println!(
        "{} invalidations of {} GPUs are in {json}: open it at https://ui.perfetto.dev",
        row.invalidations, row.gpus
    );
    Ok(())
}

/// An event of the trace format: `b` begins a span, `e` ends it; `id` is that of the invalidation.
#[derive(Deserialize)]
struct TraceEvent {
    ph: String,
    name: String,
    /// In µs; names of threads have none.
    #[serde(default)]
    ts: f64,
    id: Option<u64>,
    #[serde(default)]
    args: BTreeMap<String, String>,
}

impl TraceEvent {
    /// A field of the span, which is written as `Debug` writes it.
    fn field(&self, name: &str) -> &str {
        self.args.get(name).map_or("", |value| value.trim_matches('"'))
    }
}

/// A span of the picture, in µs.
struct Bar {
    name: String,
    from: f64,
    to: f64,
}

/// The spans of one invalidation, and those that have not ended: their names and places.
type Spans = (Vec<Bar>, Vec<(String, usize)>);

/// Draws an invalidation in which all GPUs took part; some preempted, some had jobs in flight.
fn draw(json: &str, svg: &str) -> Result<(), Box<dyn Error>> {
    let events: Vec<TraceEvent> = serde_json::from_str(&std::fs::read_to_string(json)?)?;
    let mut invalidations: BTreeMap<u64, Spans> = BTreeMap::new();
    for event in events.iter().filter(|event| event.ph == "b" || event.ph == "e") {
        let Some(id) = event.id else { continue };
        let (bars, open) = invalidations.entry(id).or_default();
        // Two spans of one name overlap, but the device tells them apart.
        let key = format!("{} {}", event.name, event.field("gpu"));
        if event.ph == "b" {
            open.push((key.clone(), bars.len()));
            let name = match event.field("gpu") {
                "" => format!("{} {} {}", event.name, event.field("event"), event.field("range")),
                gpu => format!("gpu{gpu}: {}", event.name),
            };
            bars.push(Bar { name, from: event.ts, to: event.ts });
        } else if let Some(at) = open.iter().position(|(open, _)| *open == key) {
            let (_, bar) = open.remove(at);
            bars[bar].to = event.ts;
        }
    }
    let preempts = |bars: &[Bar]| {
        bars.iter().filter(|bar| bar.name.contains("preemption")).count() + bars.len()
    };
    let finished = invalidations
        .into_values()
        .filter(|(bars, open)| open.is_empty() && bars.len() > GPUS)
        .map(|(bars, _)| bars);
    // One that came while another one had the GPUs has more spans than its own.
    let once = |bars: &Vec<Bar>| {
        bars.iter().map(|bar| &bar.name).collect::<BTreeSet<_>>().len() == bars.len()
    };
    let bars = finished
        .filter(once)
        .max_by_key(|bars| preempts(bars).min(GPUS * 2))
        .ok_or("the trace has no invalidation of one mapping that all GPUs took part in")?;
    let (began, ended) = bars
        .iter()
        .fold((f64::MAX, f64::MIN), |(from, to), bar| (from.min(bar.from), to.max(bar.to)));

    let root = SVGBackend::new(svg, (900, 40 + 30 * bars.len() as u32 + 60)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption("Spans of one invalidation", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .build_cartesian_2d(0.0..(ended - began) * 1.02, bars.len() as f64..0.0)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .light_line_style(WHITE)
        .x_desc("µs since it began")
        .draw()?;
    for (bar, lane) in bars.iter().zip((0..).map(f64::from)) {
        let color = match bar.name.as_str() {
            name if name.contains("preemption") => RGBColor(0xe0, 0x8e, 0x2b),
            name if name.contains("jobs") => RGBColor(0xc9, 0xc2, 0xb0),
            name if name.contains("flush") => RGBColor(0x7f, 0xb3, 0xd9),
            _ => RGBColor(0xd0, 0xd0, 0xd0),
        };
        let corners = [(bar.from - began, lane + 0.08), (bar.to - began, lane + 0.92)];
        let label = format!("{}  {:.0} µs", bar.name, bar.to - bar.from);
        chart.draw_series([Rectangle::new(corners, color.filled())])?;
        chart.draw_series([Text::new(
            label,
            (bar.from - began + (ended - began) * 0.006, lane + 0.28),
            ("sans-serif", 14),
        )])?;
    }
    root.present().map_err(|error| format!("{svg} cannot be written: {error}"))?;
    println!("one of them, with {} spans, is drawn in {svg}", bars.len());
    Ok(())
}
