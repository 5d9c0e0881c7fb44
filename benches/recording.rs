//! How fast recordings are read: `cargo bench --bench recording`.
//!
//! A million lines are read from a stream that makes them as it goes, so that the memory that the
//! process takes is what reading takes. Before that, `SHOOTDOWN_LINES` lines (a million) are read
//! once: the time is printed, and how much memory the process had at most.
#![allow(missing_docs, unreachable_pub, dead_code, unused_imports, clippy::print_stdout)]

#[path = "../examples/multi_gpu/recording/mod.rs"]
mod recording;

use criterion::{Criterion, Throughput};
use std::io::{BufReader, Read};
use std::time::{Duration, Instant};

const MILLION: usize = 1_000_000;
const TEXT: &[u8] = include_bytes!("../examples/multi_gpu/workloads/cargo-build.strace");

/// The same recording again and again, until there are so many lines.
struct Again {
    left: usize,
    at: usize,
}

impl Read for Again {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let mut len = into.len().min(TEXT.len() - self.at);
        let part = &TEXT[self.at..self.at + len];
        let ends = part.iter().enumerate().filter(|(_, byte)| **byte == b'\n');
        if let Some((last, _)) = ends.clone().nth(self.left.max(1) - 1) {
            len = last + 1;
        }
        if self.left == 0 {
            return Ok(0);
        }
        let part = &part[..len];
        self.left -= part.iter().filter(|byte| **byte == b'\n').count().min(self.left);
        into[..len].copy_from_slice(part);
        self.at = (self.at + len) % TEXT.len();
        Ok(len)
    }
}

fn read(lines: usize) -> recording::Recording {
    let stream = BufReader::with_capacity(1 << 16, Again { left: lines, at: 0 });
    recording::parse("the benchmark", stream, false).expect("it is read without a rest")
}

/// The most memory that the process has had, in MiB.
fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? / 1024)
}

fn main() {
    let began = Instant::now();
    let lines = std::env::var("SHOOTDOWN_LINES")
        .ok()
        .and_then(|lines| lines.parse().ok())
        .unwrap_or(MILLION);
    let recording = read(lines);
    let took = began.elapsed();
    println!(
        "{} lines, {} calls kept: {:.2} s, {} MiB at most",
        recording.lines,
        recording.calls.len(),
        took.as_secs_f64(),
        peak().map_or("unknown".into(), |peak| peak.to_string())
    );
    drop(recording);
    assert!(
        took < Duration::from_secs(5) * u32::try_from(lines.div_ceil(MILLION)).unwrap_or(u32::MAX),
        "5 s a million lines"
    );

    let mut criterion = Criterion::default().sample_size(10).configure_from_args();
    let mut group = criterion.benchmark_group("recording");
    group.throughput(Throughput::Elements(MILLION as u64));
    group.bench_function("a million lines", |bencher| bencher.iter(|| read(MILLION)));
    group.finish();
    criterion.final_summary();
}
