//! The main job as a user runs it: the binary of the example, its output and its exit codes.
#![allow(missing_docs)]

use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{OnceLock, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

/// The example, built like this test: `cargo test --release --test multi_gpu` runs what the README
/// says. `cargo test` builds the example itself; `cargo test --test multi_gpu` does not.
fn binary() -> PathBuf {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    let binary = BINARY.get_or_init(|| {
        let mut build = Command::new(env!("CARGO"));
        build
            .args(["build", "--quiet", "--example", "multi_gpu"])
            .args((!cfg!(debug_assertions)).then_some("--release"))
            .current_dir(env!("CARGO_MANIFEST_DIR"));
        assert!(build.status().expect("cargo runs").success(), "the example cannot be built");
        let test = std::env::current_exe().unwrap();
        test.ancestors().nth(2).unwrap().join("examples").join("multi_gpu")
    });
    binary.clone()
}

/// Held alone by a run in real time, which would not like company.
static MACHINE: RwLock<()> = RwLock::new(());

fn multi_gpu(arguments: &[&str]) -> Output {
    let _shared = MACHINE.read().unwrap_or_else(PoisonError::into_inner);
    run(arguments)
}

fn multi_gpu_alone(arguments: &[&str]) -> Output {
    let _alone = MACHINE.write().unwrap_or_else(PoisonError::into_inner);
    run(arguments)
}

fn run(arguments: &[&str]) -> Output {
    let binary = binary();
    Command::new(&binary)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}", binary.display()))
}

fn rows(output: &Output) -> Vec<Value> {
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    report["rows"].as_array().unwrap().clone()
}

fn error(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn number(row: &Value, field: &str) -> u64 {
    row[field].as_u64().unwrap_or_else(|| panic!("{field} in {row}"))
}

fn row<'a>(rows: &'a [Value], gpus: u64, mode: &str) -> &'a Value {
    rows.iter()
        .find(|row| row["gpus"] == gpus && row["mode"] == mode)
        .unwrap_or_else(|| panic!("{gpus} GPUs, {mode}"))
}

const MODES: [&str; 4] = ["single-pass", "two-pass", "round-robin", "poll-driven"];

#[test]
#[cfg_attr(debug_assertions, ignore = "long: cargo test --release --test multi_gpu")]
fn four_ways_to_wait_are_compared_at_every_number_of_gpus() {
    let of = |profile| {
        let output = multi_gpu(&["--json", "--profile", profile]);
        assert!(output.status.success(), "{}", error(&output));
        rows(&output)
    };
    let [idle, busy, preempting, mixed] = ["idle", "busy", "preempting", "mixed"].map(of);
    for row in [&idle, &busy, &preempting, &mixed].into_iter().flatten() {
        let fields = [
            "gpus",
            "invalidations",
            "with_work",
            "unheard",
            "reclaims",
            "overlaps",
            "collisions",
            "waits",
            "finish_in_use",
        ];
        let times = [
            "notifier_calls",
            "dma_accesses",
            "p50_ns",
            "p99_ns",
            "max_ns",
            "total_ns",
            "ideal_ns",
        ];
        for field in fields.iter().chain(&times) {
            number(row, field);
        }
        assert_eq!(row["stale_accesses"], 0, "{row}");
        assert!(
            number(row, "with_work") < number(row, "invalidations"),
            "those without work are counted apart"
        );
        assert!(row["ideal_ratio"].as_f64().unwrap() >= 1.0, "the ideal is a bound: {row}");
    }
    // Where nobody else invalidates, what is above it is the waking of a thread.
    for row in rows(&multi_gpu(&["--json", "--modes", "poll-driven", "--reclaim-interval-us", "0"]))
    {
        assert!((1.0..=1.1).contains(&row["ideal_ratio"].as_f64().unwrap()), "{row}");
    }
    for rows in [&idle, &busy, &preempting, &mixed] {
        assert_eq!(rows.len(), 28);
        let total = |mode| number(row(rows, 64, mode), "total_ns") as f64;
        assert!(
            total("single-pass") > 3.0 * total("two-pass"),
            "starting all first is what it is about"
        );
    }
    let total = |rows: &[Value], mode| number(row(rows, 64, mode), "total_ns") as f64;
    let (two, poll) = (total(&idle, "two-pass"), total(&idle, "poll-driven"));
    assert!(
        (0.97..1.03).contains(&(two / poll)),
        "with one wait two passes are enough: {two} and {poll}"
    );
    let (two, poll) = (total(&busy, "two-pass"), total(&busy, "poll-driven"));
    assert!(two > 1.25 * poll, "with dependent waits they are not: {two} and {poll}");
}

