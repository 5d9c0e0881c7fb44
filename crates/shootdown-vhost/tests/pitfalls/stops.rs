//! Rings and sessions that stop, and go on.

use crate::guest::{self, PAGE, USER};
use crate::machine::{FEATURES, Machine};
use crate::support::*;
use futures::FutureExt;
use futures::task::noop_waker;
use shootdown_vhost::message::{Channel, Message};
use shootdown_vhost::{Iotlb, Next, Session};
use std::sync::Arc;
use std::task::Context;
use vhost::vhost_user::message::{
    FrontendReq, VhostUserHeaderFlag, VhostUserMemory, VhostUserMemoryRegion,
};
use vm_memory::ByteValued;

/// `stop` in QEMU's monitor, then `cont`, with a request in flight in the second queue.
#[test]
fn v4_no_request_is_lost_when_another_queue_stops_first() {
    let mut machine = Machine::started();
    machine.submit(1);
    machine.serve_misses();
    assert_eq!(machine.in_flight(), 1);
    stop_both(&mut machine);
    machine.run();
    machine.get_vring_base(0);
    machine.run();
    assert_eq!(machine.answers(), 1);
    machine.get_vring_base(1);
    machine.run();
    assert_eq!(machine.answers(), 0, "the access is in flight");
    machine.access();
    machine.run();
    assert_eq!(machine.answers(), 1);
    let heard = machine.guest.completed(1).unwrap().is_some();
    assert!(
        heard || machine.last_base() == 0,
        "done, never reported, and not to be taken again: base {}",
        machine.last_base()
    );
}

/// The same with one queue: a flush of the whole domain comes just before.
#[test]
fn v4_no_request_is_lost_when_a_flush_comes_before_the_stop() {
    let mut machine = Machine::started();
    machine.submit(0);
    machine.serve_misses();
    machine.invalidate(0, 1 << 63);
    machine.access();
    machine.run();
    assert_eq!(machine.answers(), 1);
    stop_both(&mut machine);
    machine.get_vring_base(0);
    machine.run();
    assert_eq!(machine.answers(), 1);
    assert!(machine.guest.completed(0).unwrap().is_none(), "its used ring is not known");
    machine.start_rings_at(1);
    machine.serve_misses();
    assert!(machine.guest.completed(0).unwrap().is_some(), "done, and never told");
    assert_eq!(machine.in_flight(), 0, "it is not done again");
}

/// QEMU refuses every translation of a device that it has stopped, also those that were asked for
/// before.
#[test]
fn v4_no_request_is_lost_when_the_used_ring_is_refused_during_a_stop() {
    let mut machine = Machine::started();
    machine.submit(0);
    machine.serve_misses();
    machine.invalidate(0, 1 << 63);
    machine.access();
    machine.run();
    stop_both(&mut machine);
    machine.run();
    assert!(!machine.misses.is_empty(), "who has been disabled still asks");
    while !machine.misses.is_empty() {
        machine.answer_miss(1);
        machine.run();
    }
    machine.get_vring_base(0);
    machine.run();
    assert_eq!(machine.last_base(), 1);
    machine.start_rings_at(1);
    machine.serve_misses();
    assert!(machine.guest.completed(0).unwrap().is_some(), "done, and never told");
}

/// A device that is reset begins anew: what was done before is nobody's any more.
#[test]
fn v4_what_could_not_be_told_before_a_reset_is_not_told_after_it() {
    let mut machine = Machine::started();
    machine.submit(0);
    machine.serve_misses();
    machine.invalidate(0, 1 << 63);
    machine.access();
    machine.run();
    stop_both(&mut machine);
    machine.get_vring_base(0);
    machine.run();
    // The rings are empty again, and at another place or at the same one.
    rustix::io::pwrite(&machine.guest.file, &[0; 3 * PAGE as usize], 0).unwrap();
    machine.start_rings_at(0);
    machine.serve_misses();
    assert!(machine.guest.completed(0).unwrap().is_none(), "the driver knows nothing of it");
}

/// A front-end that does not wait for the base before it starts the ring again.
#[test]
fn v6_a_base_is_answered_although_a_new_kick_comes_before() {
    let mut machine = Machine::started();
    machine.get_vring_base(0);
    machine
        .session
        .receive(
            Channel::Frontend,
            with_fds(FrontendReq::SET_VRING_KICK, &0u64.to_ne_bytes(), vec![fd()]),
        )
        .unwrap();
    machine.poll_session();
    machine.serve_misses();
    assert_eq!(machine.answers(), 2, "the base and the kick");
}

