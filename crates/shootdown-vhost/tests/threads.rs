//! A device of threads that is stopped, continued and invalidated at random: nothing is lost or
//! told twice, nobody waits for ever.
#![allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    unused_imports,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "it shares modules with the others"
)]

#[path = "schedules/device.rs"]
mod device;
#[path = "schedules/guest.rs"]
mod guest;
#[path = "pitfalls/machine.rs"]
mod machine;
#[path = "pitfalls/support.rs"]
mod support;

use guest::{PAGE, USER};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use shootdown_vhost::message::{Channel, Message, iotlb_bytes, iotlb_message};
use shootdown_vhost::{Device, Iotlb, Output, Ring, Session};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};
use support::*;
use vhost::vhost_user::message::{
    FrontendReq, VhostUserMemory, VhostUserMemoryRegion, VhostUserVringAddr,
    VhostUserVringAddrFlags,
};
use vhost::{VhostAccess, VhostIotlbMsg, VhostIotlbType};
use vm_memory::ByteValued;

/// Whether each request has a thread of its own.
struct Threads(bool);
impl Device for Threads {
    fn features(&self) -> u64 {
        0
    }
    fn queues(&self) -> u16 {
        1
    }
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }
    fn start(&self, mut ring: Ring) {
        let many = self.0;
        thread::spawn(move || {
            loop {
                match ring.next_wait() {
                    Ok(Some(chain)) if many => {
                        thread::spawn(move || {
                            let _ = chain.complete_wait(7);
                        });
                    }
                    Ok(Some(chain)) => {
                        let _ = chain.complete_wait(7);
                    }
                    Ok(None) => return,
                    Err(error) => {
                        eprintln!(
                            "{error}, stopping: {}",
                            futures::FutureExt::now_or_never(ring.stopping()).is_some()
                        );
                        return;
                    }
                }
            }
        });
    }
}

struct Unpark(Thread);
impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

struct Front {
    session: Session<Threads>,
    waker: Waker,
    misses: Vec<Message>,
    answers: Vec<Message>,
    file: OwnedFd,
    kick: OwnedFd,
    random: SmallRng,
    served: usize,
    refused: usize,
}

impl Front {
    fn poll(&mut self) {
        while let Poll::Ready(output) =
            self.session.poll_output(&mut Context::from_waker(&self.waker))
        {
            match output {
                Output::Send(Channel::Backend, miss) => self.misses.push(miss),
                Output::Send(_, answer) => self.answers.push(answer),
                _ => {}
            }
        }
    }
    fn say(&mut self, request: FrontendReq, payload: &[u8], fds: Vec<OwnedFd>) {
        self.session.receive(Channel::Frontend, with_fds(request, payload, fds)).unwrap();
        self.poll();
    }
    /// Serves no miss until the answer is here.
    fn ask(&mut self, request: FrontendReq, payload: &[u8], fds: Vec<OwnedFd>) -> Message {
        self.answers.clear();
        self.say(request, payload, fds);
        let began = Instant::now();
        while self.answers.is_empty() {
            assert!(began.elapsed() < Duration::from_secs(5), "no answer to {request:?}");
            thread::park_timeout(Duration::from_millis(100));
            self.poll();
        }
        self.answers.pop().unwrap()
    }
    fn iotlb(&mut self, iova: u64, size: u64, msg_type: VhostIotlbType) {
        let perm = VhostAccess::ReadWrite;
        let message = VhostIotlbMsg { iova, size, userspace_addr: USER + iova, perm, msg_type };
        self.ask(FrontendReq::IOTLB_MSG, &iotlb_bytes(&message), vec![]);
    }
    fn serve(&mut self, refuse: bool) {
        self.poll();
        while !self.misses.is_empty() {
            let miss = self.misses.remove(0);
            let iova = iotlb_message(&miss.payload).unwrap().iova & !(PAGE - 1);
            if !refuse {
                self.iotlb(iova, PAGE, VhostIotlbType::Update);
            }
            self.served += 1;
            self.refused += usize::from(refuse);
            self.session.receive(Channel::Backend, answer(u64::from(refuse))).unwrap();
            self.poll();
        }
    }
    fn word(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        rustix::io::pread(&self.file, &mut bytes, at).unwrap();
        u16::from_le_bytes(bytes)
    }
    fn start(&mut self, base: u16) {
        let none = VhostUserVringAddrFlags::empty();
        let at = VhostUserVringAddr::new(0, none, 0, 2 * PAGE, PAGE, 0);
        self.ask(FrontendReq::SET_VRING_NUM, &state(0, 8), vec![]);
        self.ask(FrontendReq::SET_VRING_BASE, &state(0, u32::from(base)), vec![]);
        self.ask(FrontendReq::SET_VRING_ADDR, at.as_slice(), vec![]);
        let kick = self.kick.try_clone().unwrap();
        rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
        self.ask(FrontendReq::SET_VRING_KICK, &0u64.to_ne_bytes(), vec![kick]);
        self.ask(FrontendReq::SET_VRING_ENABLE, &state(0, 1), vec![]);
    }
}

