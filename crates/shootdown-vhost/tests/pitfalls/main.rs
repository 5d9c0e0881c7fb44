//! What goes wrong with a back-end that has an IOMMU, each as a test of the state machine. No
//! front-end but the test, no threads, no I/O.
#![allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    reason = "a test that shares modules with the schedules"
)]

#[path = "../schedules/device.rs"]
mod device;
#[path = "../schedules/guest.rs"]
mod guest;
mod hostile;
mod limits;
mod machine;
mod misses;
mod stops;
mod support;

use guest::{PAGE, PAGES, QUEUES, ring_iova};
use machine::Machine;
use shootdown::AddressRange;
use shootdown_vhost::message::{Channel, Message};
use shootdown_vhost::{MapError, Permissions, Want};
use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfig, VhostUserConfigFlags, VhostUserHeaderFlag,
};
use vm_memory::ByteValued;

#[test]
fn p1_an_invalidate_of_everything_needs_no_translation_to_be_answered() {
    let mut machine = Machine::started();
    machine.submit(0);
    machine.serve_misses();
    assert_eq!(machine.in_flight(), 1);
    machine.invalidate(0, 1 << 63);
    machine.run();
    assert_eq!(
        (machine.answers(), machine.session.iotlb().len()),
        (0, 0),
        "the access is in flight"
    );
    machine.access();
    machine.run();
    // The used ring has no translation any more, and nobody serves a miss.
    assert_eq!(machine.answers(), 1);
    assert!(machine.guest.completed(0).unwrap().is_none());
    machine.serve_misses();
    assert!(machine.guest.completed(0).unwrap().is_some());
}

#[test]
fn p1_a_request_holds_no_buffer_while_it_waits_for_another_one() {
    let mut machine = Machine::started();
    machine.submit(0);
    machine.serve_rings();
    // One of its pages is known by now, another is asked for.
    machine.serve_one_miss();
    machine.run();
    assert_eq!(machine.in_flight(), 0, "it waits");
    machine.invalidate(0, 1 << 63);
    machine.run();
    assert_eq!(machine.answers(), 1);
    machine.serve_misses();
    machine.access();
    machine.serve_misses();
    assert!(machine.guest.completed(0).unwrap().is_some());
}

#[test]
fn p2_a_ring_that_is_set_up_translates_nothing() {
    let mut machine = Machine::connected();
    machine.start_rings();
    assert!(machine.misses.is_empty(), "nothing is asked for within a message");
    assert_eq!(machine.refused, 0);
    machine.run();
    assert!(!machine.misses.is_empty(), "the ring's own task does");
}

#[test]
fn p3_what_was_known_is_forgotten_when_a_ring_stops_and_when_features_are_set() {
    let mut machine = Machine::started();
    machine.submit(0);
    machine.serve_misses();
    machine.access();
    machine.serve_misses();
    assert!(!machine.session.iotlb().is_empty());
    machine.get_vring_base(0);
    machine.run();
    assert_eq!(machine.answers(), 1);
    assert!(!machine.session.iotlb().is_empty(), "another ring runs, and what is unmapped is told");
    machine.get_vring_base(1);
    machine.run();
    assert_eq!((machine.answers(), machine.session.iotlb().len()), (1, 0));
    machine.update(7 * PAGE, PAGE, 7);
    assert_eq!(machine.session.iotlb().len(), 1);
    machine.plain(FrontendReq::SET_FEATURES, &machine::FEATURES.to_ne_bytes());
    assert_eq!(machine.session.iotlb().len(), 0);
}

#[test]
fn p3_a_ring_stops_when_its_last_access_has_ended() {
    let mut machine = Machine::started();
    machine.submit(0);
    machine.serve_misses();
    machine.get_vring_base(0);
    machine.run();
    assert_eq!(machine.answers(), 0, "the access is in flight");
    machine.access();
    machine.run();
    assert_eq!((machine.answers(), machine.last_base()), (1, 1));
    assert!(machine.guest.completed(0).unwrap().is_some(), "its used ring was known");
}

