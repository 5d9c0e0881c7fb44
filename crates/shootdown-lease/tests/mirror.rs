//! A mirror and what it is told: also at the wrong time, by the wrong one, and twice.
#![forbid(unsafe_code)]
#![allow(missing_docs, reason = "a test")]

use shootdown::{AddressRange, RangeSet};
use shootdown_lease::{
    Asker, Boot, Denied, Epoch, FetchError, Incarnation, InvalidationId, Mirror, MirrorDecision,
    MirrorSettings, Nonce, Refusal, Standing, Time, ToMirror, ToOwner,
};
use std::time::Duration;

const INCARNATION: Incarnation = Incarnation(7);
const TERM: Duration = Duration::from_millis(100);
const EPOCH: Epoch = epoch(3, 1);

const fn epoch(boot: u64, number: u64) -> Epoch {
    Epoch { boot: Boot(boot), number }
}

fn at(millis: u64) -> Time {
    Time::from_nanos(millis * 1_000_000)
}

fn page(number: u64) -> AddressRange {
    AddressRange::new(number * 0x1000, 0x1000).unwrap()
}

fn settings() -> MirrorSettings {
    MirrorSettings::default()
}

fn changed(change: impl FnOnce(&mut MirrorSettings)) -> MirrorSettings {
    let mut settings = settings();
    change(&mut settings);
    settings
}

fn messages(mirror: &mut Mirror) -> Vec<ToOwner> {
    std::iter::from_fn(|| mirror.next_message()).collect()
}

fn decisions(mirror: &mut Mirror) -> Vec<MirrorDecision> {
    std::iter::from_fn(|| mirror.next_decision()).collect()
}

fn welcome(epoch: Epoch, nonce: u64) -> ToMirror {
    ToMirror::Welcome { epoch, incarnation: INCARNATION, nonce: Nonce(nonce), term: TERM }
}

fn inv(epoch: Epoch, id: u64, pages: AddressRange) -> ToMirror {
    ToMirror::Inv { epoch, invalidation: InvalidationId(id), ranges: RangeSet::from(pages) }
}

fn fetched(epoch: Epoch, nonce: Nonce) -> ToMirror {
    ToMirror::Fetched { epoch, nonce, version: 0 }
}

/// Has asked to join at 0, with nonce 1.
fn joining(settings: MirrorSettings) -> Mirror {
    let mut mirror = Mirror::new(INCARNATION, settings, at(0));
    mirror.tick(at(0));
    assert_eq!(
        messages(&mut mirror),
        [ToOwner::Join { incarnation: INCARNATION, nonce: Nonce(1) }]
    );
    mirror
}

/// Is in `EPOCH`, asked for at 0.
fn live(settings: MirrorSettings) -> Mirror {
    let mut mirror = joining(settings);
    mirror.handle(welcome(EPOCH, 1), at(1));
    assert_eq!(decisions(&mut mirror), [MirrorDecision::Joined { epoch: EPOCH }]);
    mirror
}

/// Stopped, and welcomed anew by `to`; the nonce of its join must be `nonce`.
fn again(mirror: &mut Mirror, to: Epoch, nonce: u64, now: Time) {
    let epoch = mirror.epoch().unwrap();
    mirror.handle(ToMirror::Gone { epoch }, now);
    assert!(mirror.stopped(now));
    mirror.tick(now);
    mirror.handle(welcome(to, nonce), now);
    assert_eq!(mirror.epoch(), Some(to));
    messages(mirror);
    decisions(mirror);
}

#[test]
fn a_lease_counts_from_when_the_mirror_asked() {
    let mut mirror = joining(settings());
    mirror.handle(welcome(EPOCH, 1), at(60));
    assert_eq!(mirror.valid_until(), Some(at(100)));
    assert!(mirror.is_valid(Time::from_nanos(99_999_999)) && !mirror.is_valid(at(100)));
    messages(&mut mirror);
    mirror.tick(at(70));
    let [ToOwner::Renew { epoch: EPOCH, nonce }] = messages(&mut mirror)[..] else {
        panic!("it asks every fifth of its term")
    };
    mirror.handle(ToMirror::Renewed { epoch: EPOCH, nonce }, at(99));
    assert_eq!(mirror.valid_until(), Some(at(170)));
}

