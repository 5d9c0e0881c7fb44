//! Answers that come late, to others, or never.

use crate::guest::{PAGE, USER};
use crate::machine::{FEATURES, Machine};
use crate::support::*;
use futures::FutureExt;
use futures::task::noop_waker;
use shootdown::AddressRange;
use shootdown_vhost::message::{Channel, Message, iotlb_bytes};
use shootdown_vhost::{MapError, Permissions, Place, Want};
use std::task::Context;
use vhost::vhost_user::message::{FrontendReq, VhostUserHeaderFlag};
use vhost::{VhostAccess, VhostIotlbMsg, VhostIotlbType};

/// A miss is on its way when the features change.
#[test]
fn v6_an_answer_to_what_was_asked_before_the_features_changed_is_no_error() {
    let mut machine = Machine::connected();
    let iotlb = machine.session.iotlb().clone();
    let mut map = machine.spawn(async move { iotlb.map(Want::write(9 * PAGE, 8)).await });
    assert!(machine.poll(&mut map).is_none());
    machine.poll_session();
    assert_eq!(machine.misses.len(), 1);
    machine.plain(FrontendReq::SET_FEATURES, &(FEATURES & !(1 << 33)).to_ne_bytes());
    let done = machine.session.receive(Channel::Backend, answer(1));
    assert!(done.is_ok(), "the session is over: {done:?}");
}

/// The same, and the IOMMU is there again when the answer comes.
#[test]
fn v3_an_answer_of_before_refuses_nothing_that_was_asked_later() {
    let mut machine = Machine::connected();
    let iotlb = machine.session.iotlb().clone();
    let other = iotlb.clone();
    let mut map = machine.spawn(async move { iotlb.map(Want::write(9 * PAGE, 8)).await });
    assert!(machine.poll(&mut map).is_none());
    machine.poll_session();
    machine.plain(FrontendReq::SET_FEATURES, &(FEATURES & !(1 << 33)).to_ne_bytes());
    machine.plain(FrontendReq::SET_FEATURES, &FEATURES.to_ne_bytes());
    let mut later = machine.spawn(async move { other.map(Want::write(10 * PAGE, 8)).await });
    assert!(machine.poll(&mut later).is_none());
    machine.poll_session();
    assert_eq!(machine.misses.len(), 2);
    // To the first.
    machine.answer_miss(1);
    let found = machine.poll(&mut later);
    assert!(found.is_none(), "nobody has answered that: {found:?}");
}

/// Without REPLY_ACK a refused miss has no answer.
#[test]
fn v3_a_page_is_asked_for_again_when_nobody_waits_any_more() {
    let mut machine = Machine::connected();
    machine.plain(FrontendReq::SET_PROTOCOL_FEATURES, &0x221u64.to_ne_bytes());
    let iotlb = machine.session.iotlb().clone();
    let other = iotlb.clone();
    let mut map = machine.spawn(async move { iotlb.map(Want::write(9 * PAGE, 8)).await });
    assert!(machine.poll(&mut map).is_none());
    machine.poll_session();
    assert_eq!(machine.misses.len(), 1);
    // The front-end has no translation, and says nothing. The guest resets its device, and maps the
    // page.
    drop(map);
    machine.get_vring_base(0);
    machine.plain(FrontendReq::SET_FEATURES, &FEATURES.to_ne_bytes());
    let mut map = machine.spawn(async move { other.map(Want::write(9 * PAGE, 8)).await });
    assert!(machine.poll(&mut map).is_none());
    machine.poll_session();
    assert_eq!(machine.misses.len(), 2, "nobody asks for it any more: the new ring hangs for ever");
}

/// A ring was stopped with a miss on its way; the guest has mapped the page since.
#[test]
fn v3_a_refusal_of_before_concerns_nobody_who_asks_later() {
    let mut machine = Machine::connected();
    let iotlb = machine.session.iotlb().clone();
    let other = iotlb.clone();
    let mut map = machine.spawn(async move { iotlb.map(Want::write(9 * PAGE, 8)).await });
    assert!(machine.poll(&mut map).is_none());
    machine.poll_session();
    drop(map);
    machine.get_vring_base(0);
    machine.plain(FrontendReq::SET_FEATURES, &FEATURES.to_ne_bytes());
    // From here on the guest has mapped it.
    let mut map = machine.spawn(async move { other.map(Want::write(9 * PAGE, 8)).await });
    assert!(machine.poll(&mut map).is_none());
    machine.poll_session();
    machine.answer_miss(1);
    let found = machine.poll(&mut map);
    assert!(
        !matches!(found, Some(Err(MapError::Refused { .. }))),
        "refused by an answer from before: {found:?}"
    );
}

