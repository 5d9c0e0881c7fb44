//! The effects of each message of the front-end.
#![forbid(unsafe_code)]

use super::queue::Addresses;
use super::{Backend, Due, Fault, Reply, Session};
use crate::bell::Call;
use crate::device::Device;
use crate::memory::{MemoryError, MemoryTable, Region};
use crate::message::{Message, ProtocolError, iotlb_message, permissions};
use shootdown::AddressRange;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfig, VhostUserMemory, VhostUserMemoryRegion, VhostUserMsgValidator,
    VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures, VhostUserVringAddr,
    VhostUserVringState,
};
use vhost::{VhostIotlbMsg, VhostIotlbType};
use virtio_bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::ByteValued;

/// Features of the transport and of rings, without packed rings.
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_F_ACCESS_PLATFORM
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

const PROTOCOL: Protocol =
    Protocol::MQ.union(Protocol::REPLY_ACK).union(Protocol::BACKEND_REQ).union(Protocol::CONFIG);

/// Maximum number of regions of a table.
const REGIONS: u32 = 8;
/// Largest size of a ring.
const LONGEST: u32 = 32_768;

/// Result of a message without an answer of its own.
enum Done {
    Ok,
    /// This side refuses it, for this reason.
    Refused(&'static str),
}

pub(super) fn vring_state(index: usize, base: u16) -> Vec<u8> {
    let index = u32::try_from(index).expect("there are few queues");
    VhostUserVringState::new(index, u32::from(base)).as_slice().to_vec()
}

/// Returns the existing bytes of `[start, start + len)`.
fn range(start: u64, len: u64) -> Option<AddressRange> {
    let len = len.min((u64::MAX - start).saturating_add(1));
    AddressRange::new(start, len).ok()
}

impl<D: Device> Session<D> {
    pub(super) fn handle(&mut self, message: Message) -> Result<(), ProtocolError> {
        let Ok(request) = FrontendReq::try_from(message.request) else {
            self.finish(&message, Done::Refused("an unknown request"));
            return Ok(());
        };
        let done = match request {
            FrontendReq::GET_FEATURES => {
                return self.number(&message, self.device.features() | FEATURES);
            }
            FrontendReq::GET_PROTOCOL_FEATURES => return self.number(&message, PROTOCOL.bits()),
            FrontendReq::GET_QUEUE_NUM => return self.number(&message, self.queues.len() as u64),
            FrontendReq::GET_CONFIG => return self.get_config(&message),
            FrontendReq::GET_VRING_BASE => return self.get_vring_base(&message),
            FrontendReq::SET_MEM_TABLE => return self.set_mem_table(message),
            FrontendReq::IOTLB_MSG => return self.iotlb_msg(&message),
            FrontendReq::SET_FEATURES => self.set_features(message.body()?),
            FrontendReq::SET_PROTOCOL_FEATURES => {
                self.protocol = Protocol::from_bits_truncate(message.body()?) & PROTOCOL;
                self.translate();
                Done::Ok
            }
            FrontendReq::SET_OWNER => Done::Ok,
            FrontendReq::RESET_OWNER => return self.reset_owner(&message),
            FrontendReq::SET_CONFIG => {
                let (head, bytes): (VhostUserConfig, _) = message.head()?;
                let allowed =
                    head.size as usize == bytes.len() && self.device.set_config(head.offset, bytes);
                if allowed {
                    Done::Ok
                } else {
                    Done::Refused("the configuration space is not to be written there")
                }
            }
            FrontendReq::SET_BACKEND_REQ_FD => {
                self.backend = Backend::New(one_descriptor(message.request, message.fds)?);
                self.iotlb.new_channel();
                self.translate();
                let needs = Message { fds: Vec::new(), ..message };
                self.finish(&needs, Done::Ok);
                return Ok(());
            }
            FrontendReq::SET_VRING_NUM => {
                let state: VhostUserVringState = message.body()?;
                let at = self.queue(&message, state.index)?;
                let size = u16::try_from(state.num)
                    .ok()
                    .filter(|size| size.is_power_of_two() && state.num <= LONGEST);
                size.map_or(
                    Done::Refused("the size of a ring is a power of two up to 32768"),
                    |size| {
                        self.queues[at].size = size;
                        Done::Ok
                    },
                )
            }
            FrontendReq::SET_VRING_BASE => {
                let state: VhostUserVringState = message.body()?;
                let at = self.queue(&message, state.index)?;
                let set = u16::try_from(state.num).is_ok_and(|base| self.queues[at].set_base(base));
                if set { Done::Ok } else { Done::Refused("the ring runs, or has no such place") }
            }
            FrontendReq::SET_VRING_ADDR => {
                let ring: VhostUserVringAddr = message.body()?;
                let at = self.queue(&message, ring.index)?;
                let (descriptors, available, used) = (ring.descriptor, ring.available, ring.used);
                // Do not translate here: the front-end is waiting, and serves no miss.
                self.queues[at].addresses = Some(Addresses { descriptors, available, used });
                Done::Ok
            }
            FrontendReq::SET_VRING_ENABLE => {
                let state: VhostUserVringState = message.body()?;
                let at = self.queue(&message, state.index)?;
                self.queues[at].enabled = state.num != 0;
                if state.num == 0 {
                    self.queues[at].stop();
                }
                Done::Ok
            }
            FrontendReq::SET_VRING_KICK
            | FrontendReq::SET_VRING_CALL
            | FrontendReq::SET_VRING_ERR => {
                return self.set_descriptor(request, message);
            }
            _ => Done::Refused("this side does not do that"),
        };
        self.finish(&message, done);
        Ok(())
    }

