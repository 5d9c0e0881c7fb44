//! What these tests have in common.

use crate::guest::PAGE;
use crate::machine::Machine;
use rustix::event::{EventfdFlags, eventfd};
use shootdown_vhost::message::Message;
use shootdown_vhost::{Device, Region, Ring};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use vhost::vhost_user::message::{
    BackendReq, FrontendReq, VhostUserHeaderFlag, VhostUserVringState,
};
use vm_memory::ByteValued;

pub fn fd() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

pub fn state(queue: u16, num: u32) -> Vec<u8> {
    VhostUserVringState::new(u32::from(queue), num).as_slice().to_vec()
}

pub fn with_fds(request: FrontendReq, payload: &[u8], fds: Vec<OwnedFd>) -> Message {
    let mut message = Message::new(request, VhostUserHeaderFlag::NEED_REPLY, payload);
    message.fds = fds;
    message
}

pub fn answer(value: u64) -> Message {
    Message::new(BackendReq::IOTLB_MSG, VhostUserHeaderFlag::REPLY, &value.to_ne_bytes())
}

pub fn memory_of(pages: u64, guest: u64, user: u64) -> (Arc<Region>, OwnedFd) {
    let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, pages * PAGE).unwrap();
    (Region::map(file.try_clone().unwrap(), 0, pages * PAGE, guest, user).unwrap(), file)
}

pub fn stop_both(machine: &mut Machine) {
    // As QEMU's vhost_dev_stop: all rings are disabled, then asked for their base one by one.
    machine.plain(FrontendReq::SET_VRING_ENABLE, &state(0, 0));
    machine.plain(FrontendReq::SET_VRING_ENABLE, &state(1, 0));
}

pub fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

pub fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> Vec<u8> {
    let mut bytes = address.to_le_bytes().to_vec();
    bytes.extend(len.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(next.to_le_bytes());
    bytes
}

/// A device of one queue that keeps its rings.
#[derive(Default)]
pub struct Keeps(pub Mutex<Vec<Ring>>);

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
        self.0.lock().unwrap().push(ring);
    }
}
