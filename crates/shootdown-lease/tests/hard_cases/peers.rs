//! What peers, restarts and clocks may bring about.

use crate::support::*;
use futures::executor::LocalPool;
use futures::task::LocalSpawnExt;
use shootdown_lease::engine::Hub;
use shootdown_lease::{
    Asker, Boot, Decision, Epoch, Host, Incarnation, Memory, Mirror, MirrorSettings, Nonce, Owner,
    Refusal, Standing, Terms, ToMirror, ToOwner,
};
use std::time::Duration;

#[test]
fn d8_joins_of_one_host_make_the_owner_keep_no_more_than_its_epochs() {
    let mut owner =
        Owner::new(Boot(1), Terms::new(Duration::from_secs(3_600)), Memory::New, ms(0)).unwrap();
    let mut size = Vec::new();
    for nonce in 1..=2_000 {
        owner.handle(
            Host(1),
            ToOwner::Join { incarnation: Incarnation(1), nonce: Nonce(nonce) },
            ms(nonce),
        );
        while owner.next_message().is_some() {}
        if nonce % 1_000 == 0 {
            size.push(format!("{owner:?}").len());
        }
    }
    assert_eq!(owner.members().count(), 1);
    assert!(size[1] < size[0] + 1_000, "what it keeps grows: {size:?}");
}

#[test]
fn d8_invalidations_that_were_acknowledged_leave_nothing_behind() {
    let mut owner =
        Owner::new(Boot(1), Terms::new(Duration::from_secs(3_600)), Memory::New, ms(0)).unwrap();
    let mut mirror = Mirror::new(Incarnation(1), MirrorSettings::default(), ms(0));
    let epoch = joined(&mut mirror, &mut owner, 1, ms(0));
    let mut size = Vec::new();
    for at in 1..=2_000 {
        let invalidation = owner.invalidate(pages(0, 1).into(), ms(at));
        owner.handle(Host(1), ToOwner::Ack { epoch, invalidation }, ms(at));
        owner.end(invalidation, ms(at)).unwrap();
        while owner.next_message().is_some() || owner.next_decision().is_some() {}
        if at % 1_000 == 0 {
            size.push(format!("{owner:?}").len());
        }
    }
    assert!(size[1] < size[0] + 1_000, "what it keeps grows: {size:?}");
}

#[test]
fn d8_a_refusal_of_an_earlier_incarnations_fetch_refuses_none_of_this_one() {
    let mut owner = Owner::new(Boot(1), Terms::new(TERM), Memory::New, ms(0)).unwrap();
    let mut mirror = Mirror::new(Incarnation(2), MirrorSettings::default(), ms(0));
    joined(&mut mirror, &mut owner, 1, ms(0));
    let nonce = mirror.fetch(pages(0, 1), ms(1)).unwrap();
    // Sent to the earlier process of this host, whose nonces have counted from 1, too; comes late.
    let asker = Asker::Fetch(Epoch { boot: Boot(1), number: 7 });
    mirror.handle(ToMirror::Refused { nonce, asker, why: Refusal::Fetches }, ms(1));
    assert_eq!(mirror.next_decision(), None);
}

#[test]
fn d2_an_owner_with_a_shorter_term_waits_for_leases_that_an_earlier_one_has_granted() {
    let mut before =
        Owner::new(Boot(1), Terms::new(Duration::from_secs(1)), Memory::New, ms(0)).unwrap();
    let mut mirror = Mirror::new(Incarnation(1), MirrorSettings::default(), ms(0));
    joined(&mut mirror, &mut before, 1, ms(0));
    drop(before);
    // Configured anew.
    let mut owner =
        Owner::new(Boot(2), Terms::new(TERM), Memory::SurvivedTerm(Duration::from_secs(1)), ms(10))
            .unwrap();
    owner.invalidate(pages(0, 1).into(), ms(11));
    for at in 12..1_100 {
        owner.tick(ms(at));
        if let Some(Decision::Done { .. }) = owner.next_decision() {
            assert!(!mirror.is_valid(ms(at)), "done at {} while the mirror holds on", ms(at));
            return;
        }
    }
    panic!("it never ends");
}

#[test]
fn d10_a_mirror_whose_owner_counts_its_boots_backwards_says_why_it_cannot_join() {
    let timer = Timer::default();
    let (mut pool, leased) = (LocalPool::new(), leased(&timer, 1, MirrorSettings::default()));
    let (runs, sleep) = (leased.clone(), timer.sleep());
    pool.spawner().spawn_local(async move { runs.run(sleep).await }).unwrap();
    for boot in [2, 1] {
        let hub = Hub::new(
            Owner::new(Boot(boot), Terms::new(TERM), Memory::New, timer.now()).unwrap(),
            timer.clock(),
        );
        let _mirrors = hub.mirrors();
        let mut link = hub.link(Host(1));
        leased.connected();
        for _ in 0..300 {
            timer.pass(&mut pool, 1);
            carry(&hub, 1, &mut link, &leased);
        }
        // Leaves the first one by its end.
    }
    assert!(!matches!(leased.standing(), Standing::Live(..)));
    assert!(leased.denied().is_some(), "tries for ever, and nothing says why");
}
