//! The report of `--report`: one file that needs no other.

use crate::plot::{self, Example};
use crate::report::{Report, by_gpus, finding, modes, table, time};
use std::error::Error;
use std::fmt::Write;
use std::path::Path;

const STYLE: &str = "\
body { font: 16px/1.5 system-ui, sans-serif; color: #333; max-width: 1080px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
table { font-size: 11px } th, td { white-space: nowrap; padding: .2em .35em; text-align: right; border-bottom: 1px solid #ddd }
td.stale { color: #c0392b; font-weight: bold }
.charts { display: flex; flex-wrap: wrap; gap: 1em } svg { max-width: 100%; height: auto }
pre { overflow-x: auto; background: #f6f6f6; padding: 1em; font-size: 12px }";

/// Writes the report, with the same invalidation in each mode.
pub fn write(path: &Path, report: &Report, example: &Example) -> Result<(), Box<dyn Error>> {
    Ok(std::fs::write(path, page(report, example)?)?)
}

fn page(report: &Report, example: &Example) -> Result<String, Box<dyn Error>> {
    let latencies = plot::svg((510, 420), |area| plot::latencies(area, report))?;
    let distribution = plot::svg((510, 420), |area| plot::distribution(area, report))?;
    let lanes =
        plot::svg((1040, 200 * example.len().max(1) as u32), |area| plot::lanes(area, example))?;
    let (name, time_is) =
        (escape(&report.workload.name), if report.real_time { "real" } else { "virtual" });
    let modes = modes(&report.rows);
    let (mut head, mut units, mut rows) = (String::new(), String::new(), String::new());
    for mode in &modes {
        write!(head, "<th colspan=4>{}", mode.name())?;
        units.push_str("<th>p50<th>p99<th>total<th>/ ideal");
    }
    for (gpus, of_gpus) in by_gpus(&report.rows) {
        let stale: u64 = of_gpus.values().map(|row| row.stale_accesses).sum();
        write!(
            rows,
            "<tr><td>{gpus}<td>{}",
            of_gpus.values().map(|row| row.with_work).max().unwrap_or(0)
        )?;
        for mode in &modes {
            match of_gpus.get(mode) {
                Some(row) => {
                    let [p50, p99, total] = [row.p50_ns, row.p99_ns, row.total_ns].map(time);
                    write!(rows, "<td>{p50}<td>{p99}<td>{total}<td>{:.2}", row.ideal_ratio)?;
                }
                None => rows.push_str("<td colspan=4>"),
            }
        }
        writeln!(rows, "<td{}>{stale}</tr>", if stale > 0 { " class=stale" } else { "" })?;
    }
    Ok(format!(
        "<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n<meta name=viewport content=\"width=device-width\">\n\
         <title>multi_gpu: {name}</title>\n<style>\n{STYLE}\n</style>\n\
         <h1>Four ways to wait for GPUs</h1>\n\
         <p>The memory calls of <b>{name}</b>, replayed in {time_is} time with seed {seed}, while simulated GPUs mirror the memory. Single-pass waits for \
         one GPU after the other. Two-pass (Linux 7.1) starts all, then finishes one after the other; round-robin (the proposal of August 2025) goes round \
         those that are not done; poll-driven (this library) goes on with whichever is ready.</p>\n<p>{settings}</p>\n<p id=finding>{finding}</p>\n\
         <div class=charts>\n<div id=latency>{latencies}</div>\n<div id=distribution>{distribution}</div>\n</div>\n\
         <h2>One invalidation, GPU by GPU</h2>\n<p>A bar is a step of a GPU, from when it was asked for until its fence; it may have waited for another invalidation's. The mark is the first pass.</p>\n\
         <div id=timeline>{lanes}</div>\n\
         <h2>The figures</h2>\n<p>Invalidations that a device had work for; \"/ ideal\" is the total over a lower bound (see --help).</p>\n<table>\n\
         <tr><th rowspan=2>GPUs<th rowspan=2>invalidations<br>with work{head}<th rowspan=2>stale accesses</tr>\n<tr>{units}</tr>\n{rows}</table>\n\
         <details><summary>As text</summary><pre>{text}</pre></details>\n</html>\n",
        seed = report.seed,
        finding = escape(&finding(report).unwrap_or_else(|why| format!("Found: nothing, {why}."))),
        settings = escape(&settings(report)),
        text = escape(&table(report)),
    ))
}

/// What was asked for, as far as it shows what is compared.
fn settings(report: &Report) -> String {
    let profile = report.profile.map_or("not known", |profile| profile.name());
    let options: Vec<String> =
        report.settings.iter().map(|(option, value)| format!("{option} {value}")).collect();
    format!("Profile {profile}; {}.", options.join(", "))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
