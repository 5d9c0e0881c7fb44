//! Limits of rings, bases in their order, descriptors that block.

use crate::guest::{PAGE, USER};
use crate::machine::Machine;
use crate::support::*;
use futures::FutureExt;
use futures::task::noop_waker;
use rustix::event::{EventfdFlags, eventfd};
use shootdown::AddressRange;
use shootdown_vhost::message::Channel;
use shootdown_vhost::{
    Iotlb, MapError, Next, Output, Permissions, Place, Ring, RingError, Session, Want,
};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::task::{Context, Poll};
use std::thread;
use std::time::Duration;
use vhost::vhost_user::message::{
    FrontendReq, VhostUserMemory, VhostUserMemoryRegion, VhostUserVringAddr,
    VhostUserVringAddrFlags,
};
use vm_memory::ByteValued;

/// A ring of 8 without an IOMMU. Descriptor 0 is 8 bytes that the device reads.
fn ring(kick: OwnedFd, call: OwnedFd) -> (Session<Keeps>, Ring, OwnedFd) {
    let device = Arc::new(Keeps::default());
    let mut session = Session::new(device.clone(), Iotlb::default());
    let waker = noop_waker();
    let (_, file) = memory_of(8, 0, USER);
    let region = VhostUserMemoryRegion::new(0, 8 * PAGE, USER, 0);
    let payload = [VhostUserMemory::new(1).as_slice(), region.as_slice()].concat();
    let none = VhostUserVringAddrFlags::empty();
    let at = VhostUserVringAddr::new(0, none, USER, USER + 2 * PAGE, USER + PAGE, 0);
    rustix::io::pwrite(&file, &descriptor(3 * PAGE, 8, 0, 0), 0).unwrap();
    let messages = vec![
        with_fds(FrontendReq::SET_FEATURES, &(1u64 << 32).to_ne_bytes(), vec![]),
        with_fds(FrontendReq::SET_MEM_TABLE, &payload, vec![file.try_clone().unwrap()]),
        with_fds(FrontendReq::SET_VRING_NUM, &state(0, 8), vec![]),
        with_fds(FrontendReq::SET_VRING_ADDR, at.as_slice(), vec![]),
        with_fds(FrontendReq::SET_VRING_CALL, &0u64.to_ne_bytes(), vec![call]),
        with_fds(FrontendReq::SET_VRING_KICK, &0u64.to_ne_bytes(), vec![kick]),
    ];
    for message in messages {
        session.receive(Channel::Frontend, message).unwrap();
        while session.poll_output(&mut Context::from_waker(&waker)).is_ready() {}
    }
    let ring = device.0.lock().unwrap().pop().expect("it runs");
    (session, ring, file)
}

fn make_available(file: &OwnedFd, index: u16) {
    rustix::io::pwrite(file, &index.to_le_bytes(), PAGE + 2).unwrap();
}

/// A guest that never waits for the used ring, and a device that takes its time: a ring of 8 has 8
/// descriptors, so more than 8 requests in flight are none.
#[test]
fn v7_no_more_requests_are_in_flight_than_the_ring_has_descriptors() {
    let (_session, mut ring, file) = ring(fd(), fd());
    let mut held = Vec::new();
    for index in 1..=1000 {
        make_available(&file, index);
        match ring.next().now_or_never() {
            Some(Ok(Next::Chain(chain))) => held.push(chain),
            other => {
                assert!(matches!(other, Some(Err(RingError::Ahead(_)))), "{other:?}");
                break;
            }
        }
    }
    assert!(held.len() <= 8, "{} requests of a ring of 8, each with its mappings", held.len());
    assert!(
        matches!(ring.next().now_or_never(), Some(Ok(Next::Stopping))),
        "it takes nothing any more"
    );
}