#[test]
#[cfg_attr(debug_assertions, ignore = "long: cargo test --release --test multi_gpu")]
fn much_happens_at_once() {
    let rows = rows(&multi_gpu(&["--json", "--gpus", "16"]));
    for row in &rows {
        for field in ["overlaps", "collisions", "waits"] {
            assert!(number(row, field) >= 200, "{field} in {row}");
        }
    }
    // One after the other, as it was recorded, is there on request.
    let alone =
        multi_gpu(&["--json", "--gpus", "4", "--threads", "false", "--reclaim-interval-us", "0"]);
    assert!(
        self::rows(&alone).iter().all(|row| row["overlaps"] == 0 && row["stale_accesses"] == 0)
    );
}

/// Runs `code`. Returns its result, and how many times as long as it was to sleep a thread slept
/// meanwhile, in the median: 1 where the machine's timers are exact and nobody else runs.
fn beside_a_timer<R>(each: Duration, code: impl FnOnce() -> R) -> (R, f64) {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let timer = scope.spawn(|| {
            let mut ratios = Vec::new();
            while ratios.is_empty() || !over.load(Ordering::Relaxed) {
                let began = Instant::now();
                thread::sleep(each);
                ratios.push(began.elapsed().as_secs_f64() / each.as_secs_f64());
            }
            ratios.sort_by(f64::total_cmp);
            ratios[ratios.len() / 2]
        });
        let result = code();
        over.store(true, Ordering::Relaxed);
        (result, timer.join().unwrap())
    })
}

/// The ideal that this machine can reach: its timers fire late when others run on it, too.
#[test]
#[cfg_attr(debug_assertions, ignore = "long: cargo test --release --test multi_gpu")]
fn real_time_is_within_a_tenth_of_the_ideal_at_16_gpus() {
    // The best of a few runs counts.
    let ratios: Vec<(f64, f64)> = (0..5)
        .map(|seed| {
            let seed = seed.to_string();
            let options = [
                "--json",
                "--real-time",
                "--gpus",
                "16",
                "--limit",
                "12",
                "--seed",
                &seed,
                "--latency-floor-us",
                "3000",
                "--reclaim-interval-us",
                "0",
            ];
            let least = Duration::from_micros(3000);
            let (output, timer) = beside_a_timer(least, || multi_gpu_alone(&options));
            assert!(output.status.success(), "{}", error(&output));
            let row = row(&rows(&output), 16, "poll-driven").clone();
            (row["ideal_ratio"].as_f64().unwrap(), timer)
        })
        .take_while_inclusive(|(ratio, timer)| *ratio > 1.1 * timer)
        .collect();
    let reached = ratios.last().is_some_and(|(ratio, timer)| *ratio <= 1.1 * timer);
    assert!(reached, "over the ideal, and a timer of the machine over its time: {ratios:?}");
}

/// `take_while` with the item that ends it.
trait TakeWhileInclusive: Iterator + Sized {
    fn take_while_inclusive(
        self,
        mut goes_on: impl FnMut(&Self::Item) -> bool,
    ) -> impl Iterator<Item = Self::Item> {
        let mut over = false;
        self.map_while(move |item| {
            (!over).then(|| {
                over = !goes_on(&item);
                item
            })
        })
        .fuse()
    }
}

impl<I: Iterator> TakeWhileInclusive for I {}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_seed_others() {
    let run =
        |seed| multi_gpu(&["--gpus", "1,4", "--limit", "100", "--json", "--seed", seed]).stdout;
    assert_eq!(run("5"), run("5"));
    assert_ne!(run("5"), run("6"));
}

/// What `--fault` knows: `--help` lists it, and so does the answer to one that it does not know.
fn faults() -> Vec<String> {
    let text = error(&multi_gpu(&["--fault", "none-of-them"]));
    let list = text
        .split_once("[possible values: ")
        .and_then(|(_, rest)| rest.split_once(']'))
        .expect("a list")
        .0;
    list.split(',').map(|fault| fault.trim().to_owned()).collect()
}

#[test]
fn starting_all_first_is_worth_it_and_a_planted_bug_is_found() {
    let right = multi_gpu(&["--json", "--gpus", "1,4", "--limit", "60"]);
    assert!(right.status.success(), "{}", error(&right));
    let rows_of_right = rows(&right);
    let total = |mode| number(row(&rows_of_right, 4, mode), "total_ns");
    assert!(total("single-pass") > total("poll-driven"));
    assert!(rows_of_right.iter().all(|row| row["stale_accesses"] == 0));
    let faults = faults();
    let wrong = multi_gpu(&["--json", "--gpus", "1", "--fault", &faults[0]]);
    assert_eq!(wrong.status.code(), Some(1), "{}", faults[0]);
    assert!(rows(&wrong).iter().all(|row| number(row, "stale_accesses") > 0), "{}", faults[0]);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "long: cargo test --release --test multi_gpu")]
