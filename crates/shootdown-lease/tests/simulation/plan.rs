//! What a seed makes of a run: how many hosts, and what goes wrong how often.

use super::clock::{Clock, DRIFT, MS, US};
use rand::Rng;
use rand::rngs::SmallRng;
use shootdown_lease::{MirrorSettings, Rule, Terms};
use std::time::Duration;

/// What is left out of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Without {
    Nothing,
    /// A rule that the state machines keep.
    Rule(Rule),
    /// A link that is down counts as a mirror that has left.
    LinksAreNoSigns,
    /// A mirror's clock stands still while its host is paused.
    ClocksGoOn,
    /// The lease is checked before the use only.
    CheckedAfterUse,
    /// A fetch is installed without a check.
    CheckedAtInstall,
    /// The owner takes the time of its last turn for the time of a message.
    FreshTime,
    /// The memory takes the writes of a deposed owner.
    WritesFenced,
    /// An owner answers without looking whether it is the owner still.
    OwnershipChecked,
}

/// Longest real times.
pub const FLUSH: u64 = 30 * MS;
pub const FENCE: u64 = 8 * MS;
/// How late code runs after its process has gone on.
pub const LATE: u64 = 2 * MS;

#[derive(Clone, Debug)]
pub struct Plan {
    pub without: Without,
    pub mirrors: usize,
    /// Devices reach the memory by themselves; else there are copies only.
    pub devices: bool,
    pub terms: Terms,
    pub settings: MirrorSettings,
    /// Of 1,000 messages.
    pub lost: u32,
    pub doubled: u32,
    pub slow: u32,
    /// Delayed for longer than a term.
    pub very_slow: u32,
    /// Whether `Gone` arrives at all.
    pub hints: bool,
    /// Mean real times between two of a kind; 0 for never.
    pub changes: u64,
    pub pauses: u64,
    pub owner_pauses: u64,
    pub crashes: u64,
    pub owner_crashes: u64,
    pub second_starts: u64,
    pub takeovers: u64,
    pub partitions: u64,
    pub links: u64,
    /// When everything heals, and when the run ends.
    pub heal: u64,
    pub end: u64,
}

impl Plan {
    pub fn new(rng: &mut SmallRng, without: Without) -> Self {
        let devices = rng.random_bool(0.5);
        let mut terms = Terms::new(Duration::from_millis(100));
        terms.drift_ppm = DRIFT as u32;
        terms.patience = Duration::from_millis(rng.random_range(2..60));
        terms.resend = Duration::from_millis(rng.random_range(3..40));
        terms.window = rng.random_range(1..5);
        terms.members_of_a_host = 8;
        terms.fences = devices || rng.random_bool(0.2);
        let mut settings = MirrorSettings::default();
        settings.time_to_stop =
            Duration::from_millis(if devices { rng.random_range(2..12) } else { 0 });
        settings.retry = Duration::from_millis(rng.random_range(10..70));
        if without == Without::Rule(Rule::NewestWelcome) {
            // Where mirrors ask anew often, and answers are slow.
            settings.retry = Duration::from_millis(4);
        }
        let mut mean = |often: f64, from: u64, to: u64| {
            if rng.random_bool(often) { rng.random_range(from..to) * MS } else { 0 }
        };
        // Some kinds in each run, and seldom all: what has just failed altogether is hard to break.
        let (changes, pauses, owner_pauses) =
            (mean(1.0, 8, 60), mean(0.6, 60, 400), mean(0.5, 60, 400));
        let (crashes, owner_crashes) = (mean(0.3, 100, 600), mean(0.3, 200, 900));
        let (second_starts, takeovers) = (mean(0.5, 40, 300), mean(0.3, 200, 800));
        let (partitions, links) = (mean(0.6, 40, 300), mean(0.3, 60, 400));
        Self {
            without,
            mirrors: rng.random_range(2..=6),
            devices,
            terms,
            settings,
            lost: some(rng),
            doubled: some(rng),
            slow: some(rng),
            very_slow: some(rng),
            hints: rng.random_bool(0.6),
            changes,
            pauses,
            owner_pauses,
            crashes,
            owner_crashes,
            second_starts,
            takeovers,
            partitions,
            links,
            heal: 1_500 * MS,
            end: 2_300 * MS,
        }
    }

    /// The margin for drift hides a time that is not much too old, so there all clocks go apart as
    /// far as they may.
    pub fn owner_rate(&self) -> Option<u64> {
        (self.without == Without::FreshTime).then_some(1_000_000 + DRIFT)
    }

    pub fn mirror_rate(&self) -> Option<u64> {
        (self.without == Without::FreshTime).then_some(1_000_000 - DRIFT)
    }

    pub fn keeps(&self, rule: Without) -> bool {
        self.without != rule
    }
}

/// Of 1,000: mostly few, sometimes very many.
fn some(rng: &mut SmallRng) -> u32 {
    let most = [20, 150, 450][rng.random_range(0..3)];
    rng.random_range(0..most)
}

/// A host's clock: anywhere, and off by any rate that the bound allows, often by the most.
pub fn clock(rng: &mut SmallRng, fixed: Option<u64>) -> Clock {
    let any = match rng.random_range(0..4) {
        0 => 1_000_000 - DRIFT,
        1 => 1_000_000 + DRIFT,
        _ => rng.random_range(1_000_000 - DRIFT..=1_000_000 + DRIFT),
    };
    Clock { offset: rng.random_range(0..10_000 * MS), rate: fixed.unwrap_or(any), stood: 0 }
}

/// How long something takes: mostly short.
pub fn short(rng: &mut SmallRng, longest: u64) -> u64 {
    if rng.random_ratio(1, 20) {
        rng.random_range(0..=longest)
    } else {
        rng.random_range(0..=longest.min(800 * US))
    }
}
