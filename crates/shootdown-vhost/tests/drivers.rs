//! Sessions on real sockets, driven by a thread and by a task of tokio: against the front-end of
//! the `vhost` crate, and against one with an IOMMU that does one thing after the other.
#![allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    reason = "a test that shares a module with the schedules"
)]

#[path = "schedules/guest.rs"]
mod guest;

use guest::{Guest, PAGE, PAGES, QUEUES, SIZE, USER, ring_iova};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use shootdown_vhost::driver::{ServeError, serve, serve_tokio};
use shootdown_vhost::message::{Message, iotlb_bytes, iotlb_message};
use shootdown_vhost::{Device, Iotlb, Ring, Session};
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use vhost::VhostBackend;
use vhost::vhost_user::message::{
    BackendReq, FrontendReq, VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserMemory,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserVringAddr, VhostUserVringAddrFlags,
    VhostUserVringState,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostAccess, VhostIotlbMsg, VhostIotlbType, VhostUserMemoryRegionInfo};
use vm_memory::ByteValued;

/// Copies the token of a request all over its buffer.
struct Echo;

impl Device for Echo {
    fn features(&self) -> u64 {
        1 << 6
    }

    fn queues(&self) -> u16 {
        QUEUES
    }

    fn config(&self) -> Vec<u8> {
        (0..60).collect()
    }

    fn start(&self, mut ring: Ring) {
        thread::spawn(move || {
            while let Some(chain) = ring.next_wait().unwrap() {
                let mut token = [0; 8];
                chain.readable().read(0, &mut token).unwrap();
                let len = chain.writable().len();
                chain.writable().write(0, &token.repeat(len / 8)).unwrap();
                chain.complete_wait(u32::try_from(len).unwrap()).unwrap();
            }
        });
    }
}

#[derive(Clone, Copy, Debug)]
enum Driver {
    Thread,
    Tokio,
}

/// Serves one session; its end comes through the channel.
fn serving(driver: Driver) -> (UnixStream, Iotlb, Receiver<Result<(), ServeError>>) {
    let (frontend, backend) = UnixStream::pair().unwrap();
    let (sender, receiver) = channel();
    let iotlb = Iotlb::default();
    let session = Session::new(Arc::new(Echo), iotlb.clone());
    thread::spawn(move || {
        let ended = match driver {
            Driver::Thread => serve(backend, session),
            Driver::Tokio => {
                let runtime =
                    tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
                runtime.block_on(serve_tokio(backend, session))
            }
        };
        sender.send(ended).unwrap();
    });
    (frontend, iotlb, receiver)
}

fn with_the_vhost_crate(driver: Driver) {
    let (socket, _, ended) = serving(driver);
    let mut frontend = Frontend::from_stream(socket, u64::from(QUEUES));
    let offered = frontend.get_features().unwrap();
    for bit in [6, 28, 29, 30, 32, 33] {
        assert!(offered & 1 << bit != 0, "feature {bit}");
    }
    assert_eq!(offered & 1 << 34, 0, "packed rings");
    let protocol = frontend.get_protocol_features().unwrap();
    let expected = VhostUserProtocolFeatures::from_bits_truncate(0x229);
    assert_eq!(protocol, expected);
    frontend.set_protocol_features(protocol).unwrap();
    assert_eq!(frontend.get_queue_num().unwrap(), u64::from(QUEUES));
    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    frontend.set_owner().unwrap();
    // Without an IOMMU.
    frontend.set_features(1 << 30 | 1 << 32).unwrap();
    let (_, config) = frontend.get_config(4, 8, VhostUserConfigFlags::empty(), &[0; 8]).unwrap();
    assert_eq!(config, (4..12).collect::<Vec<u8>>());
    assert!(
        frontend.set_config(4, VhostUserConfigFlags::WRITABLE, &[1; 4]).is_err(),
        "it is not to be written"
    );
    let mut random = SmallRng::seed_from_u64(1);
    let mut guest = Guest::new(&mut random, false);
    guest.identity();
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: PAGES * PAGE,
        userspace_addr: USER,
        mmap_offset: 0,
        mmap_handle: guest.file.as_raw_fd(),
    };
    frontend.set_mem_table(&[region]).unwrap();
    let [kick, call] = [0, 0].map(|_| vmm_sys_util::eventfd::EventFd::new(0).unwrap());
    frontend.set_vring_num(0, SIZE).unwrap();
    assert!(frontend.set_vring_num(0, 3).is_err(), "no power of two");
    let [desc_table_addr, avail_ring_addr, used_ring_addr] =
        [0, 1, 2].map(|page| USER + page * PAGE);
    let (queue_max_size, queue_size, flags, log_addr) = (SIZE, SIZE, 0, None);
    let addresses = vhost::VringConfigData {
        queue_max_size,
        queue_size,
        flags,
        desc_table_addr,
        used_ring_addr,
        avail_ring_addr,
        log_addr,
    };
    frontend.set_vring_addr(0, &addresses).unwrap();
    frontend.set_vring_base(0, 0).unwrap();
    frontend.set_vring_call(0, &call).unwrap();
    frontend.set_vring_kick(0, &kick).unwrap();
    frontend.set_vring_enable(0, true).unwrap();
    for _ in 0..3 {
        assert!(guest.submit(0, &mut random));
        kick.write(1).unwrap();
        // Blocks until the driver is called.
        call.read().unwrap();
        let request = guest.completed(0).unwrap().expect("it is complete");
        guest.give_back(&request.pages);
    }
    assert_eq!(frontend.get_vring_base(0).unwrap(), 3);
    drop(frontend);
    ended.recv().unwrap().unwrap();
}

