//! Figures of the devices, over all of their sessions.
#![forbid(unsafe_code)]

use serde::Serialize;
use shootdown_vhost::{Iotlb, IotlbStats};
use std::fs;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// What a disk has done, and its IOTLBs.
#[derive(Default)]
pub struct Counters {
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    pub flushes: AtomicU64,
    pub discards: AtomicU64,
    iotlbs: Mutex<Iotlbs>,
}

#[derive(Default)]
struct Iotlbs {
    before: IotlbFigures,
    now: Option<Iotlb>,
}

#[derive(Clone, Copy, Default, Serialize)]
struct IotlbFigures {
    updates: u64,
    misses: u64,
    invalidates: u64,
    longest_answer_us: u64,
    /// INVALIDATEs that met something in flight.
    met_in_flight: u64,
    /// The mappings that they met.
    in_flight: u64,
}

impl IotlbFigures {
    fn and(self, stats: &IotlbStats) -> Self {
        let longest = u64::try_from(stats.longest_answer.as_micros()).unwrap_or(u64::MAX);
        Self {
            updates: self.updates + stats.updates,
            misses: self.misses + stats.misses,
            invalidates: self.invalidates + stats.invalidates,
            longest_answer_us: self.longest_answer_us.max(longest),
            met_in_flight: self.met_in_flight + stats.met_in_flight,
            in_flight: self.in_flight + stats.mappings_met,
        }
    }
}

/// One object of the file.
#[derive(Serialize)]
pub struct Figures {
    device: usize,
    #[serde(flatten)]
    iotlb: IotlbFigures,
    reads: u64,
    writes: u64,
    flushes: u64,
    discards: u64,
}

impl Counters {
    /// A session begins (`Some`) or has ended.
    pub fn session(&self, iotlb: Option<Iotlb>) {
        let mut iotlbs = self.iotlbs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = std::mem::replace(&mut iotlbs.now, iotlb) {
            iotlbs.before = iotlbs.before.and(&before.stats());
        }
    }

    pub fn figures(&self, device: usize) -> Figures {
        let iotlbs = self.iotlbs.lock().unwrap_or_else(PoisonError::into_inner);
        let iotlb =
            iotlbs.now.as_ref().map_or(iotlbs.before, |now| iotlbs.before.and(&now.stats()));
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (reads, writes) = (read(&self.reads), read(&self.writes));
        Figures {
            device,
            iotlb,
            reads,
            writes,
            flushes: read(&self.flushes),
            discards: read(&self.discards),
        }
    }
}

/// Replaces the file at `path`: whoever reads it sees the former or the new one.
pub fn write(path: &Path, all: &[Figures]) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let mut text = serde_json::to_vec(all)?;
    text.push(b'\n');
    fs::write(&new, text)?;
    fs::rename(&new, path)
}
