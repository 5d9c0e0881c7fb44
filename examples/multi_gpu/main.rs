//! G simulated GPUs mirror the memory of a program whose memory calls were recorded: what starting all invalidations before waiting for
//! any is worth. See `--help`.
#![allow(missing_docs, unreachable_pub, clippy::print_stdout, clippy::print_stderr)]

mod compare;
mod gpu;
mod html;
mod memory;
mod plot;
mod recording;
mod report;
mod runtime;
mod simulation;
#[cfg(test)]
mod tests;

use clap::{Parser, ValueEnum};
use gpu::Model;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use report::{Report, Workload};
use simulation::{Mode, Outcome, Settings, Timeline};
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

/// Replays what a real program did with its memory while G simulated GPUs mirror that memory, and compares two ways to invalidate:
/// single-pass, which waits for one GPU after the other, and multi-pass, which starts all of them and then joins.
#[derive(Parser)]
#[command(name = "multi_gpu", after_long_help = EXAMPLES)]
struct Options {
    /// A recording made by: strace -f -ttt -e trace=%memory,clone,clone3,fork,vfork,execve,exit_group -o FILE PROGRAM
    ///
    /// A file, a directory, a pattern or `-` for standard input; several are one recording (strace -ff). The guide's page `recording`
    /// says which options of strace are understood. The default is a recording of a Python program that uses NumPy, which is built in.
    #[arg(long, value_name = "FILE")]
    workload: Vec<PathBuf>,

    /// How many GPUs, as a list
    #[arg(long, value_name = "N,N,…", value_delimiter = ',', default_value = "1,2,4,8,16,32,64", value_parser = clap::value_parser!(u16).range(1..=1024))]
    gpus: Vec<u16>,

    /// Seed of all random numbers; in virtual time the same seed gives the same output
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,

    /// Write a picture (SVG): latency against GPUs, and one invalidation GPU by GPU
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,

    /// Write a report (HTML, one file that needs no other): latency against GPUs, its distribution, one invalidation GPU by GPU, the figures
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,

    /// Compare two files that --json printed, instead of running anything
    #[arg(long, value_names = ["A.json", "B.json"], num_args = 2, conflicts_with_all = ["workload", "json", "plot", "report", "fault", "real_time"])]
    compare: Option<Vec<PathBuf>>,

    /// Count lines of the recording that cannot be parsed, instead of ending with an error
    #[arg(long)]
    lenient: bool,

    /// List what was not read as a call: skipped lines, notes, other system calls
    #[arg(short, long)]
    verbose: bool,

    /// Plant a bug, to see that the check finds it
    #[arg(long, value_name = "BUG")]
    fault: Option<Fault>,

    /// Run on tokio in real time instead of virtual time; then at most 40 invalidations a row, and no latency below 1 ms, unless set
    /// otherwise
    #[arg(long)]
    real_time: bool,

    /// Stop each row after so many invalidations
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,

    /// Share of the invalidations that preempt a context (100 µs to 5 ms, median 500 µs) instead of flushing the TLB (3 µs to 80 µs, median
    /// 12 µs); 0 to 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.1, value_parser = share)]
    preempt_share: f64,

    /// Raise every latency of the hardware to this, in µs
    #[arg(long, value_name = "µs")]
    latency_floor_us: Option<u64>,

    /// Mean time between two DMA accesses of a GPU, in µs
    #[arg(long, value_name = "µs", default_value_t = 250, value_parser = clap::value_parser!(u64).range(1..))]
    dma_interval_us: u64,

    /// Pages of each mapping that a GPU works on
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=4096))]
    resident_pages: u64,

    /// The program pauses between two calls as long as in the recording, but no longer than this, in µs
    #[arg(long, value_name = "µs", default_value_t = 50)]
    longest_pause_us: u64,
}

const EXAMPLES: &str = "\
Examples:
  multi_gpu                                   the table for 1 to 64 GPUs
  multi_gpu --plot out.svg                    and a picture
  multi_gpu --report out.html                 and a report for the browser
  multi_gpu --compare a.json b.json           what changed between two runs with --json
  multi_gpu --gpus 1,4,16 --seed 7 --json     for scripts
  multi_gpu --workload cargo-build.strace     another program's memory
  multi_gpu --fault skip-wait --gpus 4        a driver that does not wait: exit code 1
  multi_gpu --real-time --gpus 16             on tokio, with latencies of 1 ms and more

Exit codes: 0 all is well; 1 a device used a stale mapping; 2 bad input or an unwritable file.";

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Fault {
    /// The driver of GPU 0 does not wait for its flush
    SkipWait,
}

fn share(text: &str) -> Result<f64, String> {
    let share: f64 = text.parse().map_err(|_| format!("{text:?} is no number"))?;
    if (0.0..=1.0).contains(&share) { Ok(share) } else { Err(format!("{share} is not from 0 to 1")) }
}