#[test]
fn a_mirror_stops_its_devices_before_the_lease_ends() {
    let mut mirror = live(changed(|settings| settings.time_to_stop = Duration::from_millis(30)));
    assert_eq!(mirror.standing(), Standing::Live(EPOCH, at(70)));
    mirror.tick(at(70));
    assert_eq!(decisions(&mut mirror), [MirrorDecision::Stop { epoch: EPOCH }]);
    assert_eq!((mirror.standing(), mirror.deadline()), (Standing::Stopping(EPOCH), None));
    assert!(!mirror.is_valid(at(70)));
    assert!(
        messages(&mut mirror).iter().all(|message| !matches!(message, ToOwner::Left { .. })),
        "its devices have not stopped"
    );
    assert!(mirror.stopped(at(101)));
    assert_eq!(messages(&mut mirror), [ToOwner::Left { epoch: EPOCH }]);
    assert_eq!(mirror.counts().stopped_late, 1);
    assert!(!mirror.stopped(at(102)), "nobody asked for it");
    mirror.tick(at(102));
    assert_eq!(
        messages(&mut mirror),
        [ToOwner::Join { incarnation: INCARNATION, nonce: Nonce(2) }]
    );
}

#[test]
fn a_welcome_counts_once_and_for_the_newest_join_only() {
    let mut mirror = joining(settings());
    let other = ToMirror::Welcome {
        epoch: EPOCH,
        incarnation: Incarnation(8),
        nonce: Nonce(1),
        term: TERM,
    };
    mirror.handle(other, at(1));
    mirror.handle(welcome(epoch(3, 9), 2), at(1));
    assert_eq!(mirror.standing(), Standing::Joining);
    assert_eq!(
        messages(&mut mirror),
        [ToOwner::Left { epoch: epoch(3, 9) }],
        "nothing will be held by it"
    );
    mirror.handle(welcome(EPOCH, 1), at(2));
    mirror.handle(welcome(EPOCH, 1), at(3));
    assert_eq!((mirror.counts().joined, mirror.counts().strangers), (1, 3));
    assert!(messages(&mut mirror).is_empty(), "it is in that epoch");
    mirror.handle(welcome(epoch(3, 2), 1), at(4));
    assert_eq!(messages(&mut mirror), [ToOwner::Left { epoch: epoch(3, 2) }]);
    assert_eq!(mirror.epoch(), Some(EPOCH));
}

#[test]
fn a_welcome_that_comes_a_term_late_is_left_at_once() {
    let mut mirror = joining(settings());
    mirror.handle(welcome(EPOCH, 1), at(100));
    assert_eq!(mirror.standing(), Standing::Out);
    let join = |nonce| ToOwner::Join { incarnation: INCARNATION, nonce: Nonce(nonce) };
    // Asked again by the tick before.
    assert_eq!(messages(&mut mirror), [join(1), ToOwner::Left { epoch: EPOCH }]);
    let late = Denied::TooLate { term: TERM, took: Duration::from_millis(100) };
    assert_eq!(decisions(&mut mirror), [MirrorDecision::Denied(late)]);
    mirror.handle(welcome(EPOCH, 1), at(101));
    assert_eq!((mirror.standing(), mirror.deadline()), (Standing::Out, Some(at(120))));
    messages(&mut mirror);
    mirror.tick(at(120));
    assert_eq!(messages(&mut mirror), [join(2)]);
}

