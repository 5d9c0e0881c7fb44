//! The figures of the library beside their goals: `cargo bench --bench table`.
//!
//! Prints calibration rows, then a row for each goal, then the curves. A goal was set on another
//! machine, beside calibration rows of its own; here it is scaled by how the same rows come out on
//! this machine in the same run, so that ratios are compared and not machines. All of it is
//! measured in several rounds, seconds apart, and the quiet part of that counts
//! (`table/harness.rs`). `MISS` marks what is over its scaled goal. Rows of costs and of fairness
//! have bounds that are not scaled. `--help` lists the sections and the options.
#![allow(missing_docs, unreachable_pub, clippy::print_stdout, clippy::print_stderr)]

#[cfg(all(feature = "userfaultfd", target_os = "linux"))]
#[path = "table/batches.rs"]
mod batches;
#[path = "table/bounds.rs"]
mod bounds;
#[cfg(all(feature = "cache", feature = "userfaultfd", target_os = "linux"))]
#[path = "table/cache.rs"]
mod cache;
#[path = "table/costs.rs"]
mod costs;
#[path = "table/curves.rs"]
mod curves;
#[path = "table/devices.rs"]
mod devices;
#[path = "table/fairness.rs"]
mod fairness;
#[path = "table/harness.rs"]
mod harness;
#[path = "table/options.rs"]
mod options;
#[path = "table/plot.rs"]
mod plot;
#[path = "../tests/support/mod.rs"]
mod support;

use bounds::Bound;
use devices::{Device, Kind, Population, hitting, random};
use futures::executor::block_on;
use harness::Harness;
use options::{Options, Section};
use serde::Serialize;
use shootdown::{AddressSpace, Event, Subscription};
use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;

/// How often the calibration and the table are measured.
const ROUNDS: usize = 6;

#[derive(Clone, Serialize)]
struct Calibration {
    name: &'static str,
    /// On the machine on which the goals were set.
    there_ns: f64,
    here_ns: f64,
}

impl Calibration {
    fn ratio(&self) -> f64 {
        self.here_ns / self.there_ns
    }
}

/// A line of the table.
#[derive(Clone, Serialize)]
pub struct Row {
    name: String,
    /// The kernel's code in user space, on the machine on which the goals were set.
    kernel_ns: Option<f64>,
    goal_ns: f64,
    /// The goal, scaled to this machine.
    scaled_goal_ns: f64,
    measured_ns: f64,
    miss: bool,
}

impl Row {
    fn new(
        name: String,
        kernel_ns: Option<f64>,
        goal_ns: f64,
        scaled_goal_ns: f64,
        measured_ns: f64,
    ) -> Self {
        let miss = measured_ns.partial_cmp(&scaled_goal_ns) != Some(std::cmp::Ordering::Less);
        Self { name, kernel_ns, goal_ns, scaled_goal_ns, measured_ns, miss }
    }
}

#[derive(Serialize)]
struct Report<'a> {
    calibration: &'a [Calibration],
    rows: &'a [Row],
    bounds: &'a [Bound],
    fairness: &'a Option<fairness::Fairness>,
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    batches: &'a Option<batches::Batches>,
    curves: &'a [curves::Curve],
}

/// How goals are scaled: work under locks by the mutex row, look-ups among many by the map rows.
struct Scale {
    mutex: f64,
    loads: f64,
    map_10_000: f64,
    map_1_000_000: f64,
    join: f64,
}

struct Table {
    rows: Vec<Row>,
    scale: Scale,
}

impl Table {
    fn add(
        &mut self,
        name: impl Into<String>,
        kernel_ns: Option<f64>,
        goal_ns: f64,
        scaled_goal_ns: f64,
        measured_ns: f64,
    ) {
        self.rows.push(Row::new(name.into(), kernel_ns, goal_ns, scaled_goal_ns, measured_ns));
    }

    /// A goal of work under locks that looks something up among `n`: the part beyond `fixed` is the
    /// look-up.
    fn scaled(&self, goal: f64, fixed: f64, n: u64) -> f64 {
        let map = match n {
            0..=100 => self.scale.mutex.min(self.scale.map_10_000),
            101..=10_000 => self.scale.map_10_000,
            _ => self.scale.map_1_000_000,
        };
        fixed.min(goal) * self.scale.mutex + (goal - fixed).max(0.0) * map
    }
}