/// A front-end with an IOMMU that reads and writes its sockets one message at a time.
struct Plain {
    socket: UnixStream,
    backend: UnixStream,
    guest: Guest,
}

fn send(socket: &UnixStream, message: &Message) {
    let fds: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    let bytes = message.bytes();
    // In two parts: what reads it has to put them together.
    let (head, tail) = bytes.split_at(5);
    sendmsg(socket, &[IoSlice::new(head)], &mut ancillary, SendFlags::empty()).unwrap();
    (&*socket).write_all(tail).unwrap();
}

fn receive(mut socket: &UnixStream) -> Message {
    let mut header = [0; 12];
    socket.read_exact(&mut header).unwrap();
    let (mut message, len) = Message::of_header(header).unwrap();
    message.payload.resize(len, 0);
    socket.read_exact(&mut message.payload).unwrap();
    message
}

impl Plain {
    fn tell(&self, request: FrontendReq, payload: &[u8], fds: Vec<OwnedFd>) {
        let mut message = Message::new(request, VhostUserHeaderFlag::empty(), payload);
        message.fds = fds;
        send(&self.socket, &message);
    }

    fn ask(&self, request: FrontendReq, payload: &[u8], fds: Vec<OwnedFd>) -> u64 {
        let mut message = Message::new(request, VhostUserHeaderFlag::NEED_REPLY, payload);
        message.fds = fds;
        send(&self.socket, &message);
        u64::from_ne_bytes(receive(&self.socket).payload.try_into().unwrap())
    }

    fn iotlb(&self, msg_type: VhostIotlbType, iova: u64, size: u64, userspace_addr: u64) {
        let message =
            VhostIotlbMsg { iova, size, userspace_addr, perm: VhostAccess::ReadWrite, msg_type };
        assert_eq!(self.ask(FrontendReq::IOTLB_MSG, &iotlb_bytes(&message), Vec::new()), 0);
    }

    /// Serves one miss.
    fn serve(&self) {
        let miss = iotlb_message(&receive(&self.backend).payload).unwrap();
        let page = self.guest.table[&(miss.iova / PAGE)];
        self.iotlb(VhostIotlbType::Update, miss.iova & !(PAGE - 1), PAGE, USER + page * PAGE);
        let answer =
            Message::new(BackendReq::IOTLB_MSG, VhostUserHeaderFlag::REPLY, &0u64.to_ne_bytes());
        send(&self.backend, &answer);
    }

    /// Serves misses until the driver is called.
    fn serve_until_called(&self, call: &OwnedFd) {
        loop {
            use rustix::event::{PollFd, PollFlags, poll};
            let mut fds =
                [PollFd::new(call, PollFlags::IN), PollFd::new(&self.backend, PollFlags::IN)];
            poll(&mut fds, None).unwrap();
            if fds[1].revents().contains(PollFlags::IN) {
                self.serve();
            } else if fds[0].revents().contains(PollFlags::IN) {
                rustix::io::read(call, &mut [0; 8]).unwrap();
                return;
            }
        }
    }
}