#[test]
fn p4_a_translation_that_comes_and_goes_before_anybody_looks_is_asked_for_again() {
    let mut machine = Machine::connected();
    let iotlb = machine.session.iotlb().clone();
    let mut map = machine.spawn(async move { iotlb.map(Want::write(9 * PAGE, 8)).await });
    assert!(machine.poll(&mut map).is_none());
    machine.poll_session();
    assert_eq!(machine.misses.len(), 1);
    // It is not polled meanwhile.
    machine.update(9 * PAGE, PAGE, 9);
    machine.invalidate(9 * PAGE, PAGE);
    machine.poll_session();
    machine.answer_miss(0);
    assert!(machine.poll(&mut map).is_none(), "a translation that is not there any more");
    machine.poll_session();
    assert_eq!(machine.misses.len(), 1, "asked again");
    machine.update(9 * PAGE, PAGE, 10);
    machine.answer_miss(0);
    let mapping = machine.poll(&mut map).unwrap().unwrap();
    mapping.write(0, &1u64.to_ne_bytes()).unwrap();
    assert_eq!((machine.guest.first_word(9), machine.guest.first_word(10)), (machine::FOREIGN, 1));
}

#[test]
fn p5_completions_that_wait_for_the_used_ring_together_all_have_their_entry() {
    let mut machine = Machine::started();
    (0..3).for_each(|_| machine.submit(0));
    machine.serve_misses();
    assert_eq!(machine.in_flight(), 3);
    // The used ring has to be translated anew for each of them.
    machine.invalidate(ring_iova(0, 2), PAGE);
    machine.run();
    assert_eq!(machine.answers(), 1, "nothing is in flight there");
    (0..3).for_each(|_| machine.access());
    machine.run();
    machine.serve_misses();
    for _ in 0..3 {
        assert!(machine.guest.completed(0).unwrap().is_some());
    }
    assert!(machine.guest.completed(0).unwrap().is_none());
}

#[test]
fn p6_a_miss_asks_for_an_answer_and_a_refusal_is_an_error() {
    let mut machine = Machine::connected();
    let iotlb = machine.session.iotlb().clone();
    let wants = [Want::read(3 * PAGE + 8, 16), Want::read(3 * PAGE + 64, 16)];
    let [mut first, mut second] = wants.map(|want| {
        let iotlb = iotlb.clone();
        machine.spawn(async move { iotlb.map(want).await })
    });
    assert!(machine.poll(&mut first).is_none() && machine.poll(&mut second).is_none());
    machine.poll_session();
    assert_eq!(machine.misses.len(), 1, "one for both");
    assert!(machine.misses[0].needs_reply());
    machine.answer_miss(1);
    let refused = MapError::Refused { iova: 3 * PAGE + 8, access: Permissions::Read };
    assert_eq!(machine.poll(&mut first).unwrap().unwrap_err(), refused);
    assert_eq!(machine.poll(&mut second).unwrap().unwrap_err(), refused);
    assert_eq!(iotlb.stats().refused, 1);
    // It says nothing of later.
    let mut again = machine.spawn(async move { iotlb.map(wants[0]).await });
    assert!(machine.poll(&mut again).is_none());
    machine.poll_session();
    machine.update(3 * PAGE, PAGE, 9);
    machine.answer_miss(0);
    assert!(machine.poll(&mut again).unwrap().is_ok());
}

#[test]
fn p6_a_translation_that_does_not_allow_the_access_is_a_refusal() {
    let mut machine = Machine::connected();
    let iotlb = machine.session.iotlb().clone();
    let mut map = machine.spawn(async move { iotlb.map(Want::write(3 * PAGE, 8)).await });
    assert!(machine.poll(&mut map).is_none());
    machine.poll_session();
    machine.update_for(3 * PAGE, PAGE, 9, Permissions::Read);
    assert!(machine.poll(&mut map).is_none(), "the answer counts");
    machine.answer_miss(0);
    assert_eq!(
        machine.poll(&mut map).unwrap().unwrap_err(),
        MapError::Refused { iova: 3 * PAGE, access: Permissions::Write }
    );
}

