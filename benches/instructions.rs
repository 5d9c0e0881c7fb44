//! Counts the instructions of the library. Run it with `ci/instructions.sh`, or with
//! `cargo bench --bench instructions` if `gungraun-runner` is installed.
//!
//! Times differ between machines and runs. These counts (callgrind) do not, so a rise comes from a
//! change of the code or of the compiler. Each count is for [`TIMES`] operations.
//! `instructions.json` holds the counts of the last accepted run. A run fails if a count is more
//! than 5 % higher.
#![allow(missing_docs, unreachable_pub, dead_code, clippy::print_stdout, clippy::print_stderr)]

#[path = "table/devices.rs"]
mod devices;

use devices::{Device, Kind, Population, hitting, random};
use futures::executor::block_on;
use gungraun::prelude::*;
use gungraun::{Callgrind, EventKind};
use shootdown::{AddressSpace, Event, Subscription};
use std::hint::black_box;

/// Number of operations in each measured function.
const TIMES: usize = 1000;
/// Greatest ratio of a count to the accepted one.
const TOLERANCE: f64 = 1.05;

/// The counts of the last accepted run, by function and case.
const ACCEPTED: &str = include_str!("instructions.json");

/// Makes the case `name` fail if it takes more instructions than accepted. A case without an
/// accepted count always fails.
fn limit(name: &str) -> LibraryBenchmarkConfig {
    let accepted: std::collections::BTreeMap<String, u64> =
        serde_json::from_str(ACCEPTED).expect("benches/instructions.json is an object of counts");
    let most = accepted.get(name).map_or(0, |count| (*count as f64 * TOLERANCE) as u64);
    let mut callgrind = Callgrind::with_args(["--cache-sim=no"]);
    if std::env::var_os("ACCEPT").is_none() {
        callgrind.hard_limits([(EventKind::Ir, most)]);
    }
    let mut config = LibraryBenchmarkConfig::default();
    config.tool(callgrind);
    config
}

/// Addresses drawn before the measurement, each a multiple of a page.
struct Drawn {
    population: Population,
    pages: Vec<u64>,
}

fn drawn(n: u64, address: fn(&Population, u64) -> u64) -> Drawn {
    let population = Population::new(n);
    let mut next = random(n + 7);
    let pages = (0..TIMES).map(|_| address(&population, next() % n)).collect();
    let drawn = Drawn { population, pages };
    // The first invalidation allocates the memory that later ones use again.
    invalidate(&drawn.population.space, &drawn.pages[..1]);
    drawn
}

fn invalidate(space: &AddressSpace, pages: &[u64]) {
    block_on(async {
        for &page in pages {
            drop(black_box(space.invalidate(devices::page(page), Event::Unmap).await));
        }
    });
}

#[library_benchmark]
#[bench::of_1(args = (1, Population::gap), setup = drawn, config = limit("no_hit of_1"))]
#[bench::of_100(args = (100, Population::gap), setup = drawn, config = limit("no_hit of_100"))]
#[bench::of_10000(args = (10_000, Population::gap), setup = drawn, config = limit("no_hit of_10000"))]
fn no_hit(drawn: Drawn) -> Drawn {
    invalidate(&drawn.population.space, &drawn.pages);
    drawn
}

#[library_benchmark]
#[bench::of_1(args = (1, Population::page), setup = drawn, config = limit("one_hit of_1"))]
#[bench::of_100(args = (100, Population::page), setup = drawn, config = limit("one_hit of_100"))]
#[bench::of_10000(args = (10_000, Population::page), setup = drawn, config = limit("one_hit of_10000"))]
fn one_hit(drawn: Drawn) -> Drawn {
    invalidate(&drawn.population.space, &drawn.pages);
    drawn
}

#[library_benchmark]
#[bench::of_100(args = (100, Population::gap), setup = drawn, config = limit("insert_remove of_100"))]
#[bench::of_10000(args = (10_000, Population::gap), setup = drawn, config = limit("insert_remove of_10000"))]
fn insert_remove(drawn: Drawn) -> Drawn {
    block_on(async {
        for &page in &drawn.pages {
            black_box(drawn.population.insert_at(page).remove().await);
        }
    });
    drawn
}

type Hitting = (AddressSpace, Vec<Subscription<Device>>);

fn warm(kind: Kind, k: u64) -> Hitting {
    let space = hitting(kind, k);
    invalidate(&space.0, &[0]);
    space
}

#[library_benchmark]
#[bench::single_16(args = (Kind::Single, 16), setup = warm, config = limit("hits single_16"))]
#[bench::single_256(args = (Kind::Single, 256), setup = warm, config = limit("hits single_256"))]
#[bench::ready_1(args = (Kind::Ready, 1), setup = warm, config = limit("hits ready_1"))]
#[bench::ready_16(args = (Kind::Ready, 16), setup = warm, config = limit("hits ready_16"))]
#[bench::pend_once_16(args = (Kind::PendOnce, 16), setup = warm, config = limit("hits pend_once_16"))]
fn hits(space: Hitting) -> Hitting {
    invalidate(&space.0, &[0; TIMES]);
    space
}

#[library_benchmark]
#[bench::uncontended(args = (Kind::Single, 1), setup = warm, config = limit("read uncontended"))]
fn read(space: Hitting) -> Hitting {
    block_on(async {
        for _ in 0..TIMES {
            let device = black_box(&space.1[0]);
            let sequence = device.read_begin().await;
            black_box(device.read_retry(sequence));
        }
    });
    space
}

library_benchmark_group!(
    name = instructions,
    benchmarks = [no_hit, one_hit, insert_remove, hits, read]
);

main!(library_benchmark_groups = instructions);