fn calibrate(harness: &mut Harness) -> Vec<Calibration> {
    let mutex = Mutex::new(0u64);
    let lock = harness.median("calibration/mutex", |n| harness::lock(&mutex, n));
    let words = [AtomicU64::new(1), AtomicU64::new(2)];
    let loads = harness.median("calibration/loads", |n| harness::load(&words, n));
    let mut rows = vec![
        Calibration { name: "uncontended Mutex lock + unlock", there_ns: 5.4, here_ns: lock },
        Calibration { name: "two atomic loads and a compare", there_ns: 1.0, here_ns: loads },
    ];
    let mut map = BTreeMap::new();
    let mut next = random(1);
    for (keys, there_ns, name) in [
        (10_000, 86.0, "BTreeMap look-up among 10,000"),
        (1_000_000, 473.0, "BTreeMap look-up among 1,000,000"),
    ] {
        while map.len() < keys {
            map.insert(next(), [0u64; 2]);
        }
        let here_ns = harness.median(&format!("calibration/map {keys}"), |n| {
            for _ in 0..n {
                black_box(map.range(next()..).next());
            }
        });
        rows.push(Calibration { name, there_ns, here_ns });
    }
    let join = harness.median("calibration/join", |n| {
        block_on(async {
            // In joins of 64, as many invalidations have.
            for _ in 0..n.div_ceil(64) {
                let mut join = futures::stream::FuturesUnordered::new();
                (0..64).for_each(|_| join.push(Box::pin(devices::PendOnce::default())));
                while futures::StreamExt::next(&mut join).await.is_some() {}
            }
        });
    });
    rows.push(Calibration {
        name: "FuturesUnordered, boxed, pend once, per future",
        there_ns: 131.0,
        here_ns: join,
    });
    rows
}

/// Addresses that a measurement goes through round and round; drawn before, because drawing one
/// takes as long as a short invalidation. A power of two, as is the length of every such list: an
/// iterator that goes round has four words to be saved around each await, which is a twentieth of
/// one.
const DRAWN: usize = 1 << 16;

/// `invalidate` and its end, `n` times, as a user writes it; of the addresses from `next` on.
#[inline(never)]
fn invalidate(space: &AddressSpace, n: u64, addresses: &[u64], next: &mut usize) {
    let from = *next;
    *next += n as usize;
    block_on(async {
        for at in from..from + n as usize {
            let address = addresses[at & (addresses.len() - 1)];
            drop(black_box(space.invalidate(devices::page(address), Event::Unmap).await));
        }
    });
}

/// `read_begin` and `read_retry`, `n` times, as a user writes it. As in the calibration row,
/// nothing is known of what is loaded from before.
#[inline(never)]
fn read(device: &Subscription<Device>, n: u64) {
    block_on(async {
        for _ in 0..n {
            let device = black_box(device);
            let sequence = device.read_begin().await;
            black_box(device.read_retry(sequence));
        }
    });
}

/// The rows whose cost depends on how many notifiers are registered.
fn by_population(harness: &mut Harness, table: &mut Table) {
    let goals = [
        (1, 15.0, 15.0, 25.0, 25.0, None),
        (100, 43.0, 39.0, 55.0, 50.0, Some((52.0, 50.0))),
        (10_000, 134.0, 94.0, 164.0, 120.0, Some((154.0, 120.0))),
        (1_000_000, 1260.0, 500.0, 1290.0, 560.0, Some((1135.0, 700.0))),
    ];
    for (n, kernel_miss, goal_miss, kernel_hit, goal_hit, change) in goals {
        let population = Population::new(n);
        let mut next = random(n + 7);
        let drawn: Vec<u64> = (0..DRAWN).map(|_| next() % n).collect();
        let gaps: Vec<u64> = drawn.iter().map(|at| population.gap(*at)).collect();
        let pages: Vec<u64> = drawn.iter().map(|at| population.page(*at)).collect();
        let space = &population.space;
        let mut at = 0;
        let miss =
            harness.median(&format!("miss {n}"), |times| invalidate(space, times, &gaps, &mut at));
        table.add(
            format!("invalidate + end, no hit, N = {n}"),
            Some(kernel_miss),
            goal_miss,
            table.scaled(goal_miss, 15.0, n),
            miss,
        );
        let hit =
            harness.median(&format!("hit {n}"), |times| invalidate(space, times, &pages, &mut at));
        table.add(
            format!("invalidate + end, 1 hit, N = {n}"),
            Some(kernel_hit),
            goal_hit,
            table.scaled(goal_hit, 25.0, n),
            hit,
        );
        if let Some((kernel, goal)) = change {
            let both = harness.median(&format!("insert {n}"), |times| {
                let from = at;
                at += times as usize;
                block_on(async {
                    for at in from..from + times as usize {
                        let gap = gaps[at & (gaps.len() - 1)];
                        black_box(population.insert_at(gap).remove().await);
                    }
                });
            });
            table.add(
                format!("insert + remove, N = {n}"),
                Some(kernel),
                goal,
                table.scaled(goal, 40.0, n),
                both,
            );
        }
        if n == 1 {
            let device = population.device(0);
            let read = harness.median("read", |times| read(device, times));
            table.add(
                "read_begin + read_retry",
                Some(5.9),
                1.5,
                1.5 * table.scale.loads.max(1.0),
                read,
            );
        }
    }
}

