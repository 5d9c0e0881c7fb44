//! An owner and what it is told: also at the wrong time, by the wrong one, and twice.
#![forbid(unsafe_code)]
#![allow(missing_docs, reason = "a test")]

use shootdown::{AddressRange, RangeSet};
use shootdown_lease::{
    Asker, Boot, Decision, EndError, Ending, Epoch, Fenced, Host, Incarnation, InvalidationId,
    Memory, Nonce, Owner, Refusal, Terms, TermsError, Time, ToMirror, ToOwner,
};
use std::time::Duration;

const BOOT: Boot = Boot(3);

fn epoch(number: u64) -> Epoch {
    Epoch { boot: BOOT, number }
}

fn at(millis: u64) -> Time {
    Time::from_nanos(millis * 1_000_000)
}

fn page(number: u64) -> AddressRange {
    AddressRange::new(number * 0x1000, 0x1000).unwrap()
}

fn set(number: u64) -> RangeSet {
    page(number).into()
}

/// Term 100 ms, patience 50 ms, resend 10 ms, clocks without drift: the owner waits 100 ms, too.
fn terms() -> Terms {
    let mut terms = Terms::new(Duration::from_millis(100));
    terms.drift_ppm = 0;
    terms
}

fn changed(change: impl FnOnce(&mut Terms)) -> Terms {
    let mut terms = terms();
    change(&mut terms);
    terms
}

fn owner(terms: Terms) -> Owner {
    Owner::new(BOOT, terms, Memory::New, at(0)).unwrap()
}

fn messages(owner: &mut Owner) -> Vec<(Host, ToMirror)> {
    std::iter::from_fn(|| owner.next_message()).collect()
}

fn decisions(owner: &mut Owner) -> Vec<Decision> {
    std::iter::from_fn(|| owner.next_decision()).collect()
}

fn join(owner: &mut Owner, host: u64, life: u64, nonce: u64, now: Time) -> Vec<(Host, ToMirror)> {
    owner.handle(
        Host(host),
        ToOwner::Join { incarnation: Incarnation(life), nonce: Nonce(nonce) },
        now,
    );
    messages(owner)
}

fn ack(number: u64, id: InvalidationId) -> ToOwner {
    ToOwner::Ack { epoch: epoch(number), invalidation: id }
}

fn renew(number: u64) -> ToOwner {
    ToOwner::Renew { epoch: epoch(number), nonce: Nonce(50) }
}

fn done(invalidation: InvalidationId, endings: &[(u64, Ending)]) -> Decision {
    Decision::Done {
        invalidation,
        endings: endings.iter().map(|(number, ending)| (epoch(*number), *ending)).collect(),
    }
}

/// With hosts 1 to n in epochs 1 to n, joined at 0.
fn with(terms: Terms, hosts: u64) -> Owner {
    let mut owner = owner(terms);
    for host in 1..=hosts {
        let welcome = ToMirror::Welcome {
            epoch: epoch(host),
            incarnation: Incarnation(0),
            nonce: Nonce(1),
            term: owner.terms().term,
        };
        assert_eq!(join(&mut owner, host, 0, 1, at(0)), [(Host(host), welcome)]);
    }
    owner
}

#[test]
fn terms_that_bound_nothing_are_refused() {
    let refused =
        |change: fn(&mut Terms)| Owner::new(BOOT, changed(change), Memory::New, at(0)).unwrap_err();
    assert_eq!(refused(|terms| terms.term = Duration::ZERO), TermsError::Zero("term"));
    assert_eq!(refused(|terms| terms.patience = Duration::ZERO), TermsError::Zero("patience"));
    assert_eq!(refused(|terms| terms.resend = Duration::ZERO), TermsError::Zero("resend"));
    assert_eq!(refused(|terms| terms.window = 0), TermsError::Zero("window"));
    assert_eq!(refused(|terms| terms.members = 0), TermsError::Zero("members"));
    assert_eq!(refused(|terms| terms.members_of_a_host = 0), TermsError::Zero("members_of_a_host"));
    assert_eq!(refused(|terms| terms.fetches = 0), TermsError::Zero("fetches"));
    assert_eq!(refused(|terms| terms.drift_ppm = 1_000_000), TermsError::Drift(1_000_000));
    assert!(matches!(
        refused(|terms| terms.term = Duration::from_secs(1 << 33)),
        TermsError::Long(_)
    ));
}