fn main() -> ExitCode {
    let options = Options::parse();
    let outcome = match options.compare.as_deref() {
        Some([a, b]) => compare_reports(a, b).map(|()| 0),
        _ => run(&options),
    };
    match outcome {
        Ok(0) => ExitCode::SUCCESS,
        Ok(stale) => {
            eprintln!("error: {stale} DMA accesses used a mapping after its invalidation's guard had been handed out");
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
    print!("{}", compare::table([&a.display().to_string(), &b.display().to_string()], [&of_a, &of_b])?);
    Ok(())
}

/// Runs it all; returns the number of stale accesses.
fn run(options: &Options) -> Result<u64, String> {
    let (name, recording) = recording::open(&options.workload, options.lenient).map_err(|error| error.to_string())?;
    for remark in recording.remarks(options.verbose) {
        eprintln!("{remark}");
    }
    let address_spaces = {
        let mut program = memory::Program::default();
        recording.calls.iter().for_each(|call| drop(program.run(call)));
        program.spaces()
    };
    let workload = Workload::new(&name, &recording, address_spaces);
    let recording = Arc::new(recording);

    let mut gpus: Vec<usize> = options.gpus.iter().map(|gpus| usize::from(*gpus)).collect();
    gpus.sort_unstable();
    gpus.dedup();
    let model = Model {
        seed: options.seed,
        preempt_share: options.preempt_share,
        floor: Duration::from_micros(options.latency_floor_us.unwrap_or(if options.real_time { 1000 } else { 0 })),
        dma_interval: Duration::from_micros(options.dma_interval_us),
        resident_pages: options.resident_pages,
    };
    let bar = progress_bar(2 * gpus.len() * recording.calls.len(), options.json);
    let mut rows = Vec::new();
    // The picture shows an invalidation of as many GPUs as one can tell apart.
    let pictured = gpus.iter().copied().filter(|gpus| *gpus <= 16).max().unwrap_or(gpus[0]);
    let mut timelines = [BTreeMap::new(), BTreeMap::new()];
    for gpus in gpus {
        for (mode, timelines) in [Mode::SinglePass, Mode::MultiPass].into_iter().zip(&mut timelines) {
            let settings = Settings {
                model,
                gpus,
                mode,
                skip_wait: options.fault == Some(Fault::SkipWait),
                real_time: options.real_time,
                longest_pause: Duration::from_micros(options.longest_pause_us),
                most_invalidations: options.limit.or(options.real_time.then_some(40)),
            };
            bar.set_message(format!("{gpus} GPUs"));
            let before = bar.position();
            let of_row = bar.clone();
            let step = move |calls| of_row.set_position(before + calls);
            let Outcome { row, timelines: of_run } =
                simulation::run(&recording, settings, step).map_err(|error| format!("tokio cannot be started: {error}"))?;
            bar.set_position(before + recording.calls.len() as u64);
            rows.push(row);
            if gpus == pictured {
                *timelines = of_run;
            }
        }
    }
    bar.finish_and_clear();

    let report = Report { workload, seed: options.seed, real_time: options.real_time, rows };
    let example = example(&timelines);
    if let Some(path) = &options.plot {
        plot::write(path, &report, &example)
            .map_err(|error| format!("the picture {} cannot be written: {error}", path.display()))?;
    }
    if let Some(path) = &options.report {
        html::write(path, &report, &example)
            .map_err(|error| format!("the report {} cannot be written: {error}", path.display()))?;
    }
    if options.json {
        println!("{}", serde_json::to_string(&report).map_err(|error| error.to_string())?);
    } else {
        print!("{}", report::table(&report));
    }
    Ok(report.rows.iter().map(|row| row.stale_accesses).sum())
}

/// The same invalidation in both modes: the one whose bars are told apart best, because its slowest GPU is quick.
fn example(timelines: &[BTreeMap<u64, Timeline>; 2]) -> [Timeline; 2] {
    let took = |timeline: &Timeline| timeline.ended - timeline.began;
    let both = timelines[0].iter().filter_map(|(number, single)| Some((single, timelines[1].get(number)?)));
    let (single, multi) = both.min_by_key(|(_, multi)| took(multi)).unzip();
    [single.cloned().unwrap_or_default(), multi.cloned().unwrap_or_default()]
}

fn progress_bar(steps: usize, quiet: bool) -> ProgressBar {
    let target =
        if quiet || !std::io::stderr().is_terminal() { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let style = ProgressStyle::with_template("{msg:>9} {wide_bar} {percent:>3} %  {eta} left");
    let bar = ProgressBar::with_draw_target(Some(steps as u64), target);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
