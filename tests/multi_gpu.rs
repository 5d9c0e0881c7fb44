//! The main job as a user runs it: the binary of the example, its output and its exit codes.
#![allow(missing_docs)]

use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Runs the example as the README says, in release form; it is built here, because `cargo test` does not.
fn multi_gpu(arguments: &[&str]) -> Output {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    let binary = BINARY.get_or_init(|| {
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--release", "--example", "multi_gpu"]).current_dir(env!("CARGO_MANIFEST_DIR"));
        assert!(build.status().expect("cargo runs").success(), "the example cannot be built");
        let test = std::env::current_exe().unwrap();
        test.ancestors().nth(3).unwrap().join("release").join("examples").join("multi_gpu")
    });
    // One at a time: the one in real time would not like company.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    Command::new(binary).args(arguments).output().unwrap_or_else(|error| panic!("{}: {error}", binary.display()))
}

fn rows(output: &Output) -> Vec<Value> {
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    report["rows"].as_array().unwrap().clone()
}

fn error(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn virtual_time_is_within_a_percent_of_the_ideal_at_every_number_of_gpus() {
    let output = multi_gpu(&["--json", "--limit", "150"]);
    assert!(output.status.success(), "{}", error(&output));
    let rows = rows(&output);
    assert_eq!(rows.len(), 14);
    for row in &rows {
        for field in ["gpus", "invalidations", "notifier_calls", "dma_accesses", "p50_ns", "p99_ns", "max_ns", "total_ns"] {
            assert!(row[field].is_u64(), "{field} in {row}");
        }
        assert_eq!(row["stale_accesses"], 0);
        if row["mode"] == "multi-pass" {
            let ratio = row["ideal_ratio"].as_f64().unwrap();
            assert!((0.99..=1.01).contains(&ratio), "{row}");
        }
    }
    let total =
        |mode: &str| rows.iter().find(|row| row["gpus"] == 64 && row["mode"] == mode).unwrap()["total_ns"].as_f64().unwrap();
    assert!(total("single-pass") > 2.0 * total("multi-pass"), "that is what multi-pass is worth");
}

#[test]
fn real_time_is_within_a_tenth_of_the_ideal_at_16_gpus() {
    // The machine is shared: the best of a few runs counts.
    let ratios: Vec<f64> = (0..5)
        .map(|seed| {
            let seed = seed.to_string();
            let output = multi_gpu(&[
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
            ]);
            assert!(output.status.success(), "{}", error(&output));
            rows(&output).iter().find(|row| row["mode"] == "multi-pass").unwrap()["ideal_ratio"].as_f64().unwrap()
        })
        .take_while_inclusive(|ratio| *ratio > 1.1)
        .collect();
    assert!(ratios.last().is_some_and(|ratio| *ratio <= 1.1), "{ratios:?}");
}

/// `take_while` with the item that ends it.
trait TakeWhileInclusive: Iterator + Sized {
    fn take_while_inclusive(self, mut goes_on: impl FnMut(&Self::Item) -> bool) -> impl Iterator<Item = Self::Item> {
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
    let run = |seed| multi_gpu(&["--gpus", "1,4", "--json", "--limit", "100", "--seed", seed]).stdout;
    assert_eq!(run("5"), run("5"));
    assert_ne!(run("5"), run("6"));
}

#[test]
fn a_driver_that_does_not_wait_is_found_out() {
    let output = multi_gpu(&["--gpus", "4", "--json", "--limit", "100", "--fault", "skip-wait"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(rows(&output).iter().all(|row| row["stale_accesses"].as_u64().unwrap() > 0));
    assert!(error(&output).contains("used a mapping after its invalidation's guard had been handed out"));
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
    let (empty, bad) = (file("empty", ""), file("bad", "5 1.000000 brk(NULL) = 0x1000\nnonsense\n"));
    for (arguments, says) in [
        (&["--workload", "/does/not/exist"][..], "cannot be read"),
        (&["--workload", &empty], "holds no system call"),
        (&["--workload", &bad], "line 2"),
        (&["--gpus", "0"], "0 is not in 1..=1024"),
        (&["--wibble"], "unexpected argument"),
        (&["--preempt-share", "2"], "not from 0 to 1"),
        (&["--gpus", "1", "--limit", "1", "--plot", "/does/not/exist.svg"], "cannot be written"),
    ] {
        let output = multi_gpu(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(error(&output).contains(says), "{arguments:?} says {}", error(&output));
    }
    let lenient = multi_gpu(&["--workload", &bad, "--lenient", "--gpus", "1", "--json"]);
    assert!(lenient.status.success());
    let report: Value = serde_json::from_slice(&lenient.stdout).unwrap();
    assert_eq!((&report["workload"]["skipped_lines"], &report["workload"]["lines_read"]), (&1.into(), &2.into()));
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn the_picture_shows_both_modes() {
    let path = std::env::temp_dir().join(format!("shootdown-{}.svg", std::process::id()));
    let output = multi_gpu(&["--gpus", "1,8", "--limit", "200", "--plot", path.to_str().unwrap()]);
    assert!(output.status.success(), "{}", error(&output));
    let svg = std::fs::read_to_string(&path).unwrap();
    for text in ["Latency of an invalidation", "Single-pass: one invalidation", "Multi-pass: one invalidation", "wait: TLB flush"]
    {
        assert!(svg.contains(text), "{text} is not in the picture");
    }
    std::fs::remove_file(path).unwrap();
}