#[test]
fn the_owners_term_is_longer_by_the_drift_of_both_clocks_rounded_up() {
    let mut terms = terms();
    assert_eq!(terms.owner_term(), terms.term);
    terms.drift_ppm = 100_000;
    assert_eq!(terms.owner_term(), Duration::from_nanos(122_222_223));
}

#[test]
fn an_invalidation_nobody_is_in_the_way_of_is_done_at_once() {
    let mut owner = owner(terms());
    let id = owner.invalidate(set(1), at(1));
    assert_eq!(decisions(&mut owner), [done(id, &[])]);
    assert_eq!((owner.end(id, at(2)), owner.end(id, at(2))), (Ok(()), Err(EndError::Unknown(id))));
}

#[test]
fn an_acknowledgement_counts_once_and_from_the_member_that_was_asked() {
    let mut owner = with(terms(), 2);
    let id = owner.invalidate(set(1), at(1));
    assert_eq!(owner.end(id, at(1)), Err(EndError::NotDone(id)));
    let old = Epoch { boot: Boot(2), number: 1 };
    for (from, message) in [
        (2, ack(1, id)),                                    // of another's epoch
        (9, ack(1, id)),                                    // of a stranger
        (1, ack(1, InvalidationId(7))),                     // not asked
        (1, ack(9, id)),                                    // no such epoch
        (1, ToOwner::Ack { epoch: old, invalidation: id }), // of an older boot
    ] {
        owner.handle(Host(from), message, at(2));
    }
    assert_eq!((owner.counts().unasked, owner.counts().acknowledged), (5, 0));
    assert_eq!(owner.waiting(id).collect::<Vec<_>>(), [epoch(1), epoch(2)]);
    owner.handle(Host(1), ack(1, id), at(3));
    owner.handle(Host(1), ack(1, id), at(3));
    assert_eq!((owner.counts().unasked, owner.counts().acknowledged), (6, 1));
    assert!(decisions(&mut owner).is_empty());
    owner.handle(Host(2), ack(2, id), at(4));
    assert_eq!(
        decisions(&mut owner),
        [done(id, &[(1, Ending::Acknowledged), (2, Ending::Acknowledged)])]
    );
}

#[test]
fn messages_by_epochs_that_the_sender_does_not_have_change_nothing() {
    let mut owner = with(terms(), 2);
    let before = owner.members().collect::<Vec<_>>();
    let old = Epoch { boot: Boot(2), number: 1 };
    let gone = |owner: &mut Owner, from, message, epoch| {
        owner.handle(Host(from), message, at(50));
        assert_eq!(messages(owner), [(Host(from), ToMirror::Gone { epoch })]);
    };
    gone(&mut owner, 2, renew(1), epoch(1));
    gone(&mut owner, 1, ToOwner::Renew { epoch: old, nonce: Nonce(5) }, old);
    gone(
        &mut owner,
        1,
        ToOwner::Fetch { epoch: epoch(2), nonce: Nonce(5), range: page(1) },
        epoch(2),
    );
    owner.handle(Host(1), ToOwner::Left { epoch: epoch(2) }, at(50));
    owner.handle(Host(1), ToOwner::Left { epoch: old }, at(50));
    assert_eq!(owner.counts().strangers, 5);
    assert!(messages(&mut owner).is_empty() && decisions(&mut owner).is_empty());
    let after = owner.members().collect::<Vec<_>>();
    assert_eq!(
        before.iter().map(|member| member.1).collect::<Vec<_>>(),
        after.iter().map(|member| member.1).collect::<Vec<_>>()
    );
    assert!(
        after.iter().all(|(_, _, left)| *left == Duration::from_millis(50)),
        "no lease was renewed"
    );
}