/// A new back-end channel: what was asked for on the old one is answered by nobody.
#[test]
fn v3_what_was_asked_on_a_channel_that_is_replaced_is_asked_again() {
    let mut machine = Machine::connected();
    let iotlb = machine.session.iotlb().clone();
    let mut map = machine.spawn(async move { iotlb.map(Want::write(9 * PAGE, 8)).await });
    assert!(machine.poll(&mut map).is_none());
    machine.poll_session();
    machine.misses.clear();
    machine
        .session
        .receive(Channel::Frontend, with_fds(FrontendReq::SET_BACKEND_REQ_FD, &[], vec![fd()]))
        .unwrap();
    machine.poll_session();
    let found = machine.poll(&mut map);
    machine.poll_session();
    assert!(found.is_some() || machine.misses.len() == 1, "it waits for ever");
}

/// `MapError::Nobody`: "the session has ended".
#[test]
fn v3_nobody_waits_for_a_session_that_is_dropped() {
    let mut machine = Machine::connected();
    let iotlb = machine.session.iotlb().clone();
    let mut map = async move { iotlb.map(Want::write(9 * PAGE, 8)).await }.boxed();
    let waker = noop_waker();
    assert!(map.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    machine.poll_session();
    drop(machine);
    assert!(matches!(map.now_or_never(), Some(Err(MapError::Nobody { .. }))), "it waits for ever");
}

/// A range of more pages than the table has room for: it is never known as a whole.
#[test]
fn v3_a_range_of_more_translations_than_there_can_be_is_refused_some_day() {
    let mut machine = Machine::connected();
    let (region, _file) = memory_of(1, 0, 1 << 41);
    let pages = 65_600;
    let iotlb = machine.session.iotlb().clone();
    let other = iotlb.clone();
    let mut map =
        machine.spawn(async move { other.map(Want::read(0, pages * PAGE)).await.map(drop) });
    for round in 0..6 {
        if machine.poll(&mut map).is_some() {
            return;
        }
        machine.poll_session();
        assert!(!machine.misses.is_empty(), "round {round}");
        // An eager front-end tells of all pages at once.
        for page in 0..pages {
            let place = Place { region: region.clone(), offset: 0 };
            iotlb.update(
                AddressRange::new(page * PAGE, PAGE).unwrap(),
                place,
                Permissions::ReadWrite,
            );
        }
        while !machine.misses.is_empty() {
            machine.answer_miss(0);
        }
    }
    panic!("asked for over and over: {:?}", iotlb.stats());
}

/// A silent front-end whose UPDATEs allow what was asked for, and no more.
#[test]
fn v3_an_update_for_reads_does_not_refuse_the_write_that_is_asked_for_too() {
    let mut machine = Machine::connected();
    machine.plain(FrontendReq::SET_PROTOCOL_FEATURES, &0x221u64.to_ne_bytes());
    let iotlb = machine.session.iotlb().clone();
    let other = iotlb.clone();
    let mut reads = machine.spawn(async move { iotlb.map(Want::read(9 * PAGE, 8)).await });
    let mut writes = machine.spawn(async move { other.map(Want::write(9 * PAGE, 8)).await });
    assert!(machine.poll(&mut reads).is_none() && machine.poll(&mut writes).is_none());
    machine.poll_session();
    assert_eq!(machine.misses.len(), 2);
    let update = |perm| {
        let msg_type = VhostIotlbType::Update;
        let message = VhostIotlbMsg {
            iova: 9 * PAGE,
            size: PAGE,
            userspace_addr: USER + 9 * PAGE,
            perm,
            msg_type,
        };
        Message::new(FrontendReq::IOTLB_MSG, VhostUserHeaderFlag::empty(), &iotlb_bytes(&message))
    };
    machine.session.receive(Channel::Frontend, update(VhostAccess::ReadOnly)).unwrap();
    machine.session.receive(Channel::Frontend, update(VhostAccess::WriteOnly)).unwrap();
    machine.poll_session();
    let found = machine.poll(&mut writes);
    assert!(matches!(found, Some(Ok(_))), "its own answer has come: {found:?}");
}

/// A front-end that answers nothing, and invalidates over and over what is asked for.
#[test]
fn v7_what_is_asked_for_anew_is_not_kept_twice() {
    let mut machine = Machine::connected();
    let iotlb = machine.session.iotlb().clone();
    let map = |at: u64| {
        let iotlb = iotlb.clone();
        machine.spawn(async move { iotlb.map(Want::write((20 + at) * PAGE, 8)).await })
    };
    let mut maps: Vec<_> = (0..17).map(map).collect();
    maps.iter_mut().for_each(|map| assert!(machine.poll(map).is_none()));
    machine.poll_session();
    assert_eq!(machine.misses.len(), 16, "so many at a time");
    let before = peak_kib();
    for _ in 0..300_000 {
        machine.invalidate(36 * PAGE, PAGE);
        assert!(machine.answers() == 1 && machine.poll(&mut maps[16]).is_none());
    }
    let grown = peak_kib() - before;
    assert!(grown < 16 * 1024, "{grown} KiB more");
}