    /// Answers the message, if it requests an answer.
    fn finish(&mut self, message: &Message, done: Done) {
        let answer = match done {
            Done::Ok => 0u64,
            Done::Refused(why) => {
                tracing::warn!(?message, why, "refused");
                1
            }
        };
        if self.is_answered(message) {
            self.reply(message, Due::Now(answer.to_ne_bytes().to_vec()));
        }
        self.start_queues();
    }

    fn is_answered(&self, message: &Message) -> bool {
        message.needs_reply() && self.protocol.contains(Protocol::REPLY_ACK)
    }

    fn reply(&mut self, message: &Message, state: Due) {
        self.replies.push_back(Reply { request: message.request, state });
    }

    fn number(&mut self, message: &Message, number: u64) -> Result<(), ProtocolError> {
        if !message.payload.is_empty() {
            return Err(message.malformed());
        }
        self.reply(message, Due::Now(number.to_ne_bytes().to_vec()));
        Ok(())
    }

    fn queue(&self, message: &Message, queue: u32) -> Result<usize, ProtocolError> {
        let at = usize::try_from(queue).ok().filter(|at| *at < self.queues.len());
        let queues = self.device.queues();
        at.ok_or(ProtocolError::Queue { request: message.request, queue, queues })
    }

    fn has_iommu(&self) -> bool {
        self.features & (1 << VIRTIO_F_ACCESS_PLATFORM) != 0
    }

    fn set_features(&mut self, features: u64) -> Done {
        if features & !(self.device.features() | FEATURES) != 0 {
            return Done::Refused("features that were not offered");
        }
        self.features = features;
        self.translate();
        Done::Ok
    }

    /// Removes all translations, and asks from now on in the way that the front-end can answer.
    pub(super) fn translate(&self) {
        match (&self.backend, self.has_iommu()) {
            (_, false) => self.iotlb.without_iommu(),
            (Backend::None, true) => self.iotlb.clear(),
            (_, true) => {
                let keep = self.fault == Some(Fault::KeepTranslations);
                self.iotlb.with_iommu(self.protocol.contains(Protocol::REPLY_ACK), keep);
            }
        }
    }