#[test]
fn a_member_that_does_not_answer_is_asked_again_then_renewed_no_more_then_over() {
    let mut owner = with(terms(), 1);
    owner.handle(Host(1), renew(1), at(5));
    let id = owner.invalidate(set(1), at(10));
    messages(&mut owner);
    owner.tick(at(19));
    assert!(messages(&mut owner).is_empty());
    owner.tick(at(20));
    let again = ToMirror::Inv { epoch: epoch(1), invalidation: id, ranges: set(1) };
    assert_eq!(messages(&mut owner), [(Host(1), again)]);
    owner.handle(Host(1), renew(1), at(59));
    assert!(owner.is_live(epoch(1)));
    messages(&mut owner);
    owner.tick(at(60));
    assert!(messages(&mut owner).contains(&(Host(1), ToMirror::Gone { epoch: epoch(1) })));
    owner.handle(Host(1), renew(1), at(61));
    assert_eq!(messages(&mut owner), [(Host(1), ToMirror::Gone { epoch: epoch(1) })]);
    owner.tick(at(158));
    assert!(decisions(&mut owner).is_empty(), "the lease was renewed at 59");
    owner.tick(at(159));
    assert_eq!(decisions(&mut owner), [done(id, &[(1, Ending::Expired)])]);
    assert_eq!((owner.counts().expelled, owner.counts().expired), (1, 1));
}

#[test]
fn an_epoch_that_ends_by_time_is_fenced_first() {
    let mut owner = with(changed(|terms| terms.fences = true), 1);
    let id = owner.invalidate(set(1), at(10));
    let what = Fenced::Epoch(Host(1), epoch(1));
    assert!(!owner.fenced(what, at(11)), "nobody asked for it");
    owner.tick(at(100));
    assert_eq!(decisions(&mut owner), [Decision::Fence(what)]);
    messages(&mut owner);
    owner.handle(Host(1), renew(1), at(101));
    assert_eq!(messages(&mut owner), [(Host(1), ToMirror::Gone { epoch: epoch(1) })]);
    owner.tick(at(200));
    assert!(decisions(&mut owner).is_empty());
    assert!(!owner.fenced(Fenced::Before(BOOT), at(200)), "something else was asked for");
    assert!(owner.fenced(what, at(200)));
    assert_eq!(decisions(&mut owner), [done(id, &[(1, Ending::Expired)])]);
    assert!(!owner.fenced(what, at(201)));
}

#[test]
fn an_owner_over_memory_that_survived_waits_for_earlier_leases() {
    for fences in [false, true] {
        let terms = changed(|terms| terms.fences = fences);
        let mut owner = Owner::new(BOOT, terms, Memory::Survived, at(0)).unwrap();
        let id = owner.invalidate(set(1), at(1));
        assert_eq!(join(&mut owner, 1, 0, 1, at(2)).len(), 1, "mirrors may join meanwhile");
        owner.tick(at(99));
        assert!(decisions(&mut owner).is_empty());
        owner.tick(at(100));
        if fences {
            assert_eq!(decisions(&mut owner), [Decision::Fence(Fenced::Before(BOOT))]);
            assert!(owner.fenced(Fenced::Before(BOOT), at(100)));
        }
        assert_eq!(decisions(&mut owner), [done(id, &[(0, Ending::Expired)])]);
    }
}

#[test]
fn a_join_that_is_sent_again_is_one_and_an_older_one_is_none() {
    let mut owner = owner(terms());
    let first = join(&mut owner, 1, 7, 4, at(0));
    assert_eq!(join(&mut owner, 1, 7, 4, at(1)), first);
    assert!(join(&mut owner, 1, 7, 3, at(2)).is_empty());
    assert_eq!(
        (owner.counts().joins, owner.counts().strangers, owner.members().count()),
        (1, 1, 1)
    );
}