#[test]
fn an_owner_of_an_older_boot_is_none() {
    let mut mirror = live(settings());
    again(&mut mirror, epoch(4, 1), 2, at(10));
    mirror.handle(inv(EPOCH, 1, page(1)), at(11));
    assert_eq!(
        messages(&mut mirror),
        [ToOwner::Left { epoch: EPOCH }],
        "it says again that it has left"
    );
    mirror.handle(inv(epoch(3, 77), 1, page(1)), at(11));
    assert!(messages(&mut mirror).is_empty(), "it knows nothing of an epoch that is not its own");
    mirror.handle(ToMirror::Gone { epoch: epoch(4, 1) }, at(12));
    mirror.stopped(at(12));
    mirror.tick(at(12));
    mirror.tick(at(32));
    decisions(&mut mirror);
    mirror.handle(welcome(epoch(3, 5), 3), at(33));
    assert_eq!(mirror.standing(), Standing::Out);
    let older = Denied::OlderOwner { boot: Boot(3), newest: Boot(4) };
    assert_eq!(decisions(&mut mirror), [MirrorDecision::Denied(older)]);
}

#[test]
fn a_reply_counts_once_and_for_its_question() {
    let mut mirror = live(settings());
    mirror.tick(at(20));
    let [ToOwner::Renew { nonce, .. }] = messages(&mut mirror)[..] else { panic!("it asks") };
    mirror.handle(ToMirror::Renewed { epoch: EPOCH, nonce: Nonce(99) }, at(21));
    assert_eq!(mirror.valid_until(), Some(at(100)), "not asked");
    mirror.handle(ToMirror::Renewed { epoch: epoch(3, 2), nonce }, at(21));
    assert_eq!(mirror.valid_until(), Some(at(100)), "of another epoch");
    mirror.handle(ToMirror::Renewed { epoch: EPOCH, nonce }, at(22));
    assert_eq!(
        mirror.valid_until(),
        Some(at(120)),
        "a reply to another life of the host has not used the nonce up"
    );
    mirror.handle(ToMirror::Renewed { epoch: EPOCH, nonce }, at(23));
    assert_eq!(mirror.valid_until(), Some(at(120)), "a replay");
    assert_eq!((mirror.counts().renewed, mirror.counts().strangers), (1, 3));
}

#[test]
fn an_invalidation_is_acknowledged_when_it_was_carried_out_and_then_as_often_as_asked() {
    let mut mirror = live(settings());
    let ack = ToOwner::Ack { epoch: EPOCH, invalidation: InvalidationId(4) };
    mirror.handle(inv(EPOCH, 4, page(1)), at(2));
    mirror.handle(inv(EPOCH, 4, page(1)), at(3));
    let asked = MirrorDecision::Invalidate {
        epoch: EPOCH,
        invalidation: InvalidationId(4),
        ranges: page(1).into(),
    };
    assert_eq!(decisions(&mut mirror), [asked], "twice is once");
    assert!(messages(&mut mirror).is_empty());
    assert!(!mirror.invalidated(EPOCH, InvalidationId(5), at(4)), "not asked");
    assert!(mirror.invalidated(EPOCH, InvalidationId(4), at(4)));
    assert!(!mirror.invalidated(EPOCH, InvalidationId(4), at(4)), "said already");
    mirror.handle(inv(EPOCH, 4, page(1)), at(5));
    assert_eq!(messages(&mut mirror), [ack.clone(), ack]);
    assert!(decisions(&mut mirror).is_empty());
}

#[test]
fn a_flush_that_outlasts_its_epoch_acknowledges_nothing_of_the_next_owner() {
    let mut mirror = live(settings());
    mirror.handle(inv(EPOCH, 1, page(1)), at(2));
    let next = epoch(4, 1);
    again(&mut mirror, next, 2, at(10));
    // Another owner counts its invalidations from 1, too.
    mirror.handle(inv(next, 1, page(2)), at(11));
    assert!(
        !mirror.invalidated(EPOCH, InvalidationId(1), at(12)),
        "page 1 was flushed, not page 2"
    );
    assert!(messages(&mut mirror).is_empty());
    assert!(mirror.invalidated(next, InvalidationId(1), at(13)));
    assert_eq!(
        messages(&mut mirror),
        [ToOwner::Ack { epoch: next, invalidation: InvalidationId(1) }]
    );
}

