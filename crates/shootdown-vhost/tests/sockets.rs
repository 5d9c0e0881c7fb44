//! Front-ends on sockets that do what QEMU does not, and sessions that are ended from this side.
#![allow(missing_docs)]

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use shootdown::AddressRange;
use shootdown_vhost::driver::{serve, serve_tokio};
use shootdown_vhost::message::{Message, iotlb_bytes, iotlb_message};
use shootdown_vhost::{Device, Iotlb, Ring, Session, Want};
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::task::Poll;
use std::thread;
use std::time::Duration;
use vhost::vhost_user::message::{
    BackendReq, FrontendReq, VhostUserHeaderFlag, VhostUserMemory, VhostUserMemoryRegion,
};
use vhost::{VhostAccess, VhostIotlbMsg, VhostIotlbType};
use vm_memory::ByteValued;

const PAGE: u64 = 0x1000;
const USER: u64 = 0x7f00_0000_0000;

#[derive(Default)]
struct Nothing(std::sync::atomic::AtomicUsize);

impl Device for Nothing {
    fn features(&self) -> u64 {
        0
    }
    fn queues(&self) -> u16 {
        1
    }
    fn config(&self) -> Vec<u8> {
        self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        Vec::new()
    }
    fn start(&self, _: Ring) {}
}

fn send(mut socket: &UnixStream, message: &Message) {
    let fds: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
    if fds.is_empty() {
        return socket.write_all(&message.bytes()).unwrap();
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(socket, &[IoSlice::new(&message.bytes())], &mut ancillary, SendFlags::empty()).unwrap();
}

fn receive(mut socket: &UnixStream) -> Option<Message> {
    let mut header = [0; 12];
    socket.read_exact(&mut header).ok()?;
    let (mut message, len) = Message::of_header(header).unwrap();
    message.payload.resize(len, 0);
    socket.read_exact(&mut message.payload).unwrap();
    Some(message)
}

fn serving(tokio: bool) -> (UnixStream, Iotlb) {
    let (frontend, backend) = UnixStream::pair().unwrap();
    let iotlb = Iotlb::default();
    let session = Session::new(Arc::new(Nothing::default()), iotlb.clone());
    thread::spawn(move || {
        if tokio {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
            runtime.block_on(serve_tokio(backend, session)).unwrap();
        } else {
            serve(backend, session).unwrap();
        }
    });
    (frontend, iotlb)
}

/// With an IOMMU, REPLY_ACK and one page of memory: its socket, its back-end channel.
fn connected(tokio: bool) -> (UnixStream, UnixStream, Iotlb) {
    let (socket, iotlb) = serving(tokio);
    let (backend, theirs) = UnixStream::pair().unwrap();
    let tell = |request: FrontendReq, payload: &[u8], fds: Vec<OwnedFd>| {
        let mut message = Message::new(request, VhostUserHeaderFlag::NEED_REPLY, payload);
        message.fds = fds;
        send(&socket, &message);
        receive(&socket).unwrap();
    };
    tell(FrontendReq::SET_PROTOCOL_FEATURES, &0x229u64.to_ne_bytes(), Vec::new());
    tell(FrontendReq::SET_BACKEND_REQ_FD, &[], vec![theirs.into()]);
    tell(FrontendReq::SET_FEATURES, &(1u64 << 30 | 1 << 32 | 1 << 33).to_ne_bytes(), Vec::new());
    let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, PAGE).unwrap();
    let region = VhostUserMemoryRegion::new(0, PAGE, USER, 0);
    tell(
        FrontendReq::SET_MEM_TABLE,
        &[VhostUserMemory::new(1).as_slice(), region.as_slice()].concat(),
        vec![file],
    );
    (socket, backend, iotlb)
}

