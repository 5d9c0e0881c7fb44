//! G simulated GPUs mirror the memory of a program whose memory calls were recorded: what four ways
//! to wait for them are worth. See `--help`.
#![allow(missing_docs, unreachable_pub, clippy::print_stdout, clippy::print_stderr)]

mod compare;
mod driver;
mod fault;
mod gpu;
mod html;
mod memory;
mod options;
mod oracle;
mod plot;
mod profile;
mod record;
mod recording;
mod report;
mod runtime;
mod schedule;
mod simulation;
mod tally;
#[cfg(test)]
mod tests;

use clap::Parser;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use options::Options;
use plot::Example;
use report::{Report, Workload};
use schedule::Plan;
use simulation::{Outcome, Settings, Timeline};
use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

fn main() -> ExitCode {
    let options = Options::parse();
    let outcome = match options.compare.as_deref() {
        Some([a, b]) => compare_reports(a, b).map(|()| 0),
        _ => run(&options),
    };
    match outcome {
        Ok(0) => ExitCode::SUCCESS,
        Ok(stale) => {
            eprintln!(
                "error: {stale} DMA accesses used a mapping of memory that had changed since the device looked at it"
            );
            ExitCode::from(1)
        }
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::from(2)
        }
    }
}

fn compare_reports(a: &Path, b: &Path) -> Result<(), String> {
    let (of_a, of_b) = (compare::read(a)?, compare::read(b)?);
    say(&compare::table([&a.display().to_string(), &b.display().to_string()], [&of_a, &of_b])?)
}

/// Prints a result. Who reads only its beginning has had enough.
fn say(text: &str) -> Result<(), String> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(format!("the result cannot be written: {error}"))
        }
        _ => Ok(()),
    }
}

/// Runs it all; returns the number of stale accesses.
fn run(options: &Options) -> Result<u64, String> {
    let (name, recording) =
        recording::open(&options.workload, options.lenient).map_err(|error| error.to_string())?;
    for remark in recording.remarks(options.verbose) {
        eprintln!("{remark}");
    }
    let plan = Arc::new(Plan::new(&recording, options.longest_pause, options.batch()));
    let workload = Workload::new(
        &name,
        &recording,
        plan.spaces,
        plan.followed_process.filter(|_| !options.all_processes),
    );
    drop(recording);

    let gpus = options.gpus();
    let modes = options.modes();
    let bar = progress_bar(modes.len() * gpus.len() * plan.calls.len(), options.json);
    let mut rows = Vec::new();
    // The picture shows an invalidation of as many GPUs as one can tell apart.
    let pictured = gpus.iter().copied().filter(|gpus| *gpus <= 16).max().unwrap_or(gpus[0]);
    let mut timelines = BTreeMap::new();
    for gpus in gpus {
        for mode in modes.iter().copied() {
            let settings = Settings {
                model: options.model(),
                gpus,
                mode,
                fault: options.fault,
                real_time: options.real_time,
                threads: options.threads,
                all_processes: options.all_processes,
                most_invalidations: options.limit.or(options.real_time.then_some(40)),
            };
            bar.set_message(format!("{gpus} GPUs"));
            let before = bar.position();
            let of_row = bar.clone();
            let Outcome { row, timelines: of_run } =
                simulation::run(&plan, settings, move || of_row.inc(1))
                    .map_err(|error| format!("tokio cannot be started: {error}"))?;
            bar.set_position(before + plan.calls.len() as u64);
            rows.push(row);
            if gpus == pictured {
                timelines.insert(mode, of_run);
            }
        }
    }
    bar.finish_and_clear();

    let report = Report {
        workload,
        profile: Some(options.profile),
        seed: options.seed,
        real_time: options.real_time,
        settings: options.settings(),
        rows,
    };
    let example = example(&timelines);
    if let Some(path) = &options.plot {
        plot::write(path, &report, &example).map_err(|error| {
            format!("the picture {} cannot be written: {error}", path.display())
        })?;
    }
    if let Some(path) = &options.report {
        html::write(path, &report, &example)
            .map_err(|error| format!("the report {} cannot be written: {error}", path.display()))?;
    }
    if options.json {
        say(&(serde_json::to_string(&report).map_err(|error| error.to_string())? + "\n"))?;
    } else {
        say(&report::table(&report))?;
    }
    Ok(report.rows.iter().map(|row| row.stale_accesses).sum())
}

/// What a GPU does for this invalidation, and not for another one.
fn own(timeline: &Timeline) -> impl Iterator<Item = &record::Step> {
    timeline.lanes.iter().flat_map(|lane| &lane.steps).filter(|step| !step.latency.is_zero())
}

/// The same invalidation in all modes: of those in which many GPUs have dependent steps the one in
/// which devices have the least else to do.
fn example(timelines: &BTreeMap<simulation::Mode, BTreeMap<u64, Timeline>>) -> Example {
    let in_all = |number: &u64| -> Option<Example> {
        timelines
            .iter()
            .map(|(mode, of_mode)| Some((*mode, of_mode.get(number)?.clone())))
            .collect()
    };
    let Some(last) = timelines.values().next_back() else { return Example::new() };
    let best = last
        .iter()
        .filter_map(|(number, timeline)| Some((timeline, in_all(number)?)))
        .max_by_key(|(timeline, example)| {
            let queued = |timeline: &Timeline| {
                own(timeline)
                    .map(|step| (step.done - step.submitted).saturating_sub(step.latency))
                    .sum::<Duration>()
            };
            let queued: Duration = example.values().map(queued).sum();
            // A quarter of them more or less makes no better picture.
            (own(timeline).count() * 4 / timeline.lanes.len().max(1), std::cmp::Reverse(queued))
        });
    best.map(|(_, example)| example).unwrap_or_default()
}

fn progress_bar(steps: usize, quiet: bool) -> ProgressBar {
    let target = if quiet || !std::io::stderr().is_terminal() {
        ProgressDrawTarget::hidden()
    } else {
        ProgressDrawTarget::stderr()
    };
    let style = ProgressStyle::with_template("{msg:>9} {wide_bar} {percent:>3} %  {eta} left");
    let bar = ProgressBar::with_draw_target(Some(steps as u64), target);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