/// A space in which an invalidation hits `k` notifiers of a kind, for each kind and `k`.
type Hit = BTreeMap<(Kind, u64), (AddressSpace, Vec<Subscription<Device>>)>;

/// Made and used before anything else, so that where they lie does not depend on what a million
/// other notifiers have left of the heap: 256 of them fill the first cache.
fn spaces_to_hit() -> Hit {
    let wanted = [
        (Kind::Single, &[1, 4, 16, 64, 256][..]),
        (Kind::Ready, &[1, 16, 256]),
        (Kind::PendOnce, &[16, 256]),
    ];
    let each = wanted.into_iter().flat_map(|(kind, ks)| ks.iter().map(move |&k| (kind, k)));
    let spaces: Hit = each.map(|(kind, k)| ((kind, k), hitting(kind, k))).collect();
    spaces.values().for_each(|(space, _)| invalidate(space, 1, &[0], &mut 0));
    spaces
}

/// The rows whose cost depends on how many notifiers an invalidation hits.
fn by_hits(harness: &mut Harness, table: &mut Table, spaces: &Hit) {
    let hit = |harness: &mut Harness, kind, k: u64| {
        let (space, _) = &spaces[&(kind, k)];
        harness.median(&format!("{kind:?} {k}"), |times| invalidate(space, times, &[0], &mut 0))
    };
    let mut single = BTreeMap::new();
    for (k, kernel, factor) in
        [(1, 25.0, 1.0), (4, 59.0, 1.0), (16, 194.0, 0.9), (64, 752.0, 0.9), (256, 3039.0, 0.9)]
    {
        let measured = hit(harness, Kind::Single, k);
        single.insert(k, measured);
        if k > 1 {
            table.add(
                format!("invalidate + end, {k} hits"),
                Some(kernel),
                kernel * factor,
                kernel * factor * table.scale.mutex,
                measured,
            );
        }
    }
    for (k, kernel) in [(1, 27.0), (16, 220.0), (256, 3724.0)] {
        let measured = hit(harness, Kind::Ready, k);
        let goal = kernel * 1.2;
        table.add(
            format!("… each with a pass ready at once, {k} hits"),
            Some(kernel),
            goal,
            goal * table.scale.mutex,
            measured,
        );
    }
    for k in [16, 256] {
        let per_pass = (hit(harness, Kind::PendOnce, k) - single[&k]) / k as f64;
        table.add(
            format!("… with a pass that pends once, {k} hits, per pass more"),
            None,
            150.0,
            150.0 * table.scale.join,
            per_pass,
        );
    }
}

/// One round more: the calibration and the rows beside it, as they come out in all rounds so far.
fn measure(harness: &mut Harness, spaces: &Hit) -> (Vec<Calibration>, Table) {
    let calibration = calibrate(harness);
    let ratio = |at: usize| calibration[at].ratio();
    let scale = Scale {
        mutex: ratio(0),
        loads: ratio(1),
        map_10_000: ratio(2),
        map_1_000_000: ratio(3),
        join: ratio(4),
    };
    let mut table = Table { rows: Vec::new(), scale };
    by_population(harness, &mut table);
    by_hits(harness, &mut table, spaces);
    (calibration, table)
}