/// A front-end that does not want its UPDATEs to be answered: it sends the UPDATE, then the answer
/// to the MISS, each on its channel.
fn update_then_answer(tokio: bool) {
    let (socket, backend, iotlb) = connected(tokio);
    thread::spawn(move || {
        while let Some(miss) = receive(&backend) {
            let iova = iotlb_message(&miss.payload).unwrap().iova & !(PAGE - 1);
            let (perm, msg_type) = (VhostAccess::ReadWrite, VhostIotlbType::Update);
            let update = VhostIotlbMsg { iova, size: PAGE, userspace_addr: USER, perm, msg_type };
            send(
                &socket,
                &Message::new(
                    FrontendReq::IOTLB_MSG,
                    VhostUserHeaderFlag::empty(),
                    &iotlb_bytes(&update),
                ),
            );
            send(
                &backend,
                &Message::new(
                    BackendReq::IOTLB_MSG,
                    VhostUserHeaderFlag::REPLY,
                    &0u64.to_ne_bytes(),
                ),
            );
        }
    });
    for turn in 0..20_000 {
        let found = iotlb.map_wait(Want::write(5 * PAGE, 8));
        assert!(found.is_ok(), "the UPDATE was there first, turn {turn}: {found:?}");
        drop(found);
        assert!(iotlb.invalidate(AddressRange::new(5 * PAGE, PAGE).unwrap()).await_now());
    }
}

trait Now {
    fn await_now(self) -> bool;
}

impl<F: Future> Now for F {
    fn await_now(self) -> bool {
        futures::FutureExt::now_or_never(self).is_some()
    }
}

#[test]
fn a_thread_hears_of_an_update_before_the_answer_that_follows_it() {
    update_then_answer(false);
}

#[test]
fn tokio_hears_of_an_update_before_the_answer_that_follows_it() {
    update_then_answer(true);
}

/// The front-end closes its back-end channel, and stays.
#[test]
fn nobody_waits_for_an_answer_when_the_back_end_channel_is_closed() {
    let (socket, backend, iotlb) = connected(false);
    let (sender, ended) = channel();
    thread::spawn(move || sender.send(iotlb.map_wait(Want::write(5 * PAGE, 8)).map(drop)));
    receive(&backend).unwrap();
    drop(backend);
    let found = ended.recv_timeout(Duration::from_secs(3));
    drop(socket);
    assert!(found.is_ok(), "it waits for ever");
}

/// One message, byte by byte, with descriptors at each byte.
#[test]
fn a_message_that_is_not_complete_holds_few_descriptors() {
    let (socket, _) = serving(false);
    let some = rustix::fs::memfd_create("some", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut message =
        Message::new(FrontendReq::GET_FEATURES, VhostUserHeaderFlag::empty(), &[0; 4000]).bytes();
    message.truncate(60);
    let fds = [some.as_fd(); 8];
    for byte in &message {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        if sendmsg(&socket, &[IoSlice::new(&[*byte])], &mut ancillary, SendFlags::NOSIGNAL).is_err()
        {
            return;
        }
    }
    // The session has closed the socket, whatever was on its way.
    let mut rest = Vec::new();
    let _ = (&socket).read_to_end(&mut rest);
    assert!(rest.is_empty());
}

/// A front-end that sends without a pause.
#[test]
fn other_tasks_of_the_runtime_have_their_turns() {
    const MESSAGES: usize = 20_000;
    let (mut socket, backend) = UnixStream::pair().unwrap();
    let session = Session::new(Arc::new(Nothing::default()), Iotlb::default());
    let (sender, turns) = channel();
    let server = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        runtime.block_on(async {
            let (done, mut turns) = (Arc::new(std::sync::atomic::AtomicBool::new(false)), 0);
            let served = tokio::spawn({
                let done = done.clone();
                async move {
                    serve_tokio(backend, session).await.unwrap();
                    done.store(true, std::sync::atomic::Ordering::SeqCst);
                }
            });
            let other = tokio::spawn(async move {
                while !done.load(std::sync::atomic::Ordering::SeqCst) {
                    // Not `yield_now`, which waits for the reactor.
                    let mut polled = false;
                    std::future::poll_fn(|cx| {
                        cx.waker().wake_by_ref();
                        if std::mem::replace(&mut polled, true) {
                            Poll::Ready(())
                        } else {
                            Poll::Pending
                        }
                    })
                    .await;
                    turns += 1;
                }
                turns
            });
            served.await.unwrap();
            let turns = other.await.unwrap();
            sender.send(turns).unwrap();
        });
    });
    let message = Message::new(FrontendReq::SET_OWNER, VhostUserHeaderFlag::empty(), &[]).bytes();
    socket.write_all(&message.repeat(MESSAGES)).unwrap();
    drop(socket);
    let turns: usize = turns.recv().unwrap();
    server.join().unwrap();
    assert!(turns >= MESSAGES / 128, "{turns} turns");
}