#[test]
fn a_newer_join_ends_older_epochs_of_its_own_life_only() {
    let mut owner = owner(terms());
    join(&mut owner, 1, 7, 1, at(0));
    let id = owner.invalidate(set(1), at(1));
    messages(&mut owner);
    join(&mut owner, 1, 8, 1, at(2));
    assert!(decisions(&mut owner).is_empty(), "the old life may hold on");
    assert!(!owner.is_live(epoch(1)) && owner.is_live(epoch(2)));
    join(&mut owner, 1, 7, 2, at(3));
    assert_eq!(decisions(&mut owner), [done(id, &[(1, Ending::JoinedAnew)])]);
    assert_eq!(owner.members().map(|(_, epoch, _)| epoch.number).collect::<Vec<_>>(), [2, 3]);
}

#[test]
fn a_join_whose_epoch_was_expelled_is_refused_so_that_the_mirror_asks_anew() {
    let mut owner = with(terms(), 1);
    owner.invalidate(set(1), at(1));
    owner.tick(at(51));
    messages(&mut owner);
    // The welcome was lost: the mirror still asks, and knows no epoch.
    let refused = ToMirror::Refused {
        nonce: Nonce(1),
        asker: Asker::Join(Incarnation(0)),
        why: Refusal::Expelled,
    };
    assert_eq!(join(&mut owner, 1, 0, 1, at(52)), [(Host(1), refused)]);
    assert_eq!(owner.members().count(), 1, "it may have entered all the same");
    assert!(matches!(join(&mut owner, 1, 0, 2, at(53))[..], [(Host(1), ToMirror::Welcome { .. })]));
}

#[test]
fn members_have_limits() {
    let refusal = |messages: Vec<(Host, ToMirror)>| match messages.last() {
        Some((_, ToMirror::Refused { why, .. })) => Some(*why),
        _ => None,
    };
    let mut owner = with(changed(|terms| terms.members = 2), 2);
    assert_eq!(refusal(join(&mut owner, 3, 0, 1, at(1))), Some(Refusal::Members));
    owner.handle(Host(1), ToOwner::Left { epoch: epoch(1) }, at(2));
    assert_eq!(refusal(join(&mut owner, 3, 0, 1, at(3))), None);

    let mut owner = with(changed(|terms| terms.members_of_a_host = 2), 1);
    assert_eq!(refusal(join(&mut owner, 1, 1, 1, at(1))), None);
    assert_eq!(refusal(join(&mut owner, 1, 2, 1, at(1))), Some(Refusal::MembersOfHost));
    assert_eq!(refusal(join(&mut owner, 1, 1, 2, at(1))), None, "it takes its own older place");
    assert_eq!(refusal(join(&mut owner, 2, 0, 1, at(1))), None);
    owner.tick(at(101));
    assert_eq!(refusal(join(&mut owner, 1, 2, 1, at(101))), None);
}

#[test]
fn a_window_bounds_what_is_on_its_way_to_a_member() {
    let mut owner = with(changed(|terms| terms.window = 2), 1);
    let ids: Vec<_> = (0..4).map(|number| owner.invalidate(set(number), at(1))).collect();
    assert_eq!(messages(&mut owner).len(), 2);
    owner.handle(Host(1), ack(1, ids[2]), at(2));
    assert_eq!(owner.counts().unasked, 1, "it was not sent yet");
    owner.handle(Host(1), ack(1, ids[1]), at(2));
    let next = ToMirror::Inv { epoch: epoch(1), invalidation: ids[2], ranges: set(2) };
    assert_eq!(messages(&mut owner), [(Host(1), next)]);
    owner.handle(Host(1), ToOwner::Left { epoch: epoch(1) }, at(3));
    let ended: Vec<_> =
        ids.iter().filter(|id| **id != ids[1]).map(|id| done(*id, &[(1, Ending::Left)])).collect();
    let mut all = vec![done(ids[1], &[(1, Ending::Acknowledged)])];
    all.extend(ended);
    let found = decisions(&mut owner);
    assert!(found.len() == 4 && all.iter().all(|decision| found.contains(decision)), "{found:?}");
}