#[test]
fn p7_memory_stays_with_who_uses_it() {
    let mut machine = Machine::started();
    machine.submit(0);
    machine.serve_misses();
    assert_eq!(machine.in_flight(), 1);
    machine.memory_table();
    machine.run();
    assert_eq!(
        (machine.answers(), machine.in_flight()),
        (0, 1),
        "who shares new memory takes the old one away"
    );
    machine.access();
    machine.run();
    assert_eq!(machine.answers(), 1);
    // And without a front-end.
    machine.serve_misses();
    machine.submit(1);
    machine.serve_misses();
    assert_eq!(machine.in_flight(), 1);
    assert!(!machine.poll_closed(), "an access is in flight");
    machine.access();
    machine.run_tasks();
    assert!(machine.poll_closed());
}

#[test]
fn p8_an_unset_queue_and_tables_of_descriptors() {
    let mut machine = Machine::started();
    machine.update(0, PAGE, 0);
    machine.invalidate(0, PAGE);
    machine.run();
    assert_eq!((machine.refused, machine.answers()), (0, 1));
    for _ in 0..20 {
        machine.submit(0);
        machine.serve_misses();
        machine.access();
        machine.serve_misses();
        machine.take_completed(0);
    }
    assert!(
        machine.tables > 0 && machine.tables < 20,
        "{} requests of 20 had a table",
        machine.tables
    );
}

#[test]
fn an_answer_waits_for_what_overlaps_and_for_nothing_else() {
    let mut machine = Machine::connected();
    machine.update(0x100 * PAGE, 16 * PAGE, 8);
    let iotlb = machine.session.iotlb().clone();
    let held = iotlb.try_map(Want::read(0x104 * PAGE, 4 * PAGE)).unwrap();
    // Beside it, in the same translation.
    machine.invalidate(0x100 * PAGE, 4 * PAGE);
    machine.invalidate(0x108 * PAGE, 8 * PAGE);
    machine.poll_session();
    assert_eq!(machine.answers(), 2);
    assert_eq!(iotlb.stats().met_in_flight, 0);
    machine.invalidate(0x107 * PAGE, PAGE);
    machine.poll_session();
    assert_eq!(machine.answers(), 0);
    assert!(iotlb.try_map(Want::read(0x107 * PAGE, 8)).is_none(), "it is forgotten already");
    assert!(iotlb.try_map(Want::read(0x106 * PAGE, 8)).is_some(), "and no more than that");
    drop(held);
    machine.poll_session();
    assert_eq!((machine.answers(), iotlb.stats().met_in_flight), (1, 1));
}

#[test]
fn answers_come_in_the_order_of_the_requests() {
    let mut machine = Machine::connected();
    machine.update(0x100 * PAGE, PAGE, 8);
    let held = machine.session.iotlb().try_map(Want::read(0x100 * PAGE, 8)).unwrap();
    machine.invalidate(0x100 * PAGE, PAGE);
    machine.update(0x200 * PAGE, PAGE, 9);
    assert_eq!(machine.answers(), 0);
    assert!(
        machine.session.iotlb().try_map(Want::read(0x200 * PAGE, 8)).is_some(),
        "what it says counts at once"
    );
    drop(held);
    machine.poll_session();
    assert_eq!(machine.answers(), 2);
}

