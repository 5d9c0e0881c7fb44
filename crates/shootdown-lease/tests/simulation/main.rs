//! Owners, mirrors, their clocks and a network in virtual time: nothing that is stale is used, and
//! everything ends. `SHOOTDOWN_SEEDS=n` runs so many schedules; each is its seed alone.
#![forbid(unsafe_code)]
#![allow(missing_docs, unreachable_pub, reason = "a test")]
#![allow(clippy::print_stdout, reason = "the tables are to be read")]

mod chaos;
mod clock;
mod counts;
mod memory;
mod mirror;
mod network;
mod owner;
mod plan;
mod world;

use counts::Counts;
use plan::Without;
use shootdown_lease::Rule;
use std::time::Instant;
use world::run;

/// So many in a build with optimisations, a tenth of it without.
fn seeds(optimised: u64) -> u64 {
    let asked = std::env::var("SHOOTDOWN_SEEDS").ok().and_then(|seeds| seeds.parse().ok());
    asked.unwrap_or(if cfg!(debug_assertions) { optimised / 10 } else { optimised })
}

#[test]
fn nothing_stale_is_used_and_everything_ends() {
    let (runs, began, mut counts) = (seeds(1_500), Instant::now(), Counts::default());
    for seed in 0..runs {
        let world = run(seed, Without::Nothing);
        assert_eq!((world.stale, world.stuck), (None, None), "seed {seed}: {:?}", world.plan);
        counts += &world.counts;
    }
    println!("{runs} runs in {:.1?}:\n{}", began.elapsed(), counts.table());
    assert_eq!(counts.too_few(runs), [""; 0], "happened too seldom to say anything");
}

#[test]
fn a_run_is_its_seed() {
    let table = |seed| run(seed, Without::Nothing).counts.table();
    assert_eq!(table(7), table(7));
    assert_ne!(table(7), table(8));
}

#[test]
fn each_rule_that_is_left_out_is_missed() {
    let rules = [
        Rule::BookedBeforeWelcome,
        Rule::CountedFromAsking,
        Rule::StopsByItself,
        Rule::DriftMargin,
        Rule::Fenced,
        Rule::OtherIncarnationsStay,
        Rule::Quarantine,
        Rule::CollidedFetches,
        Rule::ParkedFetches,
        Rule::AcknowledgedAfterFlush,
        Rule::Nonces,
        Rule::EpochsOfAcknowledgements,
        Rule::LeftAfterStop,
        Rule::NewestWelcome,
    ];
    let of_hosts = [
        (Without::LinksAreNoSigns, "a link that is down counts as done"),
        (Without::ClocksGoOn, "the mirror's clock stops (a paused virtual machine)"),
        (Without::CheckedAfterUse, "checked before the use, not after"),
        (Without::CheckedAtInstall, "no check when a fetch is installed"),
        (Without::FreshTime, "a stale time at the owner"),
        (Without::WritesFenced, "a deposed owner's writes are not refused"),
        (Without::OwnershipChecked, "a deposed owner goes on granting"),
    ];
    let all = rules.map(|rule| (Without::Rule(rule), format!("{rule:?}")));
    let all = all.into_iter().chain(of_hosts.map(|(without, text)| (without, text.to_owned())));
    let (runs, began, mut few) = (seeds(300).min(300), Instant::now(), Vec::new());
    for (without, text) in all {
        let found = (0..runs).filter(|seed| run(*seed, without).stale.is_some()).count() as u64;
        println!("{text}: {found} of {runs} runs");
        if found * 300 < 10 * runs {
            few.push(text);
        }
    }
    println!("in {:.1?}", began.elapsed());
    assert!(few.is_empty(), "hardly ever missed: {few:?}");
}
