//! What the simulation prints: a table, or one JSON object.

use crate::options::BATCH;
use crate::profile::Profile;
use crate::recording::Recording;
use crate::simulation::Mode;
use crate::tally::Row;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write;

/// The JSON object of `--json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    pub workload: Workload,
    #[serde(default)]
    pub profile: Option<Profile>,
    pub seed: u64,
    pub real_time: bool,
    /// What else was asked for, by the name of the option.
    #[serde(default)]
    pub settings: BTreeMap<String, String>,
    pub rows: Vec<Row>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Workload {
    pub name: String,
    pub lines_read: usize,
    /// Calls by kind; `failed` ones have no effect.
    pub operations: BTreeMap<String, usize>,
    pub skipped_lines: usize,
    /// Calls whose end was not recorded.
    pub unfinished_calls: usize,
    /// Calls of which too little was recorded.
    #[serde(default)]
    pub incomplete_calls: usize,
    pub address_spaces: usize,
    /// The process whose memory GPUs mirror, if it is one only.
    #[serde(default)]
    pub followed_process: Option<u32>,
}

impl Workload {
    pub fn new(
        name: &str,
        recording: &Recording,
        address_spaces: usize,
        followed_process: Option<u32>,
    ) -> Self {
        Self {
            name: name.into(),
            lines_read: recording.lines,
            operations: recording.operations(),
            skipped_lines: recording.skipped.len(),
            unfinished_calls: recording.unfinished,
            incomplete_calls: recording.incomplete,
            address_spaces,
            followed_process,
        }
    }
}

/// The rows of each number of GPUs.
pub fn by_gpus(rows: &[Row]) -> BTreeMap<usize, BTreeMap<Mode, &Row>> {
    let mut groups: BTreeMap<usize, BTreeMap<Mode, &Row>> = BTreeMap::new();
    for row in rows {
        groups.entry(row.gpus).or_default().insert(row.mode, row);
    }
    groups
}

/// The modes that there are, in their order.
pub fn modes(rows: &[Row]) -> Vec<Mode> {
    Mode::ALL.into_iter().filter(|mode| rows.iter().any(|row| row.mode == *mode)).collect()
}

/// Three significant digits and a unit.
pub fn time(ns: u64) -> String {
    let ns = ns as f64;
    let (value, unit) = match ns {
        _ if ns < 1e3 => (ns, "ns"),
        _ if ns < 1e6 => (ns / 1e3, "µs"),
        _ if ns < 1e9 => (ns / 1e6, "ms"),
        _ => (ns / 1e9, "s"),
    };
    let digits = if value >= 100.0 || unit == "ns" { 0 } else { if value >= 10.0 { 1 } else { 2 } };
    format!("{value:.digits$} {unit}")
}

pub fn table(report: &Report) -> String {
    let mut out = String::new();
    let workload = &report.workload;
    let operations: Vec<_> =
        workload.operations.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    let modes = modes(&report.rows);
    // Writing to a string does not fail.
    let _ = writeln!(
        out,
        "{}: {} lines, {} address spaces, {} lines skipped\n  {}",
        workload.name,
        workload.lines_read,
        workload.address_spaces,
        workload.skipped_lines,
        operations.join(", ")
    );
    if let Some(profile) = report.profile {
        let time = if report.real_time { "real" } else { "virtual" };
        let _ = write!(out, "GPUs: {}, in {time} time, seed {}", profile.name(), report.seed);
        let _ = match workload.followed_process {
            Some(process) => {
                writeln!(out, "; they follow process {process} (--all-processes: all)")
            }
            None => writeln!(out),
        };
    }
    if let Some(batch) = report.settings.get(BATCH) {
        let _ =
            writeln!(out, "Up to {batch} changes of the memory are invalidated at once (--batch).");
    }
    let head = |out: &mut String, first: &str, second: &str| {
        let _ = write!(out, "\n{first:>6} {:>6} │", "");
        for mode in &modes {
            let _ = write!(out, " {:^26} │", mode.name());
        }
        let _ = write!(out, " {:^23}\n{:>5} {:>7} │", second, "GPUs", "inval.");
        for _ in &modes {
            let _ = write!(out, " {:>8} {:>8} {:>8} │", "p50", "p99", "total");
        }
        for mode in &modes {
            let _ = write!(out, " {:>6}", short(*mode));
        }
        let _ = write!(out, "\n{}┼", "─".repeat(14));
        for _ in &modes {
            let _ = write!(out, "{}┼", "─".repeat(28));
        }
        let _ = writeln!(out, "{}", "─".repeat(7 * modes.len() + 1));
    };
    head(&mut out, "", "total over ideal");
    for (gpus, rows) in by_gpus(&report.rows) {
        let with_work = || rows.values().map(|row| row.with_work);
        let (least, most) = (with_work().min().unwrap_or(0), with_work().max().unwrap_or(0));
        // It differs a little: what devices hold depends on when they came to it.
        let with_work = if least == most { most.to_string() } else { format!("{least}–{most}") };
        let _ = write!(out, "{gpus:>5} {with_work:>7} │");
        for mode in &modes {
            let _ = match rows.get(mode) {
                Some(row) => write!(
                    out,
                    " {:>8} {:>8} {:>8} │",
                    time(row.p50_ns),
                    time(row.p99_ns),
                    time(row.total_ns)
                ),
                None => write!(out, " {:26} │", ""),
            };
        }
        for mode in &modes {
            let _ = match rows.get(mode) {
                Some(row) => write!(out, " {:>6.2}", row.ideal_ratio),
                None => write!(out, " {:6}", ""),
            };
        }
        out.push('\n');
    }
    out.push('\n');
    out.push_str(&counts(report));
    let _ = writeln!(
        out,
        "\n{}",
        finding(report).unwrap_or_else(|why| format!("Found: nothing, {why}."))
    );
    out
}