fn every_planted_bug_is_found_in_every_mode_with_any_number_of_gpus() {
    let (faults, help) =
        (faults(), String::from_utf8_lossy(&multi_gpu(&["--help"]).stdout).into_owned());
    assert!(faults.len() >= 20, "{faults:?}");
    for fault in &faults {
        assert!(help.contains(&format!("- {fault}: ")), "{fault} is not in --help");
        let output = multi_gpu(&["--gpus", "1,4,16", "--json", "--fault", fault]);
        assert_eq!(output.status.code(), Some(1), "{fault}");
        assert!(error(&output).contains("used a mapping of memory that had changed"), "{fault}");
        let rows = rows(&output);
        // With a driver that is wrong there is nothing to be found about ways to wait.
        let text = multi_gpu(&["--gpus", "2", "--fault", fault]).stdout;
        assert!(
            String::from_utf8_lossy(&text).contains("Found: nothing, because devices used"),
            "{fault}"
        );
        for (gpus, mode) in [1, 4, 16].into_iter().flat_map(|gpus| MODES.map(|mode| (gpus, mode))) {
            assert!(
                number(row(&rows, gpus, mode), "stale_accesses") > 0,
                "{fault}, {gpus} GPUs, {mode}"
            );
        }
    }
}

#[test]
#[cfg_attr(debug_assertions, ignore = "long: cargo test --release --test multi_gpu")]
fn a_program_that_gathers_its_changes_waits_less_and_nothing_is_stale() {
    let run = |gpus, options: &[&str]| {
        let options: Vec<&str> = [&["--json", "--gpus", gpus], options].concat();
        let output = multi_gpu(&options);
        assert!(output.status.success(), "{options:?}: {}", error(&output));
        rows(&output)
    };
    for profile in ["busy"] {
        let [alone, gathered] =
            ["1", "64"].map(|batch| run("1,4,16", &["--profile", profile, "--batch", batch]));
        for (gpus, mode) in [1, 4, 16].into_iter().flat_map(|gpus| MODES.map(|mode| (gpus, mode))) {
            let of = |field| [&alone, &gathered].map(|rows| number(row(rows, gpus, mode), field));
            assert_eq!(of("stale_accesses"), [0, 0], "{profile}, {gpus} GPUs, {mode}");
            assert!(
                of("with_work")[1] < of("with_work")[0],
                "{profile}, {gpus} GPUs, {mode}: fewer invalidations"
            );
        }
        let total = |rows: &[Value]| number(row(rows, 16, "poll-driven"), "total_ns") as f64;
        assert!(
            total(&gathered) < 0.85 * total(&alone),
            "{profile}: {} and {}",
            total(&gathered),
            total(&alone)
        );
    }
    // Here first passes are told of several ranges, and of others than those before them: each of
    // these runs finds a driver that does not keep them apart.
    let build =
        format!("{}/examples/multi_gpu/workloads/cargo-build.strace", env!("CARGO_MANIFEST_DIR"));
    for (profile, seed) in [("busy", "1"), ("busy", "2"), ("mixed", "1")] {
        run(
            "4",
            &[
                "--workload",
                &build,
                "--all-processes",
                "--batch",
                "64",
                "--profile",
                profile,
                "--seed",
                seed,
            ],
        );
    }
    run("4", &["--workload", &build, "--all-processes", "--batch", "65536", "--threads", "false"]);
    let said = String::from_utf8(multi_gpu(&["--gpus", "1", "--batch", "64"]).stdout).unwrap();
    assert!(said.contains("Up to 64 changes of the memory are invalidated at once"), "{said}");
}

/// What a batch adds to the driver: several ranges in one first pass, one command and one wait.
#[test]
#[cfg_attr(debug_assertions, ignore = "long: cargo test --release --test multi_gpu")]
fn planted_bugs_are_found_if_changes_are_gathered() {
    for fault in faults() {
        let output = multi_gpu(&["--gpus", "1,4", "--json", "--batch", "64", "--fault", &fault]);
        assert_eq!(output.status.code(), Some(1), "{fault}");
        let rows = rows(&output);
        for (gpus, mode) in [1, 4].into_iter().flat_map(|gpus| MODES.map(|mode| (gpus, mode))) {
            assert!(
                number(row(&rows, gpus, mode), "stale_accesses") > 0,
                "{fault}, {gpus} GPUs, {mode}"
            );
        }
    }
}