    pub(super) fn start_queues(&mut self) {
        let memory = (!self.has_iommu()).then(|| self.iotlb.memory());
        // There is no SET_VRING_ENABLE then.
        let implicit = self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0;
        let mut rings = Vec::new();
        if self.stopping.is_none() {
            return;
        }
        for (index, queue) in (0..).zip(&mut self.queues) {
            rings.extend(queue.start(index, self.features, implicit, memory.as_ref(), &self.iotlb));
        }
        rings.into_iter().for_each(|ring| self.device.start(ring));
    }

    fn get_config(&mut self, message: &Message) -> Result<(), ProtocolError> {
        let (head, rest): (VhostUserConfig, _) = message.head()?;
        let (offset, size) = (head.offset as usize, head.size as usize);
        if size != rest.len() || !head.is_valid() {
            return Err(message.malformed());
        }
        let mut config = self.device.config();
        // Bytes beyond the device's configuration read as zero.
        config.resize(config.len().max(offset.saturating_add(size)), 0);
        let bytes = head.as_slice().iter().chain(&config[offset..offset + size]).copied().collect();
        self.reply(message, Due::Now(bytes));
        Ok(())
    }

    fn get_vring_base(&mut self, message: &Message) -> Result<(), ProtocolError> {
        let state: VhostUserVringState = message.body()?;
        let at = self.queue(message, state.index)?;
        self.queues[at].disconnect();
        let due = if self.fault == Some(Fault::AnswerEarly) {
            self.iotlb.forget_all();
            Due::Now(vring_state(at, self.queues[at].base_now()))
        } else {
            self.queues[at].awaited += 1;
            Due::Base(at, self.queues[at].next_base())
        };
        self.reply(message, due);
        Ok(())
    }

    /// Stops all rings. Newer front-ends do not send it.
    fn reset_owner(&mut self, message: &Message) -> Result<(), ProtocolError> {
        if !message.payload.is_empty() {
            return Err(message.malformed());
        }
        for queue in &mut self.queues {
            queue.disconnect();
            queue.awaited += 1;
        }
        let answered = self.is_answered(message);
        self.reply(message, Due::Bases(answered));
        Ok(())
    }

    fn set_mem_table(&mut self, mut message: Message) -> Result<(), ProtocolError> {
        let fds = std::mem::take(&mut message.fds);
        let (head, mut rest): (VhostUserMemory, _) = message.head()?;
        let mut regions = Vec::new();
        while !rest.is_empty() {
            let (bytes, after) = rest
                .split_at_checked(size_of::<VhostUserMemoryRegion>())
                .ok_or_else(|| message.malformed())?;
            let mut region = VhostUserMemoryRegion::default();
            region.as_mut_slice().copy_from_slice(bytes);
            regions.push(region);
            rest = after;
        }
        let count = head.num_regions;
        if count > REGIONS || count as usize > regions.len() {
            return Err(message.malformed());
        }
        regions.truncate(count as usize);
        if fds.len() != regions.len() {
            return Err(ProtocolError::Descriptors {
                request: message.request,
                found: fds.len(),
                expected: regions.len(),
            });
        }
        match map(&regions, fds) {
            Ok(memory) => self.iotlb.set_memory(memory),
            Err(error) => {
                tracing::error!(%error, "the front-end's memory");
                self.finish(&message, Done::Refused("memory that cannot be mapped"));
                return Ok(());
            }
        }
        self.translate();
        // A front-end that shares new memory takes the old memory away.
        let (quiet, answered) =
            (self.iotlb.wait_for(AddressRange::ALL), self.is_answered(&message));
        self.reply(&message, Due::Quiet(quiet, answered));
        Ok(())
    }

