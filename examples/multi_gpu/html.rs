//! The report of `--report`: one file that needs no other.

use crate::plot;
use crate::report::{Report, pairs, table, time};
use crate::simulation::Timeline;
use std::error::Error;
use std::fmt::Write;
use std::path::Path;

const STYLE: &str = "\
body { font: 16px/1.5 system-ui, sans-serif; color: #333; max-width: 1060px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { white-space: nowrap; padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd }
td.stale { color: #c0392b; font-weight: bold }
.charts { display: flex; flex-wrap: wrap; gap: 1em } svg { max-width: 100%; height: auto }
pre { overflow-x: auto; background: #f6f6f6; padding: 1em; font-size: 12px }";

/// Writes the report; the timelines are of the same invalidation in both modes, single-pass first.
pub fn write(path: &Path, report: &Report, timelines: &[Timeline; 2]) -> Result<(), Box<dyn Error>> {
    Ok(std::fs::write(path, page(report, timelines)?)?)
}

fn page(report: &Report, timelines: &[Timeline; 2]) -> Result<String, Box<dyn Error>> {
    let latencies = plot::svg((510, 420), |area| plot::latencies(area, report))?;
    let distribution = plot::svg((510, 420), |area| plot::distribution(area, report))?;
    let lanes = plot::svg((1040, 560), |area| plot::lanes(area, timelines))?;
    let (name, time_is) = (escape(&report.workload.name), if report.real_time { "real" } else { "virtual" });
    let mut rows = String::new();
    for (single, multi) in pairs(&report.rows) {
        let stale = single.stale_accesses + multi.stale_accesses;
        write!(rows, "<tr><td>{}<td>{}", single.gpus, multi.invalidations)?;
        for row in [single, multi] {
            write!(rows, "<td>{}<td>{}<td>{}", time(row.p50_ns), time(row.p99_ns), time(row.total_ns))?;
        }
        let (up, class) =
            (single.total_ns as f64 / (multi.total_ns as f64).max(1.0), if stale > 0 { " class=stale" } else { "" });
        writeln!(rows, "<td>{up:.2}×<td>{:.3}<td{class}>{stale}</tr>", multi.ideal_ratio)?;
    }
    Ok(format!(
        "<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n<meta name=viewport content=\"width=device-width\">\n\
         <title>multi_gpu: {name}</title>\n<style>\n{STYLE}\n</style>\n\
         <h1>What multi-pass invalidation is worth</h1>\n\
         <p>The memory calls of <b>{name}</b>, replayed in {time_is} time with seed {seed}, while simulated GPUs mirror the memory. Single-pass waits for \
         one GPU after the other; multi-pass starts all of them and then joins.</p>\n\
         <div class=charts>\n<div id=latency>{latencies}</div>\n<div id=distribution>{distribution}</div>\n</div>\n\
         <h2>One invalidation, GPU by GPU</h2>\n<p>Each bar is the wait for one GPU. In multi-pass they overlap.</p>\n<div id=timeline>{lanes}</div>\n\
         <h2>The figures</h2>\n<table>\n\
         <tr><th rowspan=2>GPUs<th rowspan=2>invalidations<th colspan=3>single-pass<th colspan=3>multi-pass<th rowspan=2>speed-up<th rowspan=2>multi / ideal\
         <th rowspan=2>stale accesses</tr>\n<tr><th>p50<th>p99<th>total<th>p50<th>p99<th>total</tr>\n{rows}</table>\n\
         <details><summary>As text</summary><pre>{text}</pre></details>\n</html>\n",
        seed = report.seed,
        text = escape(&table(report)),
    ))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