/// Long form: `MULTI_GPU_SEEDS=100 cargo test --release --test multi_gpu nothing_is_stale`.
#[test]
#[cfg_attr(debug_assertions, ignore = "long: cargo test --release --test multi_gpu")]
fn nothing_is_stale_whatever_the_seed_the_workload_and_the_profile() {
    let seeds: u64 =
        std::env::var("MULTI_GPU_SEEDS").ok().map_or(2, |seeds| seeds.parse().expect("a number"));
    let recording =
        |name: &str| format!("{}/examples/multi_gpu/workloads/{name}", env!("CARGO_MANIFEST_DIR"));
    let workloads = ["numpy-training.strace", "numpy.strace", "cargo-build.strace"].map(recording);
    for seed in (100..100 + seeds).map(|seed| seed.to_string()) {
        for (workload, profile) in workloads
            .iter()
            .flat_map(|workload| ["idle", "busy", "mixed"].map(|profile| (workload, profile)))
        {
            let mut options = vec![
                "--json",
                "--gpus",
                "1,4",
                "--seed",
                &seed,
                "--profile",
                profile,
                "--workload",
                workload,
            ];
            if !workload.contains("training") {
                options.push("--all-processes");
            }
            let output = multi_gpu(&options);
            assert!(output.status.success(), "{options:?}: {}", error(&output));
        }
    }
}