/// A session that is dropped, as by dropping the future of `serve_tokio`.
#[test]
fn v5_rings_of_a_dropped_session_stop() {
    let device = Arc::new(Keeps::default());
    let iotlb = Iotlb::default();
    let mut session = Session::new(device.clone(), iotlb.clone());
    let waker = noop_waker();
    let plain =
        |request, payload: &[u8]| Message::new(request, VhostUserHeaderFlag::empty(), payload);
    let (_, file) = memory_of(8, 0, USER);
    let region = VhostUserMemoryRegion::new(0, 8 * PAGE, USER, 0);
    let payload = [VhostUserMemory::new(1).as_slice(), region.as_slice()].concat();
    let none = vhost::vhost_user::message::VhostUserVringAddrFlags::empty();
    let ring = vhost::vhost_user::message::VhostUserVringAddr::new(
        0,
        none,
        USER,
        USER + 2 * PAGE,
        USER + PAGE,
        0,
    );
    let messages = vec![
        plain(FrontendReq::SET_FEATURES, &(1u64 << 32).to_ne_bytes()),
        with_fds(FrontendReq::SET_MEM_TABLE, &payload, vec![file]),
        plain(FrontendReq::SET_VRING_NUM, &state(0, 8)),
        plain(FrontendReq::SET_VRING_ADDR, ring.as_slice()),
        with_fds(FrontendReq::SET_VRING_KICK, &0u64.to_ne_bytes(), vec![fd()]),
    ];
    for message in messages {
        session.receive(Channel::Frontend, message).unwrap();
        while session.poll_output(&mut Context::from_waker(&waker)).is_ready() {}
    }
    let mut ring = device.0.lock().unwrap().pop().expect("it runs");
    drop(session);
    let next = ring.next().now_or_never();
    assert!(
        !matches!(next, Some(Ok(Next::Empty))),
        "it runs for ever, and uses the guest's memory: {next:?}"
    );
}

/// RESET_OWNER disables all rings; whoever waits for the answer has the memory back.
#[test]
fn v4_the_answer_to_reset_owner_waits_for_what_is_in_flight() {
    let mut machine = Machine::started();
    machine.submit(0);
    machine.serve_misses();
    assert_eq!(machine.in_flight(), 1);
    machine.answers();
    machine
        .session
        .receive(Channel::Frontend, with_fds(FrontendReq::RESET_OWNER, &[], vec![]))
        .unwrap();
    machine.run();
    assert_eq!(machine.answers(), 0, "answered with an access in flight");
}

/// PROTOCOL_FEATURES is negotiated in the end: rings begin disabled.
#[test]
fn v6_a_ring_that_nobody_has_enabled_does_not_start() {
    let mut machine = Machine::connected();
    machine.plain(FrontendReq::SET_FEATURES, &(FEATURES & !(1 << 30)).to_ne_bytes());
    machine.plain(FrontendReq::SET_FEATURES, &FEATURES.to_ne_bytes());
    let none = vhost::vhost_user::message::VhostUserVringAddrFlags::empty();
    let [descriptors, available, used] = [0, 1, 2].map(|part| guest::ring_iova(0, part));
    let ring = vhost::vhost_user::message::VhostUserVringAddr::new(
        0,
        none,
        descriptors,
        used,
        available,
        0,
    );
    machine.plain(FrontendReq::SET_VRING_NUM, &state(0, 8));
    machine.plain(FrontendReq::SET_VRING_ADDR, ring.as_slice());
    machine
        .session
        .receive(
            Channel::Frontend,
            with_fds(FrontendReq::SET_VRING_KICK, &0u64.to_ne_bytes(), vec![fd()]),
        )
        .unwrap();
    machine.run();
    assert!(machine.misses.is_empty(), "it runs");
}

/// The back-end ends (SIGTERM): the front-end is there still, and what it has told of holds.
#[test]
fn v4_what_is_in_flight_when_the_back_end_ends_is_reported() {
    let mut machine = Machine::started();
    machine.submit(0);
    machine.serve_misses();
    assert!(!machine.poll_closed(), "the access is in flight");
    machine.access();
    machine.run_tasks();
    assert!(machine.poll_closed());
    assert!(
        machine.guest.completed(0).unwrap().is_some(),
        "done, and the guest does not hear of it"
    );
}

/// RESET_OWNER, then the device is set up anew; nobody has asked for the base.
#[test]
fn v6_a_ring_that_is_reset_begins_where_it_is_told_to() {
    let mut machine = Machine::started();
    machine.submit(0);
    machine.serve_misses();
    machine.plain(FrontendReq::RESET_OWNER, &[]);
    machine.start_rings();
    machine.access();
    // An empty ring.
    rustix::io::pwrite(&machine.guest.file, &[0; 4], PAGE).unwrap();
    machine.serve_misses();
    machine.get_vring_base(0);
    machine.run();
    assert_eq!(machine.last_base(), 0, "SET_VRING_BASE was refused in silence");
}
