//! How the simulated GPUs behave: what each does for an invalidation, and how long it takes.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, LogNormal};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// What the GPUs are doing when the memory changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Profile {
    /// Nothing: an invalidation flushes the TLB
    Idle,
    /// Jobs are in flight: their fences, and then a TLB flush, which can be submitted only after
    /// them
    Busy,
    /// Contexts that do not end by themselves: they are preempted, and then the TLB is flushed
    Preempting,
    /// Each GPU is idle for half of the time, busy for a third, preempting for the rest, for some
    /// ms in turn
    Mixed,
}

impl Profile {
    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Busy => "busy",
            Self::Preempting => "preempting",
            Self::Mixed => "mixed",
        }
    }
}

/// What one GPU is doing for a while.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Activity {
    Idle,
    Busy,
    Preempting,
}

/// What a driver waits for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Command {
    /// The fences of the jobs in flight.
    Jobs,
    /// A context leaves the device.
    Preempt,
    TlbFlush,
}

/// Time of a processor, charged to the thread that invalidates (`interrupt`: to another one).
#[derive(Clone, Copy, Debug)]
pub struct Costs {
    /// Removing the pages from a device's page table.
    pub zap: Duration,
    /// Giving a command to a device.
    pub submit: Duration,
    /// From the end of a command to its fence.
    pub interrupt: Duration,
    /// Getting a thread that sleeps back onto a processor.
    pub wake: Duration,
}

/// The hardware, and the kernel around it. `LATENCIES` says where the numbers come from.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    pub seed: u64,
    pub profile: Profile,
    pub costs: Costs,
    /// Latencies of devices below this are raised to it.
    pub floor: Duration,
    /// Mean time between two DMA accesses of one GPU, beside those that an invalidation causes.
    pub dma_interval: Duration,
    /// Pages of a mapping that a GPU works on.
    pub resident_pages: u64,
    /// A device's page fault, from the access to the new entry of its page table.
    pub fault: Duration,
    /// How long the memory takes to change, under the guard.
    pub change: Duration,
    /// Mean time between two pages that the kernel reclaims; none if zero.
    pub reclaim: Duration,
}

/// For `--help`.
pub const LATENCIES: &str = "\
Numbers of the model (log-normal around the median, cut off at the bounds; each GPU and invalidation has its own, the same in all modes. What else a device has
in its queue differs, because it depends on when things happen):
  TLB flush         40 µs (20 to 100)     i915, drivers/gpu/drm/i915/gt/intel_tlb.c: typically 40 µs, 100 µs at worst (and a time-out of 1 ms recommended)
  jobs in flight   300 µs (10 to 10,000)  an assumption: what is left of kernels of some 100 µs to some ms
  preemption       500 µs (100 to 5,000)  an assumption, between draining and saving a whole GPU (Park, Park, Mahlke: Chimera, ASPLOS 2015); i915 gives up after CONFIG_DRM_I915_PREEMPT_TIMEOUT, 100 ms and more
  page fault        30 µs                 Zheng et al., Towards High Performance Paged Memory for GPUs, HPCA 2016: 20 to 50 µs
  zap, submit, interrupt, wake: 1, 2, 1, 2 µs, assumptions; a direct context switch takes 1 to 4 µs (Li, Ding, Shen: Quantifying the Cost of Context Switch, ExpCS 2007)

\"Total over ideal\": the ideal is a lower bound, what the program would have waited if no GPU had had anything else to do, each had gone on the moment it could, and no thread had
had to be woken. What is above 1.00 is what the way to wait costs, and what other invalidations (mostly the kernel's) have under way on the same GPUs; that is in all ways, so compare the
columns of a row. Each change of an option shifts all later events: to see what one is worth use --profile idle or busy with --reclaim-interval-us 0, or several seeds.";

impl Model {
    /// The random numbers of GPU `gpu` for invalidation `number`: the same in every mode and for
    /// any number of GPUs.
    pub fn random(&self, gpu: usize, number: u64) -> StdRng {
        let key = (gpu as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
            ^ number.wrapping_mul(0xd1b5_4a32_d192_ed03);
        StdRng::seed_from_u64(self.seed ^ key)
    }

    /// The steps of GPU `gpu` for invalidation `number`, which the program comes to at `at`, each
    /// of which depends on the one before.
    pub fn steps(
        &self,
        gpu: usize,
        number: u64,
        at: Duration,
    ) -> impl Iterator<Item = (Command, Duration)> {
        let mut random = self.random(gpu, number ^ 1 << 62);
        let steps = match self.activity(gpu, at) {
            Activity::Idle => [None, Some(Command::TlbFlush)],
            Activity::Busy => [Some(Command::Jobs), Some(Command::TlbFlush)],
            Activity::Preempting => [Some(Command::Preempt), Some(Command::TlbFlush)],
        };
        steps
            .into_iter()
            .flatten()
            .map(move |command| (command, self.latency(command, &mut random)))
    }

    fn latency(&self, command: Command, random: &mut StdRng) -> Duration {
        // Median, spread, bounds, in µs.
        let (median, sigma, least, most) = match command {
            Command::TlbFlush => (40f64, 0.35, 20f64, 100f64),
            Command::Jobs => (300f64, 1.0, 10f64, 10_000f64),
            Command::Preempt => (500f64, 0.8, 100f64, 5_000f64),
        };
        let latency = match LogNormal::new(median.ln(), sigma) {
            Ok(distribution) => distribution.sample(random).clamp(least, most),
            Err(_) => median,
        };
        Duration::from_nanos((latency * 1e3) as u64).max(self.floor)
    }

    /// What a GPU is doing at a time of the program: it goes on for a while.
    fn activity(&self, gpu: usize, at: Duration) -> Activity {
        match self.profile {
            Profile::Idle => return Activity::Idle,
            Profile::Busy => return Activity::Busy,
            Profile::Preempting => return Activity::Preempting,
            Profile::Mixed => {}
        }
        const MEAN_MS: f64 = 4.0;
        let mut random = StdRng::seed_from_u64(self.seed ^ (0x9a5e_0000 + gpu as u64));
        let mut until = Duration::ZERO;
        loop {
            let activity = match random.random_range(0..6) {
                0..3 => Activity::Idle,
                3..5 => Activity::Busy,
                _ => Activity::Preempting,
            };
            until +=
                Duration::from_secs_f64(-f64::ln(1.0 - random.random::<f64>()) * MEAN_MS / 1e3);
            if at < until {
                return activity;
            }
        }
    }
}