#[test]
fn a_fetch_that_an_invalidation_has_met_is_not_installed() {
    let mut mirror = live(settings());
    let met = mirror.fetch(page(1), at(2)).unwrap();
    let free = mirror.fetch(page(9), at(2)).unwrap();
    mirror.handle(inv(EPOCH, 1, page(1)), at(3));
    decisions(&mut mirror);
    mirror.handle(fetched(EPOCH, met), at(4));
    mirror.handle(fetched(EPOCH, free), at(4));
    mirror.handle(fetched(EPOCH, free), at(4));
    let installed = MirrorDecision::Install { nonce: free, range: page(9), version: 0 };
    assert_eq!(decisions(&mut mirror), [MirrorDecision::Collided { nonce: met }, installed]);
    assert_eq!((mirror.counts().collided, mirror.counts().strangers), (1, 1));
}

#[test]
fn fetches_end_with_their_epoch_and_by_being_cancelled() {
    let mut mirror = live(settings());
    let old = mirror.fetch(page(1), at(2)).unwrap();
    again(&mut mirror, epoch(3, 2), 3, at(3));
    mirror.handle(fetched(EPOCH, old), at(4));
    mirror.handle(fetched(epoch(3, 2), old), at(4));
    let given_up = mirror.fetch(page(1), at(5)).unwrap();
    mirror.cancel(given_up);
    mirror.handle(fetched(epoch(3, 2), given_up), at(6));
    assert!(decisions(&mut mirror).is_empty());
}

#[test]
fn fetches_have_a_limit_and_are_sent_again() {
    let mut mirror = live(changed(|settings| settings.fetches = 1));
    let nonce = mirror.fetch(page(1), at(2)).unwrap();
    assert_eq!(mirror.fetch(page(2), at(2)), Err(FetchError::Full));
    messages(&mut mirror);
    mirror.tick(at(22));
    let fetch = ToOwner::Fetch { epoch: EPOCH, nonce, range: page(1) };
    assert!(messages(&mut mirror).contains(&fetch), "with the same nonce");
    mirror.handle(
        ToMirror::Refused { nonce, asker: Asker::Fetch(EPOCH), why: Refusal::Fetches },
        at(23),
    );
    mirror.handle(
        ToMirror::Refused { nonce, asker: Asker::Fetch(EPOCH), why: Refusal::Fetches },
        at(23),
    );
    assert_eq!(
        decisions(&mut mirror),
        [MirrorDecision::FetchRefused { nonce, why: Refusal::Fetches }]
    );
    assert!(mirror.fetch(page(2), at(24)).is_ok());
    assert_eq!(joining(settings()).fetch(page(1), at(1)), Err(FetchError::NoLease));
}

#[test]
fn invalidations_beyond_the_limit_are_left_to_be_sent_again() {
    let mut mirror = live(changed(|settings| settings.invalidations = 1));
    mirror.handle(inv(EPOCH, 1, page(1)), at(2));
    mirror.handle(inv(EPOCH, 2, page(2)), at(2));
    assert_eq!((decisions(&mut mirror).len(), mirror.counts().strangers), (1, 1));
    mirror.invalidated(EPOCH, InvalidationId(1), at(3));
    mirror.handle(inv(EPOCH, 2, page(2)), at(4));
    assert_eq!(decisions(&mut mirror).len(), 1);
}

#[test]
fn a_refusal_counts_for_the_newest_join_of_this_life() {
    let mut mirror = joining(settings());
    let refused = |nonce, life, why| ToMirror::Refused {
        nonce: Nonce(nonce),
        asker: Asker::Join(Incarnation(life)),
        why,
    };
    mirror.handle(refused(1, 8, Refusal::Members), at(1));
    mirror.handle(refused(9, 7, Refusal::Members), at(1));
    assert_eq!((mirror.standing(), mirror.counts().strangers), (Standing::Joining, 2));
    mirror.handle(refused(1, 7, Refusal::Members), at(2));
    assert_eq!(decisions(&mut mirror), [MirrorDecision::Denied(Denied::Refused(Refusal::Members))]);
    assert_eq!((mirror.standing(), mirror.deadline()), (Standing::Out, Some(at(162))));
}