    fn iotlb_msg(&mut self, message: &Message) -> Result<(), ProtocolError> {
        let iotlb = iotlb_message(&message.payload).ok_or_else(|| message.malformed())?;
        match iotlb.msg_type {
            VhostIotlbType::Invalidate => {
                self.invalidate(message, &iotlb);
                return Ok(());
            }
            VhostIotlbType::Update => {
                let done = self.update(&iotlb);
                self.finish(message, done);
            }
            _ => self
                .finish(message, Done::Refused("an IOTLB message that a front-end does not send")),
        }
        Ok(())
    }

    fn update(&self, update: &VhostIotlbMsg) -> Done {
        if !self.has_iommu() {
            return Done::Refused("a translation without an IOMMU");
        }
        let Some((place, room)) = self.iotlb.memory().find_user(update.userspace_addr) else {
            return Done::Refused("a translation to what is not in the memory table");
        };
        let Some(range) = range(update.iova, update.size.min(room)) else {
            return Done::Refused("a translation of nothing");
        };
        self.iotlb.update(range, place, permissions(update.perm));
        Done::Ok
    }

    fn invalidate(&mut self, message: &Message, iotlb: &VhostIotlbMsg) {
        let answered = self.is_answered(message);
        let Some(range) = range(iotlb.iova, iotlb.size) else {
            self.finish(message, Done::Ok);
            return;
        };
        let due = match self.fault {
            Some(Fault::KeepTranslations) => {
                Due::Invalidated(self.iotlb.invalidate_in_flight(range), answered)
            }
            Some(Fault::AnswerEarly) => {
                // The passes belong to the space once it is dropped, and no answer waits for them.
                drop(self.iotlb.invalidate(range));
                Due::Now(if answered { 0u64.to_ne_bytes().to_vec() } else { Vec::new() })
            }
            None => Due::Invalidated(self.iotlb.invalidate(range), answered),
        };
        self.reply(message, due);
    }

    fn set_descriptor(
        &mut self,
        request: FrontendReq,
        mut message: Message,
    ) -> Result<(), ProtocolError> {
        const INDEX: u64 = 0xff;
        const NONE: u64 = 0x100;
        let number: u64 = message.body()?;
        let at = self.queue(&message, u32::try_from(number & INDEX).unwrap_or(u32::MAX))?;
        let fds = std::mem::take(&mut message.fds);
        let descriptor = match (number & NONE != 0, fds.is_empty()) {
            (true, true) => None,
            (false, _) => Some(one_descriptor(message.request, fds)?),
            (true, false) => {
                return Err(ProtocolError::Descriptors {
                    request: message.request,
                    found: fds.len(),
                    expected: 0,
                });
            }
        };
        let queue = &mut self.queues[at];
        if request == FrontendReq::SET_VRING_KICK {
            // A running ring listens to the former descriptor. It continues with this one after it
            // has stopped.
            queue.stop();
            queue.kick = descriptor.map(Arc::new);
        } else {
            let bell =
                if request == FrontendReq::SET_VRING_CALL { &queue.call } else { &queue.error };
            let former =
                std::mem::replace(&mut *bell.lock(), descriptor.map(|fd| Arc::new(Call::new(fd))));
            drop(former);
        }
        self.finish(&message, Done::Ok);
        Ok(())
    }
}

fn one_descriptor(request: u32, fds: Vec<OwnedFd>) -> Result<OwnedFd, ProtocolError> {
    let found = fds.len();
    let mut fds = fds.into_iter();
    match (fds.next(), found) {
        (Some(fd), 1) => Ok(fd),
        _ => Err(ProtocolError::Descriptors { request, found, expected: 1 }),
    }
}

fn map(regions: &[VhostUserMemoryRegion], fds: Vec<OwnedFd>) -> Result<MemoryTable, MemoryError> {
    let mapped = regions.iter().zip(fds).map(|(region, fd)| {
        Region::map(
            fd,
            region.mmap_offset,
            region.memory_size,
            region.guest_phys_addr,
            region.user_addr,
        )
    });
    MemoryTable::new(mapped.collect::<Result<_, _>>()?)
}
