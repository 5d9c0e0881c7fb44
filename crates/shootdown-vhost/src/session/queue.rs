//! A queue as the front-end has set it up, and its ring while that runs.
#![forbid(unsafe_code)]

use crate::iotlb::Iotlb;
use crate::memory::MemoryTable;
use crate::ring::{End, Replaceable, Ring, Running, Setup, layout};
use futures::FutureExt;
use futures::task::noop_waker;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::{Context, Poll};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// Addresses of a ring: I/O virtual ones, or the front-end's own without an IOMMU.
#[derive(Clone, Copy)]
pub(super) struct Addresses {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

enum Phase {
    Stopped(End),
    Running(Running),
    /// The ring was told to stop.
    Ending(Running),
}

pub(super) struct Queue {
    pub(super) size: u16,
    pub(super) addresses: Option<Addresses>,
    pub(super) enabled: bool,
    pub(super) kick: Option<Arc<OwnedFd>>,
    pub(super) call: Replaceable,
    pub(super) error: Replaceable,
    /// Number of answers that wait for the ring's end. No other ring starts before.
    pub(super) awaited: u32,
    /// Start of the next ring, if the front-end has set it before this ring has ended.
    next: Option<u16>,
    phase: Phase,
}

impl Default for Queue {
    fn default() -> Self {
        let phase = Phase::Stopped(End::default());
        let (call, error) = (Replaceable::default(), Replaceable::default());
        Self {
            size: 0,
            addresses: None,
            enabled: false,
            kick: None,
            call,
            error,
            awaited: 0,
            next: None,
            phase,
        }
    }
}

impl Queue {
    /// Returns where a stopped ring continues.
    pub(super) fn base(&self) -> Option<u16> {
        if let Phase::Stopped(end) = &self.phase { Some(end.base) } else { None }
    }

    /// Returns how far the ring has come, running or stopped.
    pub(super) fn base_now(&self) -> u16 {
        match &self.phase {
            Phase::Stopped(end) => end.base,
            Phase::Running(running) | Phase::Ending(running) => running.base().unwrap_or(0),
        }
    }

    /// Sets the start of the next ring. Returns `false` if the ring runs and keeps its place.
    pub(super) fn set_base(&mut self, base: u16) -> bool {
        // The device may have dropped its ring just now.
        self.poll_ended(&mut Context::from_waker(&noop_waker()));
        match self.phase {
            Phase::Stopped(_) => self.begin_at(base),
            Phase::Ending(_) => self.next = Some(base),
            Phase::Running(_) => return false,
        }
        true
    }

    /// Returns the start of the next ring, if it is known before this ring has ended.
    pub(super) fn next_base(&self) -> Option<u16> {
        self.next
    }

    /// Records that its end has been answered.
    pub(super) fn answered(&mut self) {
        self.awaited -= 1;
        if self.awaited == 0 {
            self.go_on();
        }
    }

    fn go_on(&mut self) {
        if let Some(base) = self.next.take() {
            self.begin_at(base);
        }
    }

    /// Sets the start. Completed requests that could not be put stay only if the ring continues
    /// where the former one has ended.
    fn begin_at(&mut self, base: u16) {
        if self.base() != Some(base) {
            self.phase = Phase::Stopped(End::at(base));
        }
    }

    pub(super) fn stop(&mut self) {
        let phase = std::mem::replace(&mut self.phase, Phase::Stopped(End::default()));
        self.phase = match phase {
            Phase::Running(running) => {
                running.stop();
                Phase::Ending(running)
            }
            other => other,
        };
    }

    /// Lets the ring end without translations: the front-end waits for its end, or has
    /// disconnected.
    pub(super) fn disconnect(&mut self) {
        self.kick = None;
        self.stop();
        if let Phase::Ending(running) = &self.phase {
            running.hurry();
        }
    }

    pub(super) fn poll_ended(&mut self, cx: &mut Context<'_>) {
        if let Phase::Running(running) | Phase::Ending(running) = &mut self.phase
            && let Poll::Ready(end) = running.ended.poll_unpin(cx)
        {
            // If the device has dropped the ring by itself, the queue needs a new kick.
            if let Phase::Running(_) = self.phase {
                self.kick = None;
            }
            self.phase = Phase::Stopped(end.unwrap_or_default());
            if self.awaited == 0 {
                self.go_on();
            }
        }
    }

    /// Starts a ring, if one should run and none does.
    pub(super) fn start(
        &mut self,
        index: u16,
        features: u64,
        implicit: bool,
        memory: Option<&MemoryTable>,
        iotlb: &Iotlb,
    ) -> Option<Ring> {
        let Phase::Stopped(before) = &self.phase else { return None };
        let (before, addresses, kick) = (before.clone(), self.addresses?, self.kick.clone()?);
        if !(self.enabled || implicit) || self.size == 0 || self.awaited > 0 {
            return None;
        }
        let place = |user: u64| match memory {
            None => Some(user),
            Some(memory) => {
                memory.find_user(user).map(|(place, _)| place.region.guest() + place.offset as u64)
            }
        };
        let parts =
            (place(addresses.descriptors), place(addresses.available), place(addresses.used));
        let (Some(descriptors), Some(available), Some(used)) = parts else {
            tracing::warn!(index, "a ring that is not in the guest's memory does not start");
            self.kick = None;
            return None;
        };
        let event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let layout = layout(self.size, descriptors, available, used, event_idx);
        let (call, error, iotlb) = (self.call.clone(), self.error.clone(), iotlb.clone());
        let (ring, running) =
            Ring::start(Setup { index, layout, before, features, kick, call, error, iotlb });
        self.phase = Phase::Running(running);
        Some(ring)
    }
}