#[test]
fn a_ring_whose_kick_is_replaced_begins_anew_where_it_was() {
    let mut machine = Machine::started();
    machine.submit(0);
    machine.serve_misses();
    machine.access();
    machine.serve_misses();
    machine.take_completed(0);
    assert_eq!(machine.rings, 2);
    machine.kick(0);
    machine.run();
    assert_eq!(machine.rings, 3);
    machine.submit(0);
    machine.serve_misses();
    machine.access();
    machine.serve_misses();
    machine.take_completed(0);
    machine.get_vring_base(0);
    machine.run();
    assert_eq!((machine.answers(), machine.last_base()), (1, 2));
}

#[test]
fn a_session_that_is_dropped_stops_its_rings() {
    let mut machine = Machine::started();
    // One of them waits for a translation.
    machine.submit(0);
    machine.run();
    assert_eq!(machine.without_session(), 0);
}

/// The next session of the same IOTLB begins without memory: translations into what another
/// front-end has shared are refused.
#[test]
fn a_session_leaves_no_memory_to_the_next_one() {
    let mut machine = Machine::started();
    let iotlb = machine.session.iotlb().clone();
    assert_eq!(iotlb.memory().regions().len(), 1);
    assert!(!machine.poll_closed());
    machine.run_tasks();
    assert!(machine.poll_closed());
    assert!(iotlb.memory().regions().is_empty());
}

/// A front-end that has closed its back-end channel may tell of translations all the same.
#[test]
fn translations_are_told_without_a_channel_to_ask_on() {
    let mut machine = Machine::connected();
    machine.session.backend_closed();
    machine.memory_table();
    assert_eq!(machine.answers(), 1);
    machine.update(9 * PAGE, PAGE, 9);
    assert_eq!(machine.refused, 0);
    let iotlb = machine.session.iotlb().clone();
    assert!(iotlb.try_map(Want::write(9 * PAGE, 8)).is_some());
    let mut map = machine.spawn(async move { iotlb.map(Want::read(10 * PAGE, 8)).await });
    assert!(matches!(machine.poll(&mut map), Some(Err(MapError::Nobody { .. }))));
}

#[test]
fn the_memory_survives_a_change_of_features_without_a_channel() {
    let mut machine = Machine::connected();
    machine.session.backend_closed();
    machine.plain(FrontendReq::SET_FEATURES, &machine::FEATURES.to_ne_bytes());
    machine.plain(FrontendReq::SET_FEATURES, &(machine::FEATURES & !(1 << 33)).to_ne_bytes());
    assert!(machine.session.iotlb().try_map(Want::read(0, 8)).is_some());
}

#[test]
fn configuration_spaces_are_short() {
    let mut machine = Machine::connected();
    let config = |offset, size: u32| {
        let head = VhostUserConfig::new(offset, size, VhostUserConfigFlags::empty());
        let payload = [head.as_slice(), &vec![0; size as usize]].concat();
        Message::new(FrontendReq::GET_CONFIG, VhostUserHeaderFlag::empty(), &payload)
    };
    machine.session.receive(Channel::Frontend, config(60, 8)).unwrap();
    for (offset, size) in [(u32::MAX, 8), (u32::MAX - 7, 8), (1 << 20, 8), (0, 0)] {
        assert!(
            machine.session.receive(Channel::Frontend, config(offset, size)).is_err(),
            "{offset} {size}"
        );
    }
}

#[test]
fn the_whole_address_space_and_ranges_that_wrap_around() {
    let mut machine = Machine::connected();
    machine.update(u64::MAX - 0xfff, PAGE, 8);
    machine.update(0, PAGE, 8);
    machine.invalidate(1 << 63, u64::MAX);
    machine.invalidate(5, 0);
    assert_eq!((machine.answers(), machine.session.iotlb().len()), (2, 1));
    machine.invalidate(0, u64::MAX);
    assert_eq!((machine.answers(), machine.session.iotlb().len()), (1, 0));
    assert_eq!(AddressRange::new(0, PAGES * PAGE).unwrap().len(), Some(PAGES * PAGE));
    assert_eq!(QUEUES, 2);
}
