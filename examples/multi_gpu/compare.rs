//! `--compare`: two reports side by side.

use crate::options::BATCH;
use crate::report::{Report, time};
use crate::tally::Row;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;

/// Reads what `--json` printed.
pub fn read(path: &Path) -> Result<Report, String> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| format!("the report {} cannot be read: {error}", path.display()))?;
    serde_json::from_str(&text).map_err(|error| {
        format!(
            "{} is not a report: {error}\n  Make one with: multi_gpu --json > FILE.json",
            path.display()
        )
    })
}

/// The rows that both have, and what else differs.
///
/// # Errors
/// When they have none in common.
pub fn table(names: [&str; 2], [a, b]: [&Report; 2]) -> Result<String, String> {
    let mut out = String::new();
    let mut differs = Vec::new();
    let mut check = |what: &str, a: String, b: String| {
        if a != b {
            differs.push(format!("{what}: {a} and {b}"));
        }
    };
    check("workload", a.workload.name.clone(), b.workload.name.clone());
    check("seed", a.seed.to_string(), b.seed.to_string());
    let profile =
        |report: &Report| report.profile.map_or("not known", |profile| profile.name()).to_owned();
    check("profile", profile(a), profile(b));
    check("real time", a.real_time.to_string(), b.real_time.to_string());
    let known = |report: &Report, option: &str| {
        let unnamed = if option == BATCH { "1" } else { "not known" };
        report.settings.get(option).cloned().unwrap_or_else(|| unnamed.into())
    };
    let options: BTreeSet<&String> = a.settings.keys().chain(b.settings.keys()).collect();
    for option in options {
        check(option, known(a, option), known(b, option));
    }
    let _ = writeln!(out, "A is {}, B is {}", names[0], names[1]);
    for difference in differs {
        let _ = writeln!(
            out,
            "they differ in the {difference}: the figures below compare two different things"
        );
    }
    let _ = writeln!(
        out,
        "\n{:>4} {:<11} │ {:>9} {:>9} {:>7} │ {:>9} {:>9} {:>7} │ {:>9} {:>9} {:>7}",
        "GPUs",
        "mode",
        "p50 A",
        "p50 B",
        "B/A",
        "p99 A",
        "p99 B",
        "B/A",
        "total A",
        "total B",
        "B/A"
    );
    let mut common = 0;
    for of_a in &a.rows {
        let Some(of_b) = b.rows.iter().find(|row| row.gpus == of_a.gpus && row.mode == of_a.mode)
        else {
            continue;
        };
        common += 1;
        let mode = of_a.mode.name();
        let _ = write!(out, "{:>4} {mode:<11}", of_a.gpus);
        let values: [fn(&Row) -> u64; 3] = [|row| row.p50_ns, |row| row.p99_ns, |row| row.total_ns];
        for value in values {
            let (a, b) = (value(of_a), value(of_b));
            let _ = write!(
                out,
                " │ {:>9} {:>9} {:>7.3}",
                time(a),
                time(b),
                b as f64 / (a as f64).max(1.0)
            );
        }
        out.push('\n');
    }
    if common == 0 {
        return Err(
            "the reports have no number of GPUs in common: make both with the same --gpus".into()
        );
    }
    let stale = |report: &Report| report.rows.iter().map(|row| row.stale_accesses).sum::<u64>();
    let _ = writeln!(out, "\nstale accesses: {} and {}", stale(a), stale(b));
    Ok(out)
}