/// A front-end that asks, and does not read the answers.
#[test]
fn answers_that_nobody_reads_take_little_memory() {
    fn peak_kib() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
    let (mut socket, _) = serving(false);
    let message = Message::new(FrontendReq::GET_FEATURES, VhostUserHeaderFlag::empty(), &[])
        .bytes()
        .repeat(10_000);
    let before = peak_kib();
    for _ in 0..60 {
        socket.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
        if socket.write_all(&message).is_err() {
            // It is not heard any more.
            return;
        }
    }
    let grown = peak_kib() - before;
    assert!(grown < 4096, "{grown} KiB of answers");
}

/// Keeps its ring for as long as something is in flight.
#[derive(Default)]
struct Keeps(std::sync::Mutex<Option<Ring>>);

impl Device for Keeps {
    fn features(&self) -> u64 {
        0
    }
    fn queues(&self) -> u16 {
        1
    }
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }
    fn start(&self, ring: Ring) {
        *self.0.lock().unwrap() = Some(ring);
    }
}

/// A session that is ended from this side: the front-end must not see an end while something is in
/// flight, because to QEMU an INVALIDATE that fails is one that is answered.
#[test]
fn a_front_end_sees_no_end_while_something_is_in_flight() {
    let (frontend, backend) = UnixStream::pair().unwrap();
    let device = Arc::new(Keeps::default());
    let session = Session::new(device.clone(), Iotlb::default());
    let stopper = session.stopper();
    let server = thread::spawn(move || serve(backend, session));
    let tell = |request: FrontendReq, payload: &[u8], fds: Vec<OwnedFd>| {
        let mut message = Message::new(request, VhostUserHeaderFlag::NEED_REPLY, payload);
        message.fds = fds;
        send(&frontend, &message);
        receive(&frontend).unwrap();
    };
    let state =
        |num: u32| vhost::vhost_user::message::VhostUserVringState::new(0, num).as_slice().to_vec();
    let none = vhost::vhost_user::message::VhostUserVringAddrFlags::empty();
    let ring = vhost::vhost_user::message::VhostUserVringAddr::new(
        0,
        none,
        USER,
        USER + 0x800,
        USER + 0x400,
        0,
    );
    let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, PAGE).unwrap();
    let region = VhostUserMemoryRegion::new(0, PAGE, USER, 0);
    let kick = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
    tell(FrontendReq::SET_PROTOCOL_FEATURES, &0x229u64.to_ne_bytes(), Vec::new());
    tell(FrontendReq::SET_FEATURES, &(1u64 << 32).to_ne_bytes(), Vec::new());
    tell(
        FrontendReq::SET_MEM_TABLE,
        &[VhostUserMemory::new(1).as_slice(), region.as_slice()].concat(),
        vec![file],
    );
    tell(FrontendReq::SET_VRING_NUM, &state(8), Vec::new());
    tell(FrontendReq::SET_VRING_ADDR, ring.as_slice(), Vec::new());
    tell(FrontendReq::SET_VRING_KICK, &0u64.to_ne_bytes(), vec![kick]);
    assert!(device.0.lock().unwrap().is_some());
    stopper.stop();
    let (perm, msg_type) = (VhostAccess::No, VhostIotlbType::Invalidate);
    let invalidate = VhostIotlbMsg { iova: 0, size: PAGE, userspace_addr: 0, perm, msg_type };
    // It is heard, and answered, as long as there is a ring.
    tell(FrontendReq::IOTLB_MSG, &iotlb_bytes(&invalidate), Vec::new());
    assert!(device.0.lock().unwrap().take().is_some(), "the ring");
    server.join().unwrap().unwrap();
    assert!(receive(&frontend).is_none(), "then the connection is closed");
}