fn short(mode: Mode) -> &'static str {
    match mode {
        Mode::SinglePass => "single",
        Mode::TwoPass => "two",
        Mode::RoundRobin => "rounds",
        Mode::PollDriven => "poll",
    }
}

/// What happened besides, and what the check saw.
fn counts(report: &Report) -> String {
    let mut out = String::new();
    if let Some((gpus, rows)) = by_gpus(&report.rows).into_iter().next_back()
        && let Some(row) = rows.values().next_back()
    {
        let _ = writeln!(
            out,
            "With {gpus} GPUs, {}: {} invalidations of the program ({} with work for a device; {} more reached no notifier), {} pages reclaimed by the \
             kernel meanwhile;\n  {} invalidations overlapped another, device faults collided {} times and waited {} times.",
            row.mode.name(),
            row.invalidations,
            row.with_work,
            row.unheard,
            row.reclaims,
            row.overlaps,
            row.collisions,
            row.waits
        );
    }
    let accesses: u64 = report.rows.iter().map(|row| row.dma_accesses).sum();
    let stale: u64 = report.rows.iter().map(|row| row.stale_accesses).sum();
    let _ = writeln!(out, "{accesses} DMA accesses checked, {stale} of them stale");
    out
}

/// What a run has found, in a sentence.
///
/// # Errors
/// Why it has found nothing.
pub fn finding(report: &Report) -> Result<String, String> {
    const FEW: u64 = 20;
    let (gpus, rows) =
        by_gpus(&report.rows).into_iter().next_back().ok_or("because nothing was run")?;
    if report.rows.iter().any(|row| row.stale_accesses > 0) {
        return Err("because devices used memory that had changed".into());
    }
    if report.settings.get("fault").is_some_and(|fault| fault != "none") {
        return Err(
            "and not the planted bug either: see its line in --help for when it can do harm".into(),
        );
    }
    if let Some(few) = rows.values().map(|row| row.with_work).min().filter(|few| *few < FEW) {
        return Err(format!("because only {few} invalidations had work for a device"));
    }
    let total = |mode| rows.get(&mode).map(|row| row.total_ns as f64).filter(|total| *total > 0.0);
    let all = (
        total(Mode::SinglePass),
        total(Mode::TwoPass),
        total(Mode::RoundRobin),
        total(Mode::PollDriven),
    );
    let (Some(single), Some(two), Some(rounds), Some(poll)) = all else {
        return Err("because not all ways were run".into());
    };
    let what = match report.profile {
        Some(Profile::Idle) => "idle GPUs",
        Some(Profile::Busy) => "busy GPUs",
        Some(Profile::Preempting) => "GPUs that preempt",
        Some(Profile::Mixed) | None => "GPUs",
    };
    let against = |other: f64, name: &str| match other / poll {
        ratio if ratio > 1.05 => format!("{name} waits {ratio:.2}× as long"),
        ratio if ratio < 0.95 => {
            format!("{name} is enough, and quicker by {:.0} %", (1.0 - ratio) * 100.0)
        }
        ratio => format!("{name} is enough ({:+.0} %)", (ratio - 1.0) * 100.0),
    };
    Ok(format!(
        "Found: for {gpus} {what}, starting all before waiting for any is worth {:.1}× (two-pass against single-pass); against poll-driven, {}, and {}.",
        single / two,
        against(two, "two-pass"),
        against(rounds, "round-robin")
    ))
}
