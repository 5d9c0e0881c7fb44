//! What the simulation prints: a table, or one JSON object.

use crate::recording::Recording;
use crate::simulation::{Mode, Row};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write;

/// The JSON object of `--json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    pub workload: Workload,
    pub seed: u64,
    pub real_time: bool,
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
    pub address_spaces: usize,
}

impl Workload {
    pub fn new(name: &str, recording: &Recording, address_spaces: usize) -> Self {
        Self {
            name: name.into(),
            lines_read: recording.lines,
            operations: recording.operations(),
            skipped_lines: recording.skipped.len(),
            unfinished_calls: recording.unfinished,
            address_spaces,
        }
    }
}

/// The two rows of each number of GPUs: single-pass, multi-pass.
pub fn pairs(rows: &[Row]) -> impl Iterator<Item = (&Row, &Row)> {
    rows.iter().filter(|row| row.mode == Mode::SinglePass).filter_map(|single| {
        let multi = rows.iter().find(|row| row.mode == Mode::MultiPass && row.gpus == single.gpus)?;
        Some((single, multi))
    })
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
    let operations: Vec<_> = workload.operations.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    let _ = writeln!(
        out,
        "{}: {} lines, {} address spaces, {} lines skipped\n  {}\n",
        workload.name,
        workload.lines_read,
        workload.address_spaces,
        workload.skipped_lines,
        operations.join(", ")
    );
    let _ = writeln!(
        out,
        "               │ single-pass: one GPU after the other  │ multi-pass: start all, then join      │  speed │ multi /"
    );
    let _ = writeln!(
        out,
        "GPUs │ invalid. │      p50      p99      max      total │      p50      p99      max      total │     up │   ideal"
    );
    let _ = writeln!(
        out,
        "─────┼──────────┼───────────────────────────────────────┼───────────────────────────────────────┼────────┼────────"
    );
    for (single, multi) in pairs(&report.rows) {
        let times = |row: &Row| {
            format!("{:>8} {:>8} {:>8} {:>10}", time(row.p50_ns), time(row.p99_ns), time(row.max_ns), time(row.total_ns))
        };
        let _ = writeln!(
            out,
            "{:>4} │ {:>8} │ {} │ {} │ {:>5.2}× │ {:>7.3}",
            single.gpus,
            multi.invalidations,
            times(single),
            times(multi),
            single.total_ns as f64 / (multi.total_ns as f64).max(1.0),
            multi.ideal_ratio
        );
    }
    let accesses: u64 = report.rows.iter().map(|row| row.dma_accesses).sum();
    let stale: u64 = report.rows.iter().map(|row| row.stale_accesses).sum();
    let _ = writeln!(out, "\n{accesses} DMA accesses checked, {stale} of them stale");
    out
}