#[test]
fn v4_a_thread_loses_nothing_and_waits_for_nothing() {
    run(false, 2_000);
}

#[test]
fn v4_many_threads_lose_nothing_and_wait_for_nothing() {
    run(true, 1_000);
}

fn run(many: bool, total: u16) {
    let (_, file) = memory_of(8, 0, USER);
    let session = Session::new(Arc::new(Threads(many)), Iotlb::default());
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let random = SmallRng::seed_from_u64(25);
    let mut front = Front {
        session,
        waker,
        misses: vec![],
        answers: vec![],
        file,
        kick: fd(),
        random,
        served: 0,
        refused: 0,
    };
    let region = VhostUserMemoryRegion::new(0, 8 * PAGE, USER, 0);
    let table = [VhostUserMemory::new(1).as_slice(), region.as_slice()].concat();
    for at in 0..8u64 {
        rustix::io::pwrite(
            &front.file,
            &descriptor((3 + at % 4) * PAGE, 8, (at % 2 * 2) as u16, 0),
            at * 16,
        )
        .unwrap();
    }
    front.say(FrontendReq::SET_PROTOCOL_FEATURES, &0x229u64.to_ne_bytes(), vec![]);
    front.say(FrontendReq::SET_BACKEND_REQ_FD, &[], vec![fd()]);
    front.ask(FrontendReq::SET_FEATURES, &machine::FEATURES.to_ne_bytes(), vec![]);
    let memory = front.file.try_clone().unwrap();
    front.ask(FrontendReq::SET_MEM_TABLE, &table, vec![memory]);
    front.start(0);
    let (mut available, mut seen) = (0u16, 0u16);
    let mut taken = [false; 8];
    let (mut stops, mut untold) = (0, 0);
    let began = Instant::now();
    let mut last = Instant::now();
    while seen != total {
        assert!(
            last.elapsed() < Duration::from_secs(5),
            "{available} made available, {seen} told, {stops} stops, used {}, taken {taken:?}, rings' idx {}",
            front.word(2 * PAGE + 2),
            front.word(PAGE + 2)
        );
        let used = front.word(2 * PAGE + 2);
        while seen != used {
            let entry = 2 * PAGE + 4 + u64::from(seen % 8) * 8;
            let head = usize::from(front.word(entry));
            assert!(std::mem::take(&mut taken[head]), "told of {head} twice, {seen}");
            (seen, last) = (seen.wrapping_add(1), Instant::now());
        }
        if let Some(head) = taken.iter().position(|taken| !taken)
            && available != total
        {
            taken[head] = true;
            let at = PAGE + 4 + u64::from(available % 8) * 2;
            rustix::io::pwrite(&front.file, &(head as u16).to_le_bytes(), at).unwrap();
            available = available.wrapping_add(1);
            rustix::io::pwrite(&front.file, &available.to_le_bytes(), PAGE + 2).unwrap();
            rustix::io::write(&front.kick, &1u64.to_ne_bytes()).unwrap();
        }
        match front.random.random_range(0..40) {
            0 => {
                front.iotlb(0, 1 << 63, VhostIotlbType::Invalidate);
            }
            1 => front.iotlb(
                front.random.clone().random_range(0..7) * PAGE,
                PAGE,
                VhostIotlbType::Invalidate,
            ),
            2 => {
                // As QEMU: disabled, then a miss may be refused, then the base.
                front.ask(FrontendReq::SET_VRING_ENABLE, &state(0, 0), vec![]);
                if front.random.random_bool(0.3) {
                    front.iotlb(0, 1 << 63, VhostIotlbType::Invalidate);
                }
                let refuse = front.random.random_bool(0.5);
                front.serve(refuse);
                let base = front.ask(FrontendReq::GET_VRING_BASE, &state(0, 0), vec![]);
                let base = u16::from_ne_bytes(base.payload[4..6].try_into().unwrap());
                untold += usize::from(base != front.word(2 * PAGE + 2));
                front.ask(FrontendReq::SET_FEATURES, &machine::FEATURES.to_ne_bytes(), vec![]);
                front.start(base);
                stops += 1;
            }
            _ => {}
        }
        front.serve(false);
    }
    eprintln!(
        "{stops} stops, {untold} with untold, {} misses, {} refused, {:?}",
        front.served,
        front.refused,
        began.elapsed()
    );
}