#[test]
fn bad_input_says_what_to_do_and_exits_with_2() {
    let dir = std::env::temp_dir().join(format!("shootdown-multi-gpu-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (empty, bad) =
        (file("empty", ""), file("bad", "5 1.000000 brk(NULL) = 0x1000\nnonsense\n"));
    for (arguments, says) in [
        (&["--workload", "/does/not/exist"][..], "cannot be read"),
        (&["--workload", &empty], "holds no system call"),
        (&["--workload", &bad], "line 2"),
        (&["--gpus", "0"], "0 is not in 1..=1024"),
        (&["--batch", "0"], "0 is not in 1..=65536"),
        (&["--batch", "65537"], "65537 is not in 1..=65536"),
        (&["--wibble"], "unexpected argument"),
        (&["--profile", "asleep"], "possible values: idle, busy, preempting, mixed"),
        (&["--modes", "three-pass"], "possible values: single-pass"),
        (&["--dma-interval-us", "0"], "has to be more than 0"),
        (&["--wake-us", "-1"], "unexpected argument"),
        (&["--wake-us=-1"], "negative"),
        (&["--gpus", "1", "--limit", "1", "--plot", "/does/not/exist.svg"], "cannot be written"),
    ] {
        let output = multi_gpu(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(error(&output).contains(says), "{arguments:?} says {}", error(&output));
    }
    let lenient = multi_gpu(&["--workload", &bad, "--lenient", "--gpus", "1", "--json"]);
    assert!(lenient.status.success());
    let report: Value = serde_json::from_slice(&lenient.stdout).unwrap();
    assert_eq!(
        (&report["workload"]["skipped_lines"], &report["workload"]["lines_read"]),
        (&1.into(), &2.into())
    );
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_result_that_cannot_be_written_is_an_error_and_a_reader_that_goes_away_is_none() {
    let binary = binary();
    let to = |stdout: std::process::Stdio| {
        Command::new(&binary).args(["--gpus", "1"]).stdout(stdout).output().unwrap()
    };
    if let Ok(full) = std::fs::OpenOptions::new().write(true).open("/dev/full") {
        let output = to(full.into());
        assert_eq!(output.status.code(), Some(2));
        assert!(error(&output).contains("the result cannot be written"), "{}", error(&output));
    }
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    assert_eq!(to(writer.into()).status.code(), Some(0));
}

/// A driver is the driver of a mapping only as long as it is there, also where many pages of each
/// are in use.
#[test]
#[cfg_attr(debug_assertions, ignore = "long: cargo test --release --test multi_gpu")]
fn many_pages_of_many_mappings_are_not_stale() {
    for seed in ["1", "5"] {
        let output = multi_gpu(&[
            "--resident-pages",
            "64",
            "--profile",
            "busy",
            "--gpus",
            "1,3",
            "--seed",
            seed,
            "--json",
        ]);
        assert!(output.status.success(), "{}", error(&output));
    }
    // A change that takes no time, and so a thread that ends as it is woken.
    let output =
        multi_gpu(&["--change-us", "0", "--reclaim-interval-us", "0", "--gpus", "1,2", "--json"]);
    assert!(output.status.success(), "{}", error(&output));
}

#[test]
fn the_picture_shows_all_four() {
    let path = std::env::temp_dir().join(format!("shootdown-{}.svg", std::process::id()));
    let output = multi_gpu(&["--gpus", "1,8", "--plot", path.to_str().unwrap()]);
    assert!(output.status.success(), "{}", error(&output));
    let svg = std::fs::read_to_string(&path).unwrap();
    for text in
        ["Latency of an invalidation", "jobs in flight", "preemption", "TLB flush", "first pass"]
    {
        assert!(svg.contains(text), "{text} is not in the picture");
    }
    for mode in MODES {
        assert!(
            svg.contains(&format!("{mode}: one invalidation"))
                && svg.contains(&format!("{mode}, median")),
            "{mode}"
        );
    }
    std::fs::remove_file(path).unwrap();
}

#[test]
#[cfg_attr(debug_assertions, ignore = "long: cargo test --release --test multi_gpu")]
fn a_run_says_what_it_has_found() {
    let found = |profile| {
        String::from_utf8(multi_gpu(&["--gpus", "1,32", "--profile", profile]).stdout).unwrap()
    };
    let (idle, busy) = (found("idle"), found("busy"));
    assert!(
        idle.contains("Found: for 32 idle GPUs") && idle.contains("two-pass is enough"),
        "{idle}"
    );
    assert!(
        busy.contains("Found: for 32 busy GPUs") && busy.contains("two-pass waits 1."),
        "{busy}"
    );
    // Not of one way alone.
    let alone = multi_gpu(&["--gpus", "1", "--modes", "multi-pass"]);
    assert!(
        alone.status.success()
            && String::from_utf8_lossy(&alone.stdout).contains("Found: nothing, because not all")
    );
    let few = multi_gpu(&["--gpus", "1", "--limit", "3"]);
    assert!(
        String::from_utf8_lossy(&few.stdout)
            .contains("Found: nothing, because only 3 invalidations")
    );
    let harmless = multi_gpu(&["--gpus", "1", "--profile", "idle", "--fault", "skip-jobs"]);
    assert!(
        harmless.status.success()
            && String::from_utf8_lossy(&harmless.stdout).contains("not the planted bug either")
    );
}

#[test]
fn reports_are_compared_also_with_those_of_before() {
    let dir = std::env::temp_dir().join(format!("shootdown-compare-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let (old, new) = (dir.join("old.json"), dir.join("new.json"));
    let fields = r#""invalidations":1,"notifier_calls":1,"dma_accesses":1,"p50_ns":50,"p99_ns":99,"max_ns":100,"total_ns":100,"ideal_ratio":1.0,"stale_accesses":0"#;
    let workload = r#"{"name":"a","lines_read":1,"operations":{},"skipped_lines":0,"unfinished_calls":0,"address_spaces":1}"#;
    let text = format!(
        r#"{{"workload":{workload},"seed":1,"real_time":false,"rows":[{{"gpus":4,"mode":"multi-pass",{fields}}}]}}"#
    );
    std::fs::write(&old, text).unwrap();
    std::fs::write(&new, multi_gpu(&["--gpus", "4", "--json"]).stdout).unwrap();
    let output = multi_gpu(&["--compare", old.to_str().unwrap(), new.to_str().unwrap()]);
    assert!(output.status.success(), "{}", error(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("4 poll-driven") && text.contains("they differ in the profile"),
        "{text}"
    );
    let other = dir.join("other.json");
    std::fs::write(&other, multi_gpu(&["--gpus", "4", "--json", "--wake-us", "50"]).stdout)
        .unwrap();
    let differ = multi_gpu(&["--compare", new.to_str().unwrap(), other.to_str().unwrap()]);
    assert!(
        String::from_utf8_lossy(&differ.stdout).contains("they differ in the wake: 2µs and 50µs")
    );
    let batches = dir.join("batches.json");
    std::fs::write(&batches, multi_gpu(&["--gpus", "4", "--json", "--batch", "64"]).stdout)
        .unwrap();
    let differ = multi_gpu(&["--compare", new.to_str().unwrap(), batches.to_str().unwrap()]);
    assert!(String::from_utf8_lossy(&differ.stdout).contains("they differ in the batch: 1 and 64"));
    let itself = multi_gpu(&["--compare", new.to_str().unwrap(), new.to_str().unwrap()]);
    let text = String::from_utf8(itself.stdout).unwrap();
    assert!(
        MODES.iter().all(|mode| text.contains(&format!("4 {mode}")))
            && !text.contains("they differ"),
        "{text}"
    );
    std::fs::remove_dir_all(dir).unwrap();
}
