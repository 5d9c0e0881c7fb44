//! A session that a test is the front-end of.

use crate::device::{self, Hardware};
use crate::guest::{Guest, PAGE, PAGES, QUEUES, SIZE, USER, ring_iova};
use futures::future::BoxFuture;
use futures::task::noop_waker;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rustix::event::{EventfdFlags, eventfd};
use shootdown::Timeline;
use shootdown_vhost::message::{Channel, Message, iotlb_bytes, iotlb_message};
use shootdown_vhost::{Iotlb, Output, Permissions, Session};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::{Context, Poll};
use vhost::vhost_user::message::{
    BackendReq, FrontendReq, VhostUserHeaderFlag, VhostUserMemory, VhostUserMemoryRegion,
    VhostUserVringAddr, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::{VhostAccess, VhostIotlbMsg, VhostIotlbType};
use vm_memory::ByteValued;

/// VERSION_1, ACCESS_PLATFORM, PROTOCOL_FEATURES, INDIRECT_DESC.
pub const FEATURES: u64 = 1 << 32 | 1 << 33 | 1 << 30 | 1 << 28;
pub const FOREIGN: u64 = 0xfefe_fefe_fefe_fefe;

pub struct Machine {
    pub session: Session<Hardware>,
    pub guest: Guest,
    pub misses: Vec<Message>,
    pub refused: usize,
    /// Requests whose descriptors were in a table of their own.
    pub tables: usize,
    /// Rings that were started.
    pub rings: usize,
    hardware: Arc<Hardware>,
    tasks: Vec<BoxFuture<'static, ()>>,
    answers: Vec<Message>,
    base: u32,
    random: SmallRng,
    kicks: u64,
}

fn fd() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn state(queue: u16, num: u32) -> Vec<u8> {
    VhostUserVringState::new(u32::from(queue), num).as_slice().to_vec()
}

impl Machine {
    /// Its rings are not set up.
    pub fn connected() -> Self {
        let mut random = SmallRng::seed_from_u64(3);
        let guest = Guest::new(&mut random, false);
        let kicks = (0..QUEUES).map(|_| Timeline::new()).collect();
        let hardware = Arc::new(Hardware { kicks, ..Hardware::default() });
        let session = Session::new(hardware.clone(), Iotlb::default());
        let (misses, tasks, answers) = (Vec::new(), Vec::new(), Vec::new());
        let (refused, tables, rings, base, kicks) = (0, 0, 0, 0, 0);
        let mut machine = Self {
            session,
            guest,
            misses,
            refused,
            tables,
            rings,
            hardware,
            tasks,
            answers,
            base,
            random,
            kicks,
        };
        machine.plain(FrontendReq::SET_PROTOCOL_FEATURES, &0x229u64.to_ne_bytes());
        machine.with_fds(FrontendReq::SET_BACKEND_REQ_FD, &[], vec![fd()]);
        machine.plain(FrontendReq::SET_FEATURES, &FEATURES.to_ne_bytes());
        machine.memory_table();
        assert_eq!(machine.answers(), 1);
        machine
    }

    pub fn started() -> Self {
        let mut machine = Self::connected();
        machine.start_rings();
        machine.run();
        machine.serve_misses();
        machine
    }

    fn receive(&mut self, channel: Channel, message: Message) {
        self.session.receive(channel, message).unwrap();
        self.poll_session();
    }

    pub fn plain(&mut self, request: FrontendReq, payload: &[u8]) {
        self.receive(
            Channel::Frontend,
            Message::new(request, VhostUserHeaderFlag::empty(), payload),
        );
    }

    fn asking(&mut self, request: FrontendReq, payload: &[u8]) {
        self.receive(
            Channel::Frontend,
            Message::new(request, VhostUserHeaderFlag::NEED_REPLY, payload),
        );
    }

    fn with_fds(&mut self, request: FrontendReq, payload: &[u8], fds: Vec<OwnedFd>) {
        let mut message = Message::new(request, VhostUserHeaderFlag::empty(), payload);
        message.fds = fds;
        self.receive(Channel::Frontend, message);
    }

    pub fn memory_table(&mut self) {
        let region = VhostUserMemoryRegion::new(0, PAGES * PAGE, USER, 0);
        let payload = [VhostUserMemory::new(1).as_slice(), region.as_slice()].concat();
        let mut message =
            Message::new(FrontendReq::SET_MEM_TABLE, VhostUserHeaderFlag::NEED_REPLY, &payload);
        message.fds = vec![self.guest.file.try_clone().unwrap()];
        self.receive(Channel::Frontend, message);
    }

    pub fn start_rings(&mut self) {
        self.start_rings_at(0);
    }

    /// The rings go on at this entry.
    pub fn start_rings_at(&mut self, base: u32) {
        for queue in 0..QUEUES {
            let [descriptors, available, used] = [0, 1, 2].map(|part| ring_iova(queue, part));
            let none = VhostUserVringAddrFlags::empty();
            let addresses =
                VhostUserVringAddr::new(u32::from(queue), none, descriptors, used, available, 0);
            self.plain(FrontendReq::SET_VRING_NUM, &state(queue, u32::from(SIZE)));
            self.plain(FrontendReq::SET_VRING_BASE, &state(queue, base));
            self.plain(FrontendReq::SET_VRING_ADDR, addresses.as_slice());
            self.with_fds(FrontendReq::SET_VRING_CALL, &u64::from(queue).to_ne_bytes(), vec![fd()]);
            self.with_fds(FrontendReq::SET_VRING_KICK, &u64::from(queue).to_ne_bytes(), vec![fd()]);
            self.plain(FrontendReq::SET_VRING_ENABLE, &state(queue, 1));
        }
    }

    pub fn get_vring_base(&mut self, queue: u16) {
        self.plain(FrontendReq::GET_VRING_BASE, &state(queue, 0));
    }

    pub fn last_base(&self) -> u32 {
        self.base
    }

    pub fn invalidate(&mut self, iova: u64, size: u64) {
        let (userspace_addr, perm) = (0xdead_beef, VhostAccess::No);
        let message = VhostIotlbMsg {
            iova,
            size,
            userspace_addr,
            perm,
            msg_type: VhostIotlbType::Invalidate,
        };
        self.asking(FrontendReq::IOTLB_MSG, &iotlb_bytes(&message));
    }

    /// `size` bytes at `iova` are the guest's memory from page `page` on.
    pub fn update(&mut self, iova: u64, size: u64, page: u64) {
        self.update_for(iova, size, page, Permissions::ReadWrite);
    }

    pub fn update_for(&mut self, iova: u64, size: u64, page: u64, access: Permissions) {
        let perm = if access == Permissions::Read {
            VhostAccess::ReadOnly
        } else {
            VhostAccess::ReadWrite
        };
        let message = VhostIotlbMsg {
            iova,
            size,
            userspace_addr: USER + page * PAGE,
            perm,
            msg_type: VhostIotlbType::Update,
        };
        self.asking(FrontendReq::IOTLB_MSG, &iotlb_bytes(&message));
        // Its own answer, unless another one is due before.
        if self.session.due() == 0 {
            let last = self.answers.pop().unwrap();
            self.refused += usize::from(last.payload != 0u64.to_ne_bytes());
        }
    }

    /// How many answers have come since the last question.
    pub fn answers(&mut self) -> usize {
        std::mem::take(&mut self.answers).len()
    }

    pub fn poll_session(&mut self) {
        let waker = noop_waker();
        while let Poll::Ready(output) = self.session.poll_output(&mut Context::from_waker(&waker)) {
            match output {
                Output::Open(_) | Output::Close => {}
                Output::Send(Channel::Backend, message) => self.misses.push(message),
                Output::Send(Channel::Frontend, message) => {
                    if message.request == u32::from(FrontendReq::GET_VRING_BASE) {
                        self.base = u32::from_ne_bytes(message.payload[4..].try_into().unwrap());
                    }
                    self.answers.push(message);
                }
            }
        }
        let started = std::mem::take(&mut *self.hardware.started.lock().unwrap());
        self.rings += started.len();
        self.tasks.extend(started.into_iter().map(|ring| -> BoxFuture<'static, ()> {
            Box::pin(device::run(self.hardware.clone(), ring))
        }));
    }

    pub fn run_tasks(&mut self) {
        let waker = noop_waker();
        for _ in 0..20 {
            self.tasks.retain_mut(|task| {
                task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending()
            });
        }
    }

    /// Lets everything go as far as it can; no miss is served.
    pub fn run(&mut self) {
        for _ in 0..5 {
            self.run_tasks();
            self.poll_session();
        }
    }

    /// A new descriptor for the kicks of a queue.
    pub fn kick(&mut self, queue: u16) {
        self.with_fds(FrontendReq::SET_VRING_KICK, &u64::from(queue).to_ne_bytes(), vec![fd()]);
    }

    /// The session is dropped, without a word. How many rings are left?
    pub fn without_session(self) -> usize {
        let Self { session, mut tasks, .. } = self;
        drop(session);
        let waker = noop_waker();
        for _ in 0..20 {
            tasks.retain_mut(|task| {
                task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending()
            });
        }
        tasks.len()
    }

    pub fn poll_closed(&mut self) -> bool {
        let waker = noop_waker();
        self.session.poll_closed(&mut Context::from_waker(&waker)).is_ready()
    }

    pub fn answer_miss(&mut self, answer: u64) {
        assert!(!self.misses.is_empty());
        self.misses.remove(0);
        let message =
            Message::new(BackendReq::IOTLB_MSG, VhostUserHeaderFlag::REPLY, &answer.to_ne_bytes());
        self.receive(Channel::Backend, message);
    }

    /// Serves the first miss by the guest's page table.
    pub fn serve_one_miss(&mut self) {
        let iova = iotlb_message(&self.misses[0].payload).unwrap().iova & !(PAGE - 1);
        let page = self.guest.table.get(&(iova / PAGE)).copied();
        if let Some(page) = page {
            self.update(iova, PAGE, page);
        }
        self.answer_miss(u64::from(page.is_none()));
    }

    /// Serves all misses, also those that come of it.
    pub fn serve_misses(&mut self) {
        self.run();
        while !self.misses.is_empty() {
            self.serve_one_miss();
            self.run();
        }
    }

    /// Serves those of the rings only.
    pub fn serve_rings(&mut self) {
        self.run();
        while self
            .misses
            .first()
            .is_some_and(|miss| iotlb_message(&miss.payload).unwrap().iova < 0xffff_0000)
        {
            self.serve_one_miss();
            self.run();
        }
    }

    pub fn submit(&mut self, queue: u16) {
        assert!(self.guest.submit(queue, &mut self.random));
        self.kicks += 1;
        self.hardware.kicks[usize::from(queue)].signal(self.kicks);
    }

    pub fn take_completed(&mut self, queue: u16) {
        let request = self.guest.completed(queue).unwrap().expect("it is complete");
        for (iova, _) in &request.pages {
            self.invalidate(iova * PAGE, PAGE);
        }
        self.run();
        assert_eq!(self.answers(), request.pages.len());
        let buffer = usize::try_from(request.len / PAGE).unwrap();
        self.tables += request.pages.len() - buffer - 1;
        self.guest.give_back(&request.pages);
    }

    pub fn in_flight(&self) -> usize {
        self.hardware.in_flight.lock().unwrap().len()
    }

    /// Lets the first access end.
    pub fn access(&mut self) {
        let go = self.hardware.in_flight.lock().unwrap().remove(0);
        go.send(()).unwrap();
        self.run_tasks();
    }

    pub fn spawn<T>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
    ) -> BoxFuture<'static, T> {
        Box::pin(future)
    }

    pub fn poll<T>(&self, future: &mut BoxFuture<'static, T>) -> Option<T> {
        match future.as_mut().poll(&mut Context::from_waker(&noop_waker())) {
            Poll::Ready(value) => Some(value),
            Poll::Pending => None,
        }
    }
}