/// Sends `message` over and over, and reads nothing, until the back-end listens no more. Says how
/// often it was sent.
fn flood(socket: &UnixStream, message: &Message, most: usize) -> usize {
    let bytes = message.bytes();
    socket.set_nonblocking(true).unwrap();
    let mut sent = 0;
    let mut tries = 0;
    while sent < most && tries < 40 {
        match (&*socket).write(&bytes) {
            Ok(len) => {
                assert_eq!(len, bytes.len());
                (sent, tries) = (sent + 1, 0);
            }
            Err(_) => {
                thread::park_timeout(Duration::from_millis(10));
                tries += 1;
            }
        }
    }
    socket.set_nonblocking(false).unwrap();
    sent
}

/// A session that is ended from this side, to a front-end that reads slowly.
fn all_that_was_heard_is_answered(tokio: bool) {
    use std::sync::atomic::Ordering;
    let (socket, theirs) = UnixStream::pair().unwrap();
    let device = Arc::new(Nothing::default());
    let session = Session::new(device.clone(), Iotlb::default());
    let stopper = session.stopper();
    let server = thread::spawn(move || {
        if tokio {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
            runtime.block_on(serve_tokio(theirs, session)).unwrap();
        } else {
            serve(theirs, session).unwrap();
        }
    });
    let config =
        [0u32, 8, 0].into_iter().flat_map(u32::to_ne_bytes).chain([0; 8]).collect::<Vec<_>>();
    let question = Message::new(FrontendReq::GET_CONFIG, VhostUserHeaderFlag::empty(), &config);
    flood(&socket, &question, 100_000);
    stopper.stop();
    // It reads a little later.
    thread::park_timeout(Duration::from_millis(300));
    let mut answers = Vec::new();
    let mut part = vec![0; 1 << 16];
    // Whatever comes before the end.
    while let Ok(read @ 1..) = (&socket).read(&mut part) {
        answers.extend_from_slice(&part[..read]);
    }
    server.join().unwrap();
    let (heard, len) = (device.0.load(Ordering::SeqCst), 12 + config.len());
    assert_eq!(
        (answers.len() / len, answers.len() % len),
        (heard, 0),
        "answers, and bytes of the next one"
    );
}

#[test]
fn v5_a_thread_that_is_stopped_answers_all_it_has_heard() {
    all_that_was_heard_is_answered(false);
}

#[test]
fn v5_tokio_that_is_stopped_answers_all_it_has_heard() {
    all_that_was_heard_is_answered(true);
}

/// An INVALIDATE waits for a request that takes its time; all that is asked after it has an answer
/// due.
#[test]
fn v7_answers_that_wait_for_another_one_are_bounded() {
    let (socket, _backend, iotlb) = connected(false);
    let (perm, msg_type) = (VhostAccess::ReadWrite, VhostIotlbType::Update);
    let update = VhostIotlbMsg { iova: 5 * PAGE, size: PAGE, userspace_addr: USER, perm, msg_type };
    send(
        &socket,
        &Message::new(
            FrontendReq::IOTLB_MSG,
            VhostUserHeaderFlag::NEED_REPLY,
            &iotlb_bytes(&update),
        ),
    );
    receive(&socket).unwrap();
    let _held = iotlb.map_wait(Want::write(5 * PAGE, 8)).unwrap();
    let (perm, msg_type) = (VhostAccess::No, VhostIotlbType::Invalidate);
    let invalidate =
        VhostIotlbMsg { iova: 5 * PAGE, size: PAGE, userspace_addr: 0, perm, msg_type };
    let message = Message::new(
        FrontendReq::IOTLB_MSG,
        VhostUserHeaderFlag::NEED_REPLY,
        &iotlb_bytes(&invalidate),
    );
    send(&socket, &message);
    // Each has an answer of 20 bytes; the socket takes a few thousand questions that nobody hears.
    let most = 60_000;
    let sent = flood(
        &socket,
        &Message::new(FrontendReq::GET_FEATURES, VhostUserHeaderFlag::empty(), &[]),
        most,
    );
    assert!(sent < most, "{sent} answers are due, and more are listened to");
}