fn with_an_iommu(driver: Driver) {
    let (socket, iotlb, ended) = serving(driver);
    let (backend, theirs) = UnixStream::pair().unwrap();
    let mut random = SmallRng::seed_from_u64(1);
    let mut frontend = Plain { socket, backend, guest: Guest::new(&mut random, false) };
    frontend.tell(FrontendReq::SET_PROTOCOL_FEATURES, &0x229u64.to_ne_bytes(), Vec::new());
    assert_eq!(frontend.ask(FrontendReq::SET_BACKEND_REQ_FD, &[], vec![theirs.into()]), 0);
    frontend.tell(
        FrontendReq::SET_FEATURES,
        &(1u64 << 30 | 1 << 32 | 1 << 33 | 1 << 28).to_ne_bytes(),
        Vec::new(),
    );
    let region = VhostUserMemoryRegion::new(0, PAGES * PAGE, USER, 0);
    let payload = [VhostUserMemory::new(1).as_slice(), region.as_slice()].concat();
    assert_eq!(
        frontend.ask(
            FrontendReq::SET_MEM_TABLE,
            &payload,
            vec![frontend.guest.file.try_clone().unwrap()]
        ),
        0
    );
    let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    let (kick, call) = (event(), event());
    let state = |num: u16| VhostUserVringState::new(0, u32::from(num)).as_slice().to_vec();
    let [descriptors, available, used] = [0, 1, 2].map(|part| ring_iova(0, part));
    let addresses = VhostUserVringAddr::new(
        0,
        VhostUserVringAddrFlags::empty(),
        descriptors,
        used,
        available,
        0,
    );
    frontend.tell(FrontendReq::SET_VRING_NUM, &state(SIZE), Vec::new());
    frontend.tell(FrontendReq::SET_VRING_ADDR, addresses.as_slice(), Vec::new());
    frontend.tell(
        FrontendReq::SET_VRING_CALL,
        &0u64.to_ne_bytes(),
        vec![call.try_clone().unwrap()],
    );
    frontend.tell(
        FrontendReq::SET_VRING_KICK,
        &0u64.to_ne_bytes(),
        vec![kick.try_clone().unwrap()],
    );
    frontend.tell(FrontendReq::SET_VRING_ENABLE, &state(1), Vec::new());
    for _ in 0..10 {
        assert!(frontend.guest.submit(0, &mut random));
        rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
        frontend.serve_until_called(&call);
        let request = frontend.guest.completed(0).unwrap().expect("it is complete");
        request
            .pages
            .iter()
            .for_each(|(iova, _)| frontend.iotlb(VhostIotlbType::Invalidate, iova * PAGE, PAGE, 0));
        frontend.guest.give_back(&request.pages);
        frontend.guest.check().unwrap();
    }
    let stats = iotlb.stats();
    assert!(stats.misses >= 23 && stats.invalidates >= 20, "{stats:?}");
    // It goes away without a word.
    drop(frontend);
    ended.recv().unwrap().unwrap();
    assert_eq!(iotlb.domain().space().len(), 0);
}

#[test]
fn a_thread_and_the_front_end_of_vhost() {
    with_the_vhost_crate(Driver::Thread);
}

#[test]
fn tokio_and_the_front_end_of_vhost() {
    with_the_vhost_crate(Driver::Tokio);
}

#[test]
fn a_thread_and_a_front_end_with_an_iommu() {
    with_an_iommu(Driver::Thread);
}

#[test]
fn tokio_and_a_front_end_with_an_iommu() {
    with_an_iommu(Driver::Tokio);
}

#[test]
fn what_is_no_message_ends_the_session() {
    for driver in [Driver::Thread, Driver::Tokio] {
        let (mut socket, _, ended) = serving(driver);
        socket.write_all(&[1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        let error = ended.recv().unwrap().unwrap_err();
        assert!(matches!(error, ServeError::Protocol(_)), "{error}");
        assert_eq!(
            error.to_string(),
            "the front-end: a message of version 2 of the protocol; this is version 1"
        );
    }
}
