//! The command line.
#![forbid(unsafe_code)]

use clap::{Parser, ValueEnum};
use serde::Serialize;
use std::path::PathBuf;

/// Imports a program's own memory into Vulkan devices (`VK_EXT_external_memory_host`) while the
/// program replaces that memory.
///
/// uploads: copies from buffers whose memory goes away and comes back at the same address, through
/// three caches of imports: a plain one that is told of nothing, `RegistrationCache` with `Uffd`,
/// and `RegistrationCache` with `OwnedMapping`. What arrives is compared byte by byte. passes: one
/// invalidation reaches several devices that are at work; they are waited for one after the other
/// (a pass budget of 0), and all at once.
#[derive(Parser)]
#[command(name = "vulkan", after_long_help = AFTER)]
pub struct Options {
    /// What to run; everything by default
    #[arg(value_enum, value_name = "PART")]
    parts: Vec<Part>,

    /// Only physical devices whose name contains this; uploads use the first one, real cards before
    /// processors
    #[arg(long, value_name = "NAME")]
    pub device: Option<String>,

    /// Uploads through each cache, of idle buffers and again of buffers in flight
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..))]
    pub uploads: u32,

    /// Buffers that are uploaded from; by default 64, or as many as the device imports at a time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub buffers: Option<u16>,

    /// Size of a buffer in KiB, rounded up to what the device imports
    #[arg(long, value_name = "KIB", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub kib: u32,

    /// The memory of one in so many uploads is replaced: before it where buffers are idle, else
    /// during it
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    pub replace_one_in: u32,

    /// Import a second mapping of the same shared pages: a driver that reads by address behaves as
    /// one that pins
    #[arg(long)]
    pub pages: bool,

    /// Numbers of devices, as a list; they are taken from all physical devices in turns
    #[arg(long, value_name = "N,N,…", value_delimiter = ',', default_value = "1,2,4,8", value_parser = clap::value_parser!(u16).range(1..=64))]
    devices: Vec<u16>,

    /// What a job is
    #[arg(long, value_enum, default_value = "host")]
    pub work: Work,

    /// How long a job takes, in ms
    #[arg(long, value_name = "MS", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub work_ms: u64,

    /// Jobs in flight on each device
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub depth: u8,

    /// Invalidations of each kind, whose median is shown
    #[arg(long, value_name = "N", default_value_t = 9, value_parser = clap::value_parser!(u16).range(1..))]
    pub repeats: u16,

    /// Seed of the order of uploads, replacements and jobs
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,

    /// Hear of finished jobs by descriptors of fences (VK_KHR_external_fence_fd) instead of a
    /// timeline semaphore
    #[arg(long)]
    pub fence_fd: bool,

    /// Turn the validation layer on where it is installed; whatever it says is a failure
    #[arg(long)]
    pub validate: bool,

    /// Plant a bug, to see that the check finds it
    #[arg(long, value_enum, value_name = "BUG")]
    pub fault: Option<Fault>,

    /// Print one JSON object instead of tables
    #[arg(long)]
    pub json: bool,

    /// Write a picture (SVG) of the passes: latency against devices
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// What arrives when memory is replaced
    Uploads,
    /// One invalidation and several devices
    Passes,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Work {
    /// A copy that waits for the host's signal, which comes when the job has taken its time
    Host,
    /// As many copies as take that time on this device; devices that share processors or a card
    /// slow each other down
    Copy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// The cache watches nothing, and nobody invalidates
    Unwatched,
    /// Memory is let go of without a wait for the jobs that use it
    SkipWait,
}

const AFTER: &str = "\
Examples:
  vulkan                                 everything, on the processor's driver if there is no card
  vulkan uploads --pages                 a driver that reads by address behaves as one that pins
  vulkan passes --plot passes.svg        and a picture
  vulkan --validate                      under the validation layer
  vulkan uploads --pages --fault unwatched    a bug, which is found: exit code 1

Exit codes: 0 all is well; 1 something is wrong, or nothing was shown; 2 bad options, or Vulkan failed; 3 no Vulkan loader, driver or device, or no userfaultfd.";

impl Options {
    pub fn runs(&self, part: Part) -> bool {
        self.parts.is_empty() || self.parts.contains(&part)
    }

    /// Each number once, in order.
    pub fn devices(&self) -> Vec<usize> {
        let mut devices: Vec<usize> =
            self.devices.iter().map(|devices| usize::from(*devices)).collect();
        devices.sort_unstable();
        devices.dedup();
        devices
    }
}
