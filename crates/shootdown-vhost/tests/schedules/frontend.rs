//! The front-end, as QEMU is one: it does one thing after the other, and while it waits for an
//! answer it serves no miss.

use crate::guest::{Guest, PAGE, PAGES, QUEUES, SIZE, USER, ring_iova};
use rand::Rng;
use rand::rngs::SmallRng;
use rustix::event::{EventfdFlags, eventfd};
use shootdown_vhost::message::{Message, iotlb_bytes, iotlb_message};
use std::collections::{BTreeSet, VecDeque};
use std::os::fd::OwnedFd;
use vhost::vhost_user::message::{
    BackendReq, FrontendReq, VhostUserHeaderFlag, VhostUserMemory, VhostUserMemoryRegion,
    VhostUserVringAddr, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::{VhostAccess, VhostIotlbMsg, VhostIotlbType};
use vm_memory::ByteValued;

/// What follows an answer.
pub enum After {
    Nothing,
    /// The device does not reach these pages any more.
    GiveBack(Vec<(u64, u64)>),
    /// A miss is answered, too.
    Miss,
    /// The last ring has stopped: all is somebody else's, and the device starts again.
    Reset,
}

/// A message, whether it has an answer, and what follows that.
type Step = (Message, bool, After);

pub struct Frontend {
    /// To be sent, one after the answer to the other.
    script: VecDeque<Step>,
    /// What is waited for.
    waiting: Option<(u32, After)>,
    misses: VecDeque<VhostIotlbMsg>,
    /// Pages and accesses that were asked for, and not told of since.
    untold: BTreeSet<(u64, u8)>,
    /// Unmapped, and not told yet.
    lazy: Option<Vec<(u64, u64)>>,
    pub answered: u64,
}

/// What the session is given.
pub enum Sent {
    Frontend(Message),
    Backend(Message),
}

const NEED_REPLY: VhostUserHeaderFlag = VhostUserHeaderFlag::NEED_REPLY;

fn eventfd_() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn plain(request: FrontendReq, payload: &[u8]) -> Step {
    (Message::new(request, VhostUserHeaderFlag::empty(), payload), false, After::Nothing)
}

fn asking(request: FrontendReq, payload: &[u8], after: After) -> Step {
    (Message::new(request, NEED_REPLY, payload), true, after)
}

fn iotlb(
    msg_type: VhostIotlbType,
    iova: u64,
    size: u64,
    userspace_addr: u64,
    after: After,
) -> Step {
    let perm = VhostAccess::ReadWrite;
    let message = VhostIotlbMsg { iova, size, userspace_addr, perm, msg_type };
    asking(FrontendReq::IOTLB_MSG, &iotlb_bytes(&message), after)
}

fn invalidate(iova: u64, size: u64, after: After) -> Step {
    iotlb(VhostIotlbType::Invalidate, iova, size, 0xdead_beef, after)
}

impl Frontend {
    /// Connects, and starts the device.
    pub fn new(guest: &Guest, lazy: bool, backend: OwnedFd, event_idx: bool) -> Self {
        let features: u64 =
            1 << 32 | 1 << 33 | 1 << 30 | 1 << 28 | if event_idx { 1 << 29 } else { 0 };
        let mut frontend = Self {
            script: VecDeque::new(),
            waiting: None,
            misses: VecDeque::new(),
            untold: BTreeSet::new(),
            lazy: lazy.then(Vec::new),
            answered: 0,
        };
        frontend.script.extend([
            (
                Message::new(FrontendReq::GET_FEATURES, VhostUserHeaderFlag::empty(), &[]),
                true,
                After::Nothing,
            ),
            plain(FrontendReq::SET_PROTOCOL_FEATURES, &0x229u64.to_ne_bytes()),
        ]);
        let mut channel = asking(FrontendReq::SET_BACKEND_REQ_FD, &[], After::Nothing);
        channel.0.fds.push(backend);
        frontend.script.push_back(channel);
        frontend.script.push_back(plain(FrontendReq::SET_FEATURES, &features.to_ne_bytes()));
        frontend.start(guest);
        frontend
    }

    fn memory_table(&mut self, guest: &Guest) {
        let region = VhostUserMemoryRegion::new(0, PAGES * PAGE, USER, 0);
        let payload = [VhostUserMemory::new(1).as_slice(), region.as_slice()].concat();
        let mut table = asking(FrontendReq::SET_MEM_TABLE, &payload, After::Nothing);
        table.0.fds.push(guest.file.try_clone().unwrap());
        self.script.push_back(table);
    }

    fn start(&mut self, guest: &Guest) {
        self.memory_table(guest);
        for queue in 0..QUEUES {
            let state =
                |num: u32| VhostUserVringState::new(u32::from(queue), num).as_slice().to_vec();
            let [descriptors, available, used] = [0, 1, 2].map(|part| ring_iova(queue, part));
            let none = VhostUserVringAddrFlags::empty();
            let addresses =
                VhostUserVringAddr::new(u32::from(queue), none, descriptors, used, available, 0);
            let mut kick = plain(FrontendReq::SET_VRING_KICK, &u64::from(queue).to_ne_bytes());
            kick.0.fds.push(eventfd_());
            let mut call = plain(FrontendReq::SET_VRING_CALL, &u64::from(queue).to_ne_bytes());
            call.0.fds.push(eventfd_());
            self.script.extend([
                plain(FrontendReq::SET_VRING_NUM, &state(u32::from(SIZE))),
                plain(FrontendReq::SET_VRING_BASE, &state(0)),
                plain(FrontendReq::SET_VRING_ADDR, addresses.as_slice()),
                call,
                kick,
                plain(FrontendReq::SET_VRING_ENABLE, &state(1)),
            ]);
        }
        for queue in 0..QUEUES {
            let page = guest.table[&(ring_iova(queue, 2) / PAGE)];
            let iova = ring_iova(queue, 2);
            self.script.push_back(iotlb(
                VhostIotlbType::Update,
                iova,
                PAGE,
                USER + page * PAGE,
                After::Nothing,
            ));
        }
        // As for a queue that is not set up.
        self.script.push_back(iotlb(VhostIotlbType::Update, 0, PAGE, USER, After::Nothing));
    }

    /// Whether it waits for nothing and has nothing to send.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_none() && self.script.is_empty()
    }

    pub fn has_misses(&self) -> bool {
        !self.misses.is_empty()
    }

    pub fn can_send(&self) -> bool {
        self.waiting.is_none() && !self.script.is_empty()
    }

    pub fn send(&mut self) -> Option<Message> {
        let (message, answered, after) = self.script.pop_front()?;
        let anew = [
            FrontendReq::SET_MEM_TABLE,
            FrontendReq::SET_FEATURES,
            FrontendReq::SET_PROTOCOL_FEATURES,
        ]
        .map(u32::from);
        if anew.contains(&message.request) {
            // Who waits asks again.
            self.untold.clear();
        }
        if message.request == u32::from(FrontendReq::IOTLB_MSG)
            && let Some(update) = iotlb_message(&message.payload)
        {
            // Also by an INVALIDATE.
            let told = update.iova / PAGE..(update.iova + update.size) / PAGE;
            self.untold.retain(|(page, _)| !told.contains(page));
        }
        if answered {
            self.waiting = Some((message.request, after));
        }
        Some(message)
    }

    /// Serves the oldest miss: an UPDATE and its answer come before the miss's own answer.
    pub fn serve_miss(&mut self, guest: &Guest, random: &mut SmallRng) -> Option<Sent> {
        let miss = self.misses.front()?;
        let iova = miss.iova & !(PAGE - 1);
        let asked = (iova / PAGE, miss.perm as u8);
        let Some(page) = guest.table.get(&(iova / PAGE)) else {
            self.misses.pop_front();
            self.untold.remove(&asked);
            return Some(Sent::Backend(answer(1)));
        };
        // As large as it is contiguous, sometimes.
        let contiguous = |at: u64| guest.table.get(&(iova / PAGE + at)) == Some(&(page + at));
        let mut count = 1;
        while random.random_bool(0.5) && contiguous(count) {
            count += 1;
        }
        self.script.push_front(iotlb(
            VhostIotlbType::Update,
            iova,
            count * PAGE,
            USER + page * PAGE,
            After::Miss,
        ));
        self.send().map(Sent::Frontend)
    }

    /// The session has sent something on the front-end channel.
    pub fn receive(
        &mut self,
        message: &Message,
        guest: &mut Guest,
        random: &mut SmallRng,
    ) -> Result<Option<Sent>, String> {
        let (request, after) = self.waiting.take().ok_or("an answer to nothing")?;
        if message.request != request || message.flags & 0x7 != 0x5 {
            return Err(format!("{message:?} is no answer to {request}"));
        }
        if request == u32::from(FrontendReq::IOTLB_MSG) && message.payload != 0u64.to_ne_bytes() {
            return Err("a refusal".to_owned());
        }
        self.answered += 1;
        match after {
            After::Nothing => {}
            After::GiveBack(pages) => guest.give_back(&pages),
            After::Miss => {
                self.misses.pop_front();
                return Ok(Some(Sent::Backend(answer(0))));
            }
            After::Reset => {
                // Nobody is told what is unmapped now.
                self.lazy.iter_mut().for_each(Vec::clear);
                guest.reset(random);
                self.start(guest);
            }
        }
        Ok(None)
    }

    /// The session has sent something on the back-end channel.
    pub fn asked(&mut self, message: &Message) -> Result<(), String> {
        let miss =
            iotlb_message(&message.payload).filter(|miss| miss.msg_type == VhostIotlbType::Miss);
        let miss = miss.ok_or(format!("{message:?} is no MISS"))?;
        if !self.untold.insert((miss.iova / PAGE, miss.perm as u8)) {
            return Err(
                "a page is asked for twice, and nothing was told of it in between".to_owned()
            );
        }
        self.misses.push_back(miss);
        Ok(())
    }

    /// Pages are unmapped: they are told now, or all of them later.
    pub fn unmap(&mut self, pages: Vec<(u64, u64)>, at_once: bool) {
        match &mut self.lazy {
            Some(lazy) if !at_once => lazy.extend(pages),
            _ => {
                let last = pages.len() - 1;
                for (at, (iova, _)) in pages.clone().into_iter().enumerate() {
                    let after =
                        if at == last { After::GiveBack(pages.clone()) } else { After::Nothing };
                    self.script.push_back(invalidate(iova * PAGE, PAGE, after));
                }
            }
        }
    }

    /// The whole domain, as two messages.
    pub fn flush(&mut self) {
        let pages = self.lazy.as_mut().map(std::mem::take).unwrap_or_default();
        self.script.push_back(invalidate(0, 1 << 63, After::Nothing));
        self.script.push_back(invalidate(1 << 63, 1 << 63, After::GiveBack(pages)));
    }

    /// An INVALIDATE of what may be anything.
    pub fn spurious(&mut self, random: &mut SmallRng) {
        let order = random.random_range(0..8);
        let size = PAGE << order;
        let iova = (0xffff_0000 + random.random_range(0..32) * PAGE) & !(size - 1);
        self.script.push_back(invalidate(iova, size, After::Nothing));
    }

    pub fn new_memory(&mut self, guest: &Guest) {
        self.memory_table(guest);
    }

    /// Disables a ring for a while, or gives it another descriptor for kicks: it goes on where it
    /// was.
    pub fn pause(&mut self, random: &mut SmallRng) {
        let queue = random.random_range(0..QUEUES);
        if random.random_bool(0.5) {
            let mut kick = plain(FrontendReq::SET_VRING_KICK, &u64::from(queue).to_ne_bytes());
            kick.0.fds.push(eventfd_());
            self.script.push_back(kick);
            return;
        }
        for enabled in [0, 1] {
            let state = VhostUserVringState::new(u32::from(queue), enabled);
            self.script.push_back(plain(FrontendReq::SET_VRING_ENABLE, state.as_slice()));
        }
    }

    /// Stops the device, and starts it again.
    pub fn reset(&mut self, disable: bool) {
        let state = |queue: u16| VhostUserVringState::new(u32::from(queue), 0).as_slice().to_vec();
        if disable {
            self.script.extend(
                (0..QUEUES).map(|queue| plain(FrontendReq::SET_VRING_ENABLE, &state(queue))),
            );
        }
        for queue in 0..QUEUES {
            let after = if queue + 1 == QUEUES { After::Reset } else { After::Nothing };
            let message = Message::new(
                FrontendReq::GET_VRING_BASE,
                VhostUserHeaderFlag::empty(),
                &state(queue),
            );
            self.script.push_back((message, true, after));
        }
    }
}

fn answer(value: u64) -> Message {
    let mut answer =
        Message::new(BackendReq::IOTLB_MSG, VhostUserHeaderFlag::REPLY, &value.to_ne_bytes());
    answer.flags |= 1;
    answer
}