#[test]
fn a_fetch_of_what_is_under_invalidation_waits_and_others_do_not() {
    let mut owner = with(changed(|terms| terms.fetches = 1), 1);
    let id = owner.invalidate(set(1), at(1));
    messages(&mut owner);
    let fetch = |nonce, number| ToOwner::Fetch {
        epoch: epoch(1),
        nonce: Nonce(nonce),
        range: page(number),
    };
    let serve = |nonce, number, version| Decision::Serve {
        to: Host(1),
        epoch: epoch(1),
        nonce: Nonce(nonce),
        range: page(number),
        version,
    };
    owner.handle(Host(1), fetch(10, 2), at(2));
    assert_eq!(decisions(&mut owner), [serve(10, 2, 0)]);
    owner.handle(Host(1), fetch(11, 1), at(2));
    owner.handle(Host(1), fetch(11, 1), at(3));
    assert!(messages(&mut owner).is_empty(), "sent again it waits once");
    owner.handle(Host(1), fetch(12, 1), at(3));
    let refused = ToMirror::Refused {
        nonce: Nonce(12),
        asker: Asker::Fetch(epoch(1)),
        why: Refusal::Fetches,
    };
    assert_eq!(messages(&mut owner), [(Host(1), refused)]);
    owner.handle(Host(1), ack(1, id), at(4));
    assert_eq!(
        decisions(&mut owner),
        [done(id, &[(1, Ending::Acknowledged)])],
        "the memory has not changed yet"
    );
    owner.end(id, at(5)).unwrap();
    assert_eq!(decisions(&mut owner), [serve(11, 1, 1)]);
}

#[test]
fn fetches_that_wait_end_with_their_member() {
    let mut owner = with(terms(), 1);
    let id = owner.invalidate(set(1), at(1));
    owner.handle(
        Host(1),
        ToOwner::Fetch { epoch: epoch(1), nonce: Nonce(9), range: page(1) },
        at(2),
    );
    owner.handle(Host(1), ToOwner::Left { epoch: epoch(1) }, at(3));
    assert_eq!(decisions(&mut owner), [done(id, &[(1, Ending::Left)])]);
    owner.end(id, at(4)).unwrap();
    assert!(decisions(&mut owner).is_empty());
}

#[test]
fn time_does_not_go_back() {
    let mut owner = with(terms(), 1);
    owner.handle(Host(1), renew(1), at(50));
    owner.handle(Host(1), renew(1), at(20));
    assert_eq!(owner.members().next().unwrap().2, Duration::from_millis(100));
    owner.tick(at(149));
    assert!(owner.is_live(epoch(1)));
}

#[test]
fn a_deadline_is_when_something_is_due() {
    let mut owner = owner(terms());
    assert_eq!(owner.deadline(), None);
    join(&mut owner, 1, 0, 1, at(0));
    assert_eq!(owner.deadline(), Some(at(100)));
    owner.invalidate(set(1), at(1));
    assert_eq!(owner.deadline(), Some(at(11)));
}

#[test]
fn what_is_not_shared_or_is_too_long_is_not_served() {
    let terms = changed(|terms| {
        terms.shared = AddressRange::new(0, 1 << 20).unwrap();
        terms.fetch_bytes = 8_192;
    });
    let mut owner = with(terms, 1);
    let fetch = |range| ToOwner::Fetch { epoch: epoch(1), nonce: Nonce(10), range };
    for range in [
        AddressRange::ALL,
        AddressRange::new(1 << 20, 1).unwrap(),
        AddressRange::new((1 << 20) - 1, 2).unwrap(),
    ] {
        owner.handle(Host(1), fetch(range), at(1));
        let refused = ToMirror::Refused {
            nonce: Nonce(10),
            asker: Asker::Fetch(epoch(1)),
            why: Refusal::Contents,
        };
        assert_eq!(
            (messages(&mut owner), decisions(&mut owner)),
            (vec![(Host(1), refused)], vec![]),
            "{range}"
        );
    }
    owner.handle(Host(1), fetch(AddressRange::new(0, 8_193).unwrap()), at(1));
    assert_eq!((messages(&mut owner).len(), decisions(&mut owner).len()), (1, 0));
    owner.handle(Host(1), fetch(AddressRange::new(0, 8_192).unwrap()), at(1));
    assert_eq!((messages(&mut owner).len(), decisions(&mut owner).len()), (0, 1));
}