/// The same, 65,536 apart: one entry stands for two requests.
#[test]
fn v4_a_request_that_is_given_up_is_taken_again_whatever_else_was_in_flight() {
    let (mut session, mut ring, file) = ring(fd(), fd());
    make_available(&file, 1);
    let Some(Ok(Next::Chain(_first))) = ring.next().now_or_never() else { panic!() };
    let mut lost = None;
    for index in 2..=65_537u32 {
        make_available(&file, index as u16);
        match ring.next().now_or_never() {
            Some(Ok(Next::Chain(chain))) if index == 65_537 => lost = Some(chain),
            Some(Ok(Next::Chain(chain))) => chain.complete(0).now_or_never().unwrap().unwrap(),
            Some(Err(RingError::Ahead(_))) => return,
            other => panic!("{other:?}"),
        }
    }
    // Has entry 0, too. The first is done; the other one is given up.
    _first.complete(0).now_or_never().unwrap().unwrap();
    drop((lost, ring));
    session
        .receive(Channel::Frontend, with_fds(FrontendReq::GET_VRING_BASE, &state(0, 0), vec![]))
        .unwrap();
    let waker = noop_waker();
    let Poll::Ready(Output::Send(_, answer)) =
        session.poll_output(&mut Context::from_waker(&waker))
    else {
        panic!()
    };
    assert_eq!(answer.payload[4..], 0u32.to_ne_bytes(), "it is not taken again");
}

/// An eventfd that blocks, and is full: nobody but the front-end could read it, and that has gone.
#[test]
fn v5_a_call_that_blocks_does_not_keep_the_session() {
    let call = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let (mut session, mut ring, file) = ring(fd(), call.try_clone().unwrap());
    make_available(&file, 1);
    let Some(Ok(Next::Chain(chain))) = ring.next().now_or_never() else { panic!() };
    let (sender, ended) = channel();
    let device = thread::spawn(move || {
        let told = chain.complete_wait(0);
        drop(ring);
        sender.send(told).unwrap();
    });
    let told = ended.recv_timeout(Duration::from_secs(2));
    let waker = noop_waker();
    let closed = session.poll_closed(&mut Context::from_waker(&waker)).is_ready();
    // So that the thread ends.
    rustix::io::read(&call, &mut [0; 8]).unwrap();
    device.join().unwrap();
    assert!(
        told.is_ok() && closed,
        "the device's thread is in write(2): {told:?}, closed: {closed}"
    );
}

fn on_cpu() -> Duration {
    let all = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(all.split_whitespace().next().unwrap().parse().unwrap())
}

fn waits_idly(kick: OwnedFd) -> Duration {
    let (session, mut ring, _file) = ring(kick, fd());
    let (sender, started) = channel();
    let device = thread::spawn(move || {
        let before = on_cpu();
        sender.send(()).unwrap();
        assert!(ring.next_wait().unwrap().is_none());
        on_cpu() - before
    });
    started.recv().unwrap();
    // Nothing is to happen.
    thread::park_timeout(Duration::from_millis(600));
    drop(session);
    device.join().unwrap()
}

/// A pipe whose other end is closed.
#[test]
fn v7_a_thread_that_waits_for_a_kick_that_cannot_come_does_not_spin() {
    let idle = waits_idly(fd());
    let (read, write) = std::io::pipe().unwrap();
    drop(write);
    let busy = waits_idly(read.into());
    assert!(
        busy < Duration::from_millis(200),
        "{busy:?} on the processor within 0.6 s; with an eventfd {idle:?}"
    );
}

