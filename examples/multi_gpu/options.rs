//! The command line.

use crate::fault::Fault;
use crate::profile::{Costs, LATENCIES, Model, Profile};
use crate::simulation::Mode;
use clap::Parser;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// Replays what a real program did with its memory while 1 to 1024 simulated GPUs mirror that
/// memory (`--gpus`), and compares four ways to wait for the GPUs: single-pass (before Linux 7.1),
/// two-pass (Linux 7.1), round-robin (the proposal of August 2025) and poll-driven (this library).
#[derive(Parser)]
#[command(name = "multi_gpu", after_long_help = format!("{LATENCIES}\n\n{EXAMPLES}"))]
pub struct Options {
    /// A recording made by: strace -f -ttt -e
    /// trace=%memory,clone,clone3,fork,vfork,execve,exit_group -o FILE PROGRAM
    ///
    /// Other forms are read, too (see the guide, `docs::recording`). May be given several times, be
    /// a directory of what `strace -ff` wrote, a glob, or - for the standard input. The default is
    /// a recording of a Python program that trains a network with NumPy, which is built in.
    #[arg(long, value_name = "FILE")]
    pub workload: Vec<PathBuf>,

    /// How many GPUs, as a list
    #[arg(long, value_name = "N,N,…", value_delimiter = ',', default_value = "1,2,4,8,16,32,64", value_parser = clap::value_parser!(u16).range(1..=1024))]
    gpus: Vec<u16>,

    /// Ways to wait, as a list
    #[arg(
        long,
        value_name = "MODE,…",
        value_delimiter = ',',
        default_value = "single-pass,two-pass,round-robin,poll-driven"
    )]
    modes: Vec<Mode>,

    /// What the GPUs are doing
    #[arg(long, value_enum, default_value = "mixed")]
    pub profile: Profile,

    /// Seed of all random numbers; in virtual time the same seed gives the same output
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,

    /// Print one JSON object instead of the table
    #[arg(long)]
    pub json: bool,

    /// Write a picture (SVG): latency against GPUs, and one invalidation GPU by GPU
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,

    /// Write a report (HTML, one file that needs no other): latency against GPUs, its distribution,
    /// one invalidation GPU by GPU, the figures
    #[arg(long, value_name = "FILE.html")]
    pub report: Option<PathBuf>,

    /// Compare two files that --json printed, instead of running anything
    #[arg(long, value_names = ["A.json", "B.json"], num_args = 2, exclusive = true)]
    pub compare: Option<Vec<PathBuf>>,

    /// Count lines of the recording that cannot be understood, instead of ending with an error
    #[arg(long)]
    pub lenient: bool,

    /// List what was not read as a call: skipped lines, notes, other system calls
    #[arg(short, long)]
    pub verbose: bool,

    /// Plant a bug, to see that the check finds it
    #[arg(long, value_name = "BUG")]
    pub fault: Option<Fault>,

    /// Run in real time instead of virtual time; then at most 40 invalidations a row, and no
    /// latency below 1 ms, unless set otherwise
    #[arg(long)]
    pub real_time: bool,

    /// Replay the threads and processes of the recording side by side; false: one call after the
    /// other
    #[arg(long, value_name = "BOOL", default_value_t = true, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub threads: bool,

    /// GPUs mirror the memory of all processes. By default they follow one address space, the one
    /// in which the most is invalidated, as drivers do
    #[arg(long)]
    pub all_processes: bool,

    /// The program gathers what it unmaps, discards or protects, and has it invalidated up to so
    /// many at once
    ///
    /// As a garbage collector does, or an allocator with a deferred list. What a thread does in
    /// calls that follow one another is put together if it is of one kind and in one address space,
    /// and made where the last of these calls was; at the latest before another thread does what
    /// comes after one of them. Each driver is told of the ranges that concern it in one first
    /// pass. 1: each by itself.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65536))]
    batch: u32,

    /// Stop each row after so many invalidations that a device had work for
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub limit: Option<u64>,

    /// Raise every latency of the hardware to this, in µs; beyond some 100 raise
    /// --reclaim-interval-us as well, or devices do nothing else
    #[arg(long, value_name = "µs", value_parser = micros)]
    latency_floor_us: Option<Duration>,

    /// Mean time between two DMA accesses of a GPU, beside those that invalidations cause, in µs
    #[arg(long, value_name = "µs", default_value = "250", value_parser = positive_micros)]
    dma_interval_us: Duration,

    /// Pages of each mapping that a GPU works on
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=4096))]
    resident_pages: u64,

    /// A device's page fault, in µs
    #[arg(long, value_name = "µs", default_value = "30", value_parser = micros)]
    fault_us: Duration,

    /// How long the memory takes to change once the devices are done, in µs
    #[arg(long, value_name = "µs", default_value = "2", value_parser = micros)]
    change_us: Duration,

    /// Mean time between two pages that the kernel takes away from the program, as under memory
    /// pressure, in µs; 0: it takes none
    #[arg(long, value_name = "µs", default_value = "150", value_parser = micros)]
    reclaim_interval_us: Duration,

    /// Processor time of a first pass: to zap a device's page table, in µs
    #[arg(long, value_name = "µs", default_value = "1", value_parser = micros)]
    zap_us: Duration,

    /// Processor time to give a device a command, in µs
    #[arg(long, value_name = "µs", default_value = "2", value_parser = micros)]
    submit_us: Duration,

    /// From the end of a command to its fence, in µs
    #[arg(long, value_name = "µs", default_value = "1", value_parser = micros)]
    interrupt_us: Duration,

    /// Processor time to wake the thread that waits, in µs
    #[arg(long, value_name = "µs", default_value = "2", value_parser = micros)]
    wake_us: Duration,

    /// The program pauses between two calls as long as in the recording, but no longer than this,
    /// in µs
    #[arg(long = "longest-pause-us", value_name = "µs", default_value = "50", value_parser = micros)]
    pub longest_pause: Duration,
}

