//! An owner and its mirrors as processes of this machine, over gRPC with mutual TLS.
//!
//! `table` compares how long an invalidation takes with a plain TCP fan-out, `costs` kills, stops,
//! cuts off and restarts a mirror, `chaos` does so at random while every accepted read is checked.
//! Without a command all three run. The figures are this machine's; run with `--release`.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for people")]
#![forbid(unsafe_code)]

#[path = "../../tests/support/certificates.rs"]
#[allow(dead_code, reason = "shared with the tests")]
mod certificates;
mod chaos;
mod costs;
mod fanout;
mod mirror;
mod processes;
#[path = "../../tests/support/relay.rs"]
#[allow(dead_code, reason = "shared with the tests")]
mod relay;
mod table;
mod world;

use clap::{Args, Parser, Subcommand};

/// An owner and its mirrors as processes of this machine, over gRPC with mutual TLS: how long an
/// invalidation takes, what a mirror that dies costs, and whether anything stale is ever read.
/// Without a command all three run, for two minutes.
#[derive(Parser)]
#[command(version)]
struct Options {
    #[command(subcommand)]
    what: Option<What>,
    /// A mirror's term in milliseconds.
    #[arg(long, default_value_t = 100, global = true, value_parser = clap::value_parser!(u64).range(1..))]
    term_ms: u64,
}

#[derive(Subcommand)]
enum What {
    /// How long an invalidation takes with 1 … 8 mirrors, beside a plain TCP fan-out.
    Table(Table),
    /// What a mirror that is killed, stopped, cut off or restarted costs.
    Costs(Costs),
    /// Mirrors are stopped and killed at random, and every accepted read is checked.
    Chaos(Chaos),
    #[command(hide = true)]
    Mirror(mirror::Mirroring),
    #[command(hide = true)]
    Echo,
}

#[derive(Args)]
struct Table {
    /// Invalidations for each number of mirrors.
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// With so many mirrors at least,
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=world::MIRRORS))]
    from: u64,
    /// and at most.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=world::MIRRORS))]
    to: u64,
}

#[derive(Args)]
struct Costs {
    /// How often each thing happens.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

#[derive(Args)]
struct Chaos {
    /// For so long, and for a sixth of it, but 10 s at least, with the leases switched off.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// So many mirrors.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=world::MIRRORS))]
    mirrors: u64,
    /// Of the choices of whom to stop or kill.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let term = std::time::Duration::from_millis(options.term_ms);
    match options.what {
        Some(What::Mirror(mirroring)) => {
            processes::end_with_parent().and_then(|()| mirror::run(mirroring))
        }
        Some(What::Echo) => processes::end_with_parent().and_then(|()| fanout::echo()),
        Some(What::Table(Table { rounds, from, to })) => table::run(term, rounds, from, to),
        Some(What::Costs(Costs { rounds })) => costs::run(term, rounds),
        Some(What::Chaos(Chaos { seconds, mirrors, seed })) => {
            chaos::run(term, seconds, mirrors, seed)
        }
        None => {
            table::run(term, 1_000, 1, 8)?;
            costs::run(term, 10)?;
            chaos::run(term, 60, 4, 1)
        }
    }
}