/// Few bytes in many pages: a chain may have 32,768 + 4,096 descriptors, each with two pages.
#[test]
fn v3_many_small_ranges_of_more_translations_than_there_can_be_are_refused_some_day() {
    let mut machine = Machine::connected();
    let (region, _file) = memory_of(1, 0, 1 << 41);
    let pages = 73_728;
    let iotlb = machine.session.iotlb().clone();
    let other = iotlb.clone();
    let wants: Vec<_> = (0..pages / 2).map(|at| Want::read(2 * at * PAGE + PAGE - 1, 2)).collect();
    let mut map = machine.spawn(async move { other.map_all(&wants).await.map(drop) });
    for _ in 0..8 {
        if machine.poll(&mut map).is_some() {
            return;
        }
        machine.poll_session();
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

/// An INVALIDATE tells of a page, too: the guest maps another one there afterwards.
#[test]
fn v3_a_refusal_from_before_an_invalidate_concerns_nobody_who_asks_after_it() {
    let mut machine = Machine::connected();
    let iotlb = machine.session.iotlb().clone();
    let other = iotlb.clone();
    let mut map = machine.spawn(async move { iotlb.map(Want::write(9 * PAGE, 8)).await });
    assert!(machine.poll(&mut map).is_none());
    machine.poll_session();
    drop(map);
    // The front-end has looked, and refuses; its answer is on its way. The guest unmaps and maps.
    machine.invalidate(9 * PAGE, PAGE);
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

/// The second of two questions for the base comes before the new base.
#[test]
fn v6_a_base_that_is_set_later_is_not_answered_before() {
    let mut machine = Machine::started();
    machine.submit(0);
    machine.serve_misses();
    machine.get_vring_base(0);
    machine.get_vring_base(0);
    machine.plain(FrontendReq::SET_VRING_BASE, &state(0, 5));
    machine.access();
    machine.run();
    assert_eq!(machine.answers(), 2);
    assert_eq!(machine.last_base(), 1, "the answer has what was said after the question");
}

/// A base that is set while the ring ends, then asked for.
#[test]
fn v6_a_base_that_is_set_earlier_is_what_is_answered() {
    let mut machine = Machine::started();
    machine.submit(0);
    machine.serve_misses();
    machine.plain(FrontendReq::SET_VRING_ENABLE, &state(0, 0));
    machine.plain(FrontendReq::SET_VRING_BASE, &state(0, 5));
    machine.get_vring_base(0);
    machine.access();
    machine.run();
    assert_eq!(
        machine.last_base(),
        5,
        "the next ring begins at 5, and the front-end was told otherwise"
    );
}

/// V2: "a ring that stops waits for no translation". Without REPLY_ACK a refusal has no answer.
#[test]
fn v2_a_session_that_is_stopped_waits_for_no_translation() {
    let mut machine = Machine::started();
    machine.submit(0);
    machine.serve_misses();
    machine.plain(FrontendReq::SET_PROTOCOL_FEATURES, &0x221u64.to_ne_bytes());
    machine.access();
    machine.run();
    machine.session.stopper().stop();
    let waker = noop_waker();
    for _ in 0..5 {
        while let Poll::Ready(output) =
            machine.session.poll_output(&mut Context::from_waker(&waker))
        {
            if let Output::Close = output {
                return;
            }
        }
        machine.run_tasks();
    }
    panic!("it waits for the used ring's translation for ever");
}

/// What came on the channel before it was found to be closed.
#[test]
fn v6_an_answer_that_was_there_before_the_channel_closed_is_no_error() {
    let mut machine = Machine::connected();
    let iotlb = machine.session.iotlb().clone();
    let mut map = machine.spawn(async move { iotlb.map(Want::write(9 * PAGE, 8)).await });
    assert!(machine.poll(&mut map).is_none());
    machine.poll_session();
    machine.session.backend_closed();
    let done = machine.session.receive(Channel::Backend, answer(1));
    assert!(done.is_ok(), "the session is over: {done:?}");
}

/// The device has dropped its ring by itself, and the session has not been polled since: nobody
/// wakes it.
#[test]
fn v4_a_queue_without_a_ring_takes_its_base() {
    let (mut session, ring, _file) = ring(fd(), fd());
    drop(ring);
    let waker = noop_waker();
    for (request, num) in [(FrontendReq::SET_VRING_BASE, 5), (FrontendReq::GET_VRING_BASE, 0)] {
        session.receive(Channel::Frontend, with_fds(request, &state(0, num), vec![])).unwrap();
        while let Poll::Ready(Output::Send(_, answer)) =
            session.poll_output(&mut Context::from_waker(&waker))
        {
            assert_eq!(answer.payload[4..], 5u32.to_ne_bytes(), "refused: the ring runs, it says");
        }
    }
}
