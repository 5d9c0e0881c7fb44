//! Many hosts in virtual time: how long an invalidation takes that has to reach all their GPUs,
//! what stragglers, loss and a dead host do to it, and where telling every host by oneself stops
//! scaling.
#![allow(unreachable_pub, clippy::print_stdout, clippy::print_stderr)]

mod fleet;
mod options;
mod report;
mod time;

use clap::Parser;
use fleet::{Dead, Fleet, Setup};
use options::Options;
use report::Row;
use std::process::ExitCode;
use time::GaveUp;

fn main() -> ExitCode {
    let options = Options::parse();
    let mut rows = Vec::new();
    for hosts in &options.hosts {
        match row(&options, *hosts) {
            Ok(row) => rows.push(row),
            Err(GaveUp) => {
                eprintln!(
                    "many_hosts: {hosts} hosts get nowhere in 100 terms: the owner does not keep up with their renewals, or too much is lost"
                );
                return ExitCode::FAILURE;
            }
        }
    }
    let stale: u64 = rows.iter().map(|row| row.stale).sum();
    if options.json {
        println!("{}", report::json(&options, &rows));
    } else {
        print!("{}", report::table(&options, &rows));
    }
    if let Some(path) = &options.plot
        && let Err(error) = report::plot(path, &rows)
    {
        eprintln!("many_hosts: {} cannot be written: {error}", path.display());
        return ExitCode::FAILURE;
    }
    if stale > 0 {
        eprintln!("many_hosts: {stale} GPUs could reach memory that changed");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn row(options: &Options, hosts: u32) -> Result<Row, GaveUp> {
    let plain = Setup { hosts, ..Setup::default() };
    let tree = Setup { tree: true, ..plain };
    let measure = |setup: Setup| Fleet::new(options, setup).measure(None);
    let dead = |setup: Setup, who| Fleet::new(options, setup).measure(Some(who));
    let is_deep = hosts > options.fan_out;
    let measured = [
        measure(plain)?,
        measure(tree)?,
        measure(Setup { stragglers: options.stragglers, ..plain })?,
        measure(Setup { loss: options.loss, ..plain })?,
    ];
    let killed = [
        Some(dead(plain, Dead::Leaf)?),
        is_deep.then(|| dead(tree, Dead::Leaf)).transpose()?,
        is_deep.then(|| dead(tree, Dead::Inner)).transpose()?,
    ];
    Ok(Row::new(hosts, &measured, &killed))
}