#[test]
fn a_join_whose_epoch_was_expelled_is_asked_anew_at_once() {
    let mut mirror = joining(settings());
    let asker = Asker::Join(INCARNATION);
    mirror.handle(ToMirror::Refused { nonce: Nonce(1), asker, why: Refusal::Expelled }, at(2));
    assert_eq!(
        messages(&mut mirror),
        [ToOwner::Join { incarnation: INCARNATION, nonce: Nonce(2) }]
    );
    mirror.handle(welcome(EPOCH, 2), at(3));
    mirror.handle(ToMirror::Refused { nonce: Nonce(2), asker, why: Refusal::Expelled }, at(4));
    assert_eq!(mirror.epoch(), Some(EPOCH), "once entered, an epoch ends by `Gone` or by time");
}

#[test]
fn a_term_that_is_no_longer_than_the_devices_take_is_not_entered() {
    for (stop, enters) in [(99, true), (100, false), (200, false)] {
        let mut mirror =
            joining(changed(|settings| settings.time_to_stop = Duration::from_millis(stop)));
        mirror.handle(welcome(EPOCH, 1), Time::from_nanos(1));
        assert_eq!(mirror.epoch().is_some(), enters, "{stop} ms of 100");
        if !enters {
            let short = MirrorDecision::Denied(Denied::TermTooShort {
                term: TERM,
                time_to_stop: Duration::from_millis(stop),
            });
            assert_eq!(
                (decisions(&mut mirror), messages(&mut mirror)),
                (vec![short], vec![ToOwner::Left { epoch: EPOCH }])
            );
        }
    }
}

#[test]
fn a_mirror_that_leaves_says_so_when_its_devices_have_stopped_and_joins_no_more() {
    let mut mirror = live(settings());
    mirror.leave(at(5));
    assert_eq!(decisions(&mut mirror), [MirrorDecision::Stop { epoch: EPOCH }]);
    assert!(messages(&mut mirror).is_empty() && !mirror.is_over());
    assert!(mirror.stopped(at(6)) && mirror.is_over());
    assert_eq!(messages(&mut mirror), [ToOwner::Left { epoch: EPOCH }]);
    mirror.tick(at(1_000));
    mirror.handle(inv(EPOCH, 1, page(1)), at(1_001));
    assert_eq!(
        messages(&mut mirror),
        [ToOwner::Left { epoch: EPOCH }],
        "nothing but that, as often as asked"
    );

    let mut mirror = joining(settings());
    mirror.leave(at(1));
    assert!(!mirror.is_over(), "what it is granted is to be given back");
    mirror.handle(welcome(EPOCH, 1), at(2));
    assert!(mirror.is_over());
    assert_eq!(messages(&mut mirror), [ToOwner::Left { epoch: EPOCH }]);

    let mut mirror = joining(settings());
    mirror.leave(at(1));
    mirror.tick(mirror.deadline().unwrap());
    assert!(
        mirror.is_over() && messages(&mut mirror).is_empty(),
        "where nobody answers it asks no more"
    );
}

#[test]
fn a_join_that_nobody_answers_is_sent_again_and_then_asked_anew() {
    let mut mirror = joining(settings());
    let mut nonces = Vec::new();
    while let Some(deadline) = mirror.deadline().filter(|deadline| *deadline <= at(500)) {
        mirror.tick(deadline);
        nonces.extend(messages(&mut mirror).into_iter().map(|message| match message {
            ToOwner::Join { nonce, .. } => nonce.0,
            other => panic!("{other:?}"),
        }));
    }
    assert_eq!(nonces.iter().filter(|nonce| **nonce == 1).count(), 7, "every 20 ms, for 160 ms");
    assert_eq!(nonces.iter().filter(|nonce| **nonce == 2).count(), 16, "then for twice as long");
    assert_eq!(nonces.iter().max(), Some(&3));
}