fn main() {
    let options = Options::parse();
    if options.test {
        return; // `cargo test --benches` only wants to know whether it runs.
    }
    options.check_files().unwrap_or_else(|error| fail(&error));
    let wants = |section| options.wants(section);
    let spaces = wants(Section::Goals).then(spaces_to_hit);
    let mut harness = Harness::new();
    let mut calibration = Vec::new();
    let (mut rows, mut bounds, mut curves) = (Vec::new(), Vec::new(), Vec::new());
    if let Some(spaces) = &spaces {
        for _ in 1..ROUNDS {
            measure(&mut harness, spaces);
        }
        let (all, table) = measure(&mut harness, spaces);
        (calibration, rows) = (all, table.rows);
    }
    if wants(Section::Cache) {
        #[cfg(all(feature = "cache", feature = "userfaultfd", target_os = "linux"))]
        {
            cache::measure(&mut harness, &mut rows);
            let of_cache = cache::curves(&mut harness);
            rows.extend(cache::bounds(&of_cache));
            curves.extend(of_cache);
        }
        #[cfg(not(all(feature = "cache", feature = "userfaultfd", target_os = "linux")))]
        println!(
            "left out: the rows of the registration cache, which need --features cache,userfaultfd"
        );
    }
    if wants(Section::Curves) {
        let of_space = curves::measure(&mut harness);
        rows.extend(curves::bounds(&of_space));
        curves.extend(of_space);
    }
    if wants(Section::Costs) {
        let costs = costs::measure(&mut harness);
        bounds.extend(costs::rows(&costs));
        curves.extend(costs);
    }
    let fairness = wants(Section::Fairness).then(fairness::measure);
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    let batches = wants(Section::Batches).then(batches::measure);
    #[cfg(not(all(feature = "userfaultfd", target_os = "linux")))]
    if wants(Section::Batches) {
        println!("left out: a thousand unmappings, which need --features userfaultfd");
    }

    print(&calibration, &rows, &curves);
    if !bounds.is_empty() {
        bounds::print("costs", &bounds);
    }
    if let Some(fairness) = &fairness {
        fairness.print();
        bounds.extend_from_slice(&fairness.rows);
    }
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    if let Some(batches) = &batches {
        batches.print();
        bounds.extend_from_slice(&batches.rows);
    }
    if !curves.is_empty() {
        let picture = options.picture();
        plot::write(&picture, &curves)
            .unwrap_or_else(|error| fail(&options::cannot_be_written(&picture, &error)));
        println!("\nthe curves are in {}", picture.display());
    }
    if let Some(file) = &options.json {
        let report = Report {
            calibration: &calibration,
            rows: &rows,
            bounds: &bounds,
            fairness: &fairness,
            #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
            batches: &batches,
            curves: &curves,
        };
        let text =
            serde_json::to_string_pretty(&report).unwrap_or_else(|error| fail(&error.to_string()));
        std::fs::write(file, text)
            .unwrap_or_else(|error| fail(&options::cannot_be_written(file, &error)));
    }
    let misses =
        rows.iter().filter(|row| row.miss).count() + bounds.iter().filter(|row| row.miss).count();
    println!("{} rows, {misses} miss", rows.len() + bounds.len());
}

fn print(calibration: &[Calibration], rows: &[Row], curves: &[curves::Curve]) {
    if !calibration.is_empty() {
        println!("\n{:<58} {:>9} {:>9} {:>9}", "calibration, ns", "there", "here", "ratio");
    }
    for row in calibration {
        println!(
            "{:<58} {:>9.1} {:>9.1} {:>9.2}",
            row.name,
            row.there_ns,
            row.here_ns,
            row.ratio()
        );
    }
    if !rows.is_empty() {
        println!(
            "\n{:<58} {:>9} {:>9} {:>9} {:>9}",
            "work, ns", "kernel", "goal", "scaled", "measured"
        );
    }
    for row in rows {
        let kernel = row.kernel_ns.map_or_else(|| "-".into(), |ns| format!("{ns:.0}"));
        let mark = if row.miss { "  MISS" } else { "" };
        println!(
            "{:<58} {kernel:>9} {:>9.1} {:>9.1} {:>9.1}{mark}",
            row.name, row.goal_ns, row.scaled_goal_ns, row.measured_ns
        );
    }
    for curve in curves {
        println!("\n{}", curve.name);
        for (x, y) in &curve.points {
            println!("{x:>12.0} {y:>12.1}");
        }
    }
}

fn fail(message: &str) -> ! {
    eprintln!("error: {message}");
    std::process::exit(2)
}