/// The name of the setting.
pub const BATCH: &str = "batch";

const EXAMPLES: &str = "\
Examples:
  multi_gpu                                   the table for 1 to 64 GPUs
  multi_gpu --profile busy                    for GPUs that are at work
  multi_gpu --plot out.svg                    and a picture
  multi_gpu --report out.html                 and a report for the browser
  multi_gpu --compare a.json b.json           what changed between two runs with --json
  multi_gpu --gpus 1,4,16 --seed 7 --json     for scripts
  multi_gpu --workload program.strace         another program's memory (examples/multi_gpu/workloads has some)
  multi_gpu --batch 64                        for a program that gathers what it unmaps
  multi_gpu --fault skip-wait --gpus 4        a driver that does not wait: exit code 1
  multi_gpu --real-time --gpus 16             in real time, with latencies of 1 ms and more

Exit codes: 0 all is well; 1 a device used memory that had changed; 2 bad input or an unwritable file.";

fn micros(text: &str) -> Result<Duration, String> {
    let micros: f64 = text.parse().map_err(|_| format!("{text:?} is no number"))?;
    let time = Duration::try_from_secs_f64(micros / 1e6).map_err(|error| error.to_string())?;
    if time > Duration::from_secs(3600) {
        Err(format!("{text} µs is more than an hour"))
    } else {
        Ok(time)
    }
}

fn positive_micros(text: &str) -> Result<Duration, String> {
    micros(text).and_then(|time| {
        if time.is_zero() { Err("it has to be more than 0".into()) } else { Ok(time) }
    })
}

impl Options {
    /// Each number once, in order.
    pub fn gpus(&self) -> Vec<usize> {
        let mut gpus: Vec<usize> = self.gpus.iter().map(|gpus| usize::from(*gpus)).collect();
        gpus.sort_unstable();
        gpus.dedup();
        gpus
    }

    /// Changes of the memory that are invalidated at once, at most.
    pub fn batch(&self) -> usize {
        self.batch as usize
    }

    /// Each once, in order.
    pub fn modes(&self) -> Vec<Mode> {
        Mode::ALL.into_iter().filter(|mode| self.modes.contains(mode)).collect()
    }

    /// What a report says of how it was made, beside what it has fields for.
    pub fn settings(&self) -> BTreeMap<String, String> {
        let (model, costs) = (self.model(), self.model().costs);
        let settings = [
            ("threads", self.threads.to_string()),
            ("all processes", self.all_processes.to_string()),
            ("limit", self.limit.map_or("none".into(), |limit| limit.to_string())),
            ("fault", self.fault.map_or("none".into(), |fault| format!("{fault:?}"))),
            ("resident pages", model.resident_pages.to_string()),
            ("latency floor", format!("{:?}", model.floor)),
            ("DMA interval", format!("{:?}", model.dma_interval)),
            ("device's page fault", format!("{:?}", model.fault)),
            ("change of the memory", format!("{:?}", model.change)),
            ("reclaim interval", format!("{:?}", model.reclaim)),
            ("zap", format!("{:?}", costs.zap)),
            ("submit", format!("{:?}", costs.submit)),
            ("interrupt", format!("{:?}", costs.interrupt)),
            ("wake", format!("{:?}", costs.wake)),
            ("longest pause", format!("{:?}", self.longest_pause)),
        ];
        // Where none is named it is 1, as in reports of before.
        let batch = (self.batch > 1).then(|| (BATCH, self.batch.to_string()));
        settings
            .into_iter()
            .chain(batch)
            .map(|(option, value)| (option.to_owned(), value))
            .collect()
    }

    pub fn model(&self) -> Model {
        let floor = if self.real_time { Duration::from_millis(1) } else { Duration::ZERO };
        Model {
            seed: self.seed,
            profile: self.profile,
            costs: Costs {
                zap: self.zap_us,
                submit: self.submit_us,
                interrupt: self.interrupt_us,
                wake: self.wake_us,
            },
            floor: self.latency_floor_us.unwrap_or(floor),
            dma_interval: self.dma_interval_us,
            resident_pages: self.resident_pages,
            fault: self.fault_us,
            change: self.change_us,
            reclaim: self.reclaim_interval_us,
        }
    }
}
