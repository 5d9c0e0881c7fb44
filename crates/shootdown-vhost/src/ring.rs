//! A split virtqueue of a device behind an IOMMU.
//!
//! The memory of the ring itself is translated and can be invalidated like any other. So it is
//! accessed under the lock of the IOTLB, and never while something is waited for: the front-end
//! serves no miss while it waits for the answer to an INVALIDATE.
#![forbid(unsafe_code)]

mod end;
mod split;
mod wait;

use crate::bell::{Bell, Call};
use crate::buffers::Buffers;
use crate::iotlb::{Iotlb, MapError, Want};
use crate::sync::Lock;
pub(crate) use end::End;
use end::Progress;
use futures::channel::oneshot;
use futures::future::{Either, select};
use shootdown::{Reached, Timeline};
use split::{Descriptor, Layout};
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

/// A descriptor that may be replaced while the ring runs.
pub(crate) type Replaceable = Arc<Lock<Option<Arc<Call>>>>;

/// Settings of a ring from the front-end.
pub(crate) struct Setup {
    pub(crate) index: u16,
    pub(crate) layout: Layout,
    /// Where the ring begins, and what the former ring has left.
    pub(crate) before: End,
    pub(crate) features: u64,
    pub(crate) kick: Arc<OwnedFd>,
    pub(crate) call: Replaceable,
    pub(crate) error: Replaceable,
    pub(crate) iotlb: Iotlb,
}

/// Returns the layout of a ring with these addresses. For the session.
pub(crate) fn layout(
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    event_idx: bool,
) -> Layout {
    Layout { size, descriptors, available, used, event_idx }
}

/// A running ring. The device takes [chains](Self::next) from it until the ring is
/// [stopping](Next::Stopping), and then drops it. The front-end learns that the ring has stopped
/// when the ring and all of its chains are gone (V4).
///
/// If it is dropped earlier, the queue is dead until the guest's driver resets the device.
/// SET_VRING_ERR tells the front-end.
pub struct Ring {
    shared: Arc<Shared>,
    next: u16,
    bell: Option<Arc<Bell>>,
}

struct Shared {
    setup: Setup,
    /// Signalled with [`STOP`], then with [`HURRY`].
    stop: Timeline,
    base: AtomicU16,
    progress: Lock<Progress>,
    ended: Option<oneshot::Sender<End>>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        let end = self.progress.lock().end(*self.base.get_mut());
        if let Some(ended) = self.ended.take() {
            let _ = ended.send(end);
        }
    }
}

/// The ring takes no more requests.
const STOP: u64 = 1;
/// The ring no longer waits for a translation: the front-end itself waits, or has disconnected.
const HURRY: u64 = 2;

/// The session's handle of a ring, to stop it.
pub(crate) struct Running {
    stop: Timeline,
    shared: std::sync::Weak<Shared>,
    pub(crate) ended: oneshot::Receiver<End>,
}

impl Running {
    pub(crate) fn stop(&self) {
        self.stop.signal(STOP);
    }

    pub(crate) fn hurry(&self) {
        self.stop.signal(HURRY);
    }

    /// Returns the next entry of the available ring, if the ring has ended.
    pub(crate) fn base(&self) -> Option<u16> {
        self.shared.upgrade().map(|shared| shared.base.load(Ordering::Acquire))
    }
}

/// Result of [`Ring::next`].
#[derive(Debug)]
#[non_exhaustive]
pub enum Next {
    /// A request with all of its buffers mapped.
    Chain(Chain),
    /// There is no request. The driver kicks when there is one: wait until [`Ring::kick`] is
    /// readable.
    Empty,
    /// The front-end stops the ring, or it has failed before. Finish what is in flight, and drop
    /// the ring.
    Stopping,
}

/// Reason why a ring cannot continue. The guest's driver must reset the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// The memory of the ring, or a buffer, has no translation.
    #[error("{what}: {error}")]
    Map {
        /// The part that was to be mapped.
        what: &'static str,
        /// The reason.
        error: MapError,
    },
    /// An index of the ring is not aligned, or not contiguous.
    #[error("the ring is not laid out as a ring")]
    Layout,
    /// The driver has made more entries available than the ring has.
    #[error("the available ring is {0} entries ahead, which is more than it has")]
    Ahead(u16),
    /// The thread cannot wait.
    #[error("the thread cannot wait for the ring: {error}")]
    Wait {
        /// Error of the kernel.
        error: std::io::ErrorKind,
    },
    /// A chain of descriptors loops, leaves its table, or contains a table inside of a table.
    #[error("the chain of descriptors at {head} is malformed")]
    Chain {
        /// First descriptor of the chain.
        head: u16,
    },
}

/// Reason why a request was not put into the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CompleteError {
    /// The ring is stopping, and its used ring has no translation now.
    #[error("the ring is stopping, and its used ring is not mapped")]
    Stopping,
    /// The used ring cannot be written.
    #[error(transparent)]
    Ring(#[from] RingError),
}

impl Ring {
    pub(crate) fn start(mut setup: Setup) -> (Self, Running) {
        let (sender, ended) = oneshot::channel();
        let before = std::mem::take(&mut setup.before);
        let (next, stop) = (before.base, Timeline::new());
        let (base, progress) = (AtomicU16::new(next), Lock::new(Progress::after(before)));
        let shared =
            Arc::new(Shared { setup, stop: stop.clone(), base, progress, ended: Some(sender) });
        let running = Running { stop, shared: Arc::downgrade(&shared), ended };
        (Self { shared, next, bell: None }, running)
    }

    /// Returns the number of the queue.
    pub fn index(&self) -> u16 {
        self.shared.setup.index
    }

    /// Returns the number of descriptors.
    pub fn size(&self) -> u16 {
        self.shared.setup.layout.size
    }

    /// Returns the virtio features that the guest's driver has accepted.
    pub fn features(&self) -> u64 {
        self.shared.setup.features
    }

    /// Returns the IOTLB of the device.
    pub fn iotlb(&self) -> &Iotlb {
        &self.shared.setup.iotlb
    }

    /// Returns an eventfd that is readable when the driver has made a request available. Read it
    /// (it may block if it is not readable), then look at the ring again. A stop does not make it
    /// readable: also wait for [`stopping`](Self::stopping), or leave both to
    /// [`next_wait`](Self::next_wait).
    pub fn kick(&self) -> BorrowedFd<'_> {
        self.shared.setup.kick.as_fd()
    }

    /// Resolves when the front-end stops the ring, or when the ring has [failed](Self::next).
    pub fn stopping(&self) -> Reached {
        self.shared.stop.reached(STOP)
    }

    /// Returns the next request. It waits for translations only, and holds none while it waits
    /// (V2).
    ///
    /// # Errors
    /// [`RingError`]. The front-end is told (SET_VRING_ERR). Drop the ring then.
    ///
    /// # Cancel safety
    /// The future may be dropped at any moment. It has then taken no request.
    pub async fn next(&mut self) -> Result<Next, RingError> {
        let stopping = pin!(self.shared.stop.reached(STOP));
        let taken = match select(stopping, pin!(self.take())).await {
            Either::Left(_) => return Ok(Next::Stopping),
            Either::Right((taken, _)) => taken,
        };
        match taken {
            Ok(Some(chain)) => {
                self.shared.progress.lock().take(self.next);
                self.next = self.next.wrapping_add(1);
                self.shared.base.store(self.next, Ordering::Release);
                Ok(Next::Chain(chain))
            }
            Ok(None) => Ok(Next::Empty),
            // A front-end that has stopped the device refuses to translate.
            Err(_) if self.shared.stop.value() >= STOP => Ok(Next::Stopping),
            Err(error) => {
                // The ring takes no more requests.
                self.shared.stop.signal(STOP);
                ring_bell(&self.shared.setup.error);
                Err(error)
            }
        }
    }

    async fn take(&self) -> Result<Option<Chain>, RingError> {
        let iotlb = &self.shared.setup.iotlb;
        let Some((head, mut found)) = self.find().await? else { return Ok(None) };
        if let Some(table) = found.pop_if(|last| last.is_indirect()) {
            let len = split::table_len(table).ok_or(RingError::Chain { head })?;
            let want = [Want::read(table.address, len)];
            let read =
                iotlb.peek(&want, |[table]| split::chain(table, 0, len / split::DESCRIPTOR, head));
            let mut rest = read
                .await
                .map_err(|error| RingError::Map { what: "a table of descriptors", error })??;
            if rest.iter().any(Descriptor::is_indirect) {
                return Err(RingError::Chain { head });
            }
            // Descriptors of the ring may be followed by a table.
            found.append(&mut rest);
        }
        if found.iter().map(|descriptor| u64::from(descriptor.len)).sum::<u64>()
            > split::LONGEST_CHAIN
        {
            return Err(RingError::Chain { head });
        }
        found.retain(|descriptor| descriptor.len > 0);
        let wants: Vec<_> = found.iter().map(Descriptor::want).collect();
        let mapped = iotlb
            .map_all(&wants)
            .await
            .map_err(|error| RingError::Map { what: "a buffer", error })?;
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        for (descriptor, mapping) in found.iter().zip(mapped) {
            if descriptor.is_writable() { writable.push(mapping) } else { readable.push(mapping) }
        }
        let (readable, writable) = (Buffers::new(readable), Buffers::new(writable));
        Ok(Some(Chain { head, entry: self.next, readable, writable, shared: self.shared.clone() }))
    }

    /// Returns the next head and its descriptors in the ring's table.
    async fn find(&self) -> Result<Option<(u16, Vec<Descriptor>)>, RingError> {
        let Setup { layout, iotlb, .. } = &self.shared.setup;
        let (wants, mut calls) = (layout.all(), false);
        let looked = iotlb.peek(&wants, |[descriptors, available, used]| {
            // Known from now on: a stop has no translation to wait for.
            calls |= self.shared.progress.lock().begin(*layout, used)?;
            let mut ahead = layout.ahead(available, self.next)?;
            if ahead == 0 {
                layout.want_kick(used, self.next)?;
                ahead = layout.ahead(available, self.next)?;
            }
            // Each request has a descriptor of its own until the driver is told of it.
            let full = self.shared.progress.lock().in_flight() >= usize::from(layout.size);
            if ahead == 0 || ahead > layout.size || full {
                return Some(Err(ahead));
            }
            let head = layout.head(available, self.next)?;
            Some(Ok((head, split::chain(descriptors, head, u64::from(layout.size), head))))
        });
        let looked = looked.await;
        if calls {
            ring_bell(&self.shared.setup.call);
        }
        let looked = looked.map_err(|error| RingError::Map { what: "the ring", error })?;
        match looked.ok_or(RingError::Layout)? {
            Err(0) => Ok(None),
            Err(ahead) => Err(RingError::Ahead(ahead)),
            Ok((head, found)) => Ok(Some((head, found?))),
        }
    }
}

impl Shared {
    /// Puts a request into the used ring. The used ring is translated first, then the entry is
    /// taken: a request that completes meanwhile gets the entry before it.
    async fn push(&self, entry: u16, head: u16, len: u32) -> Result<(), CompleteError> {
        let Setup { layout, iotlb, .. } = &self.setup;
        let wants = layout.to_put();
        let put = pin!(iotlb.peek(&wants, |[available, used]| {
            let mut progress = self.progress.lock();
            let others = progress.begin(*layout, used)?;
            let at = progress.tell(*layout, used, entry, head, len)?;
            drop(progress);
            Some(layout.wants_call(available, at)? || others)
        }));
        // Polled first, so that it succeeds also during a stop, if that is possible without an
        // answer.
        let put = match select(put, self.stop.reached(HURRY)).await {
            Either::Left((put, _)) => Some(put),
            Either::Right(_) => None,
        };
        let calls = match put {
            Some(Ok(put)) => put.ok_or(RingError::Layout)?,
            // A front-end that has stopped the device refuses to translate. The next ring tells the
            // driver.
            failed => {
                self.progress.lock().keep(entry, head, len);
                let error = failed.and_then(Result::err).filter(|_| self.stop.value() < STOP);
                let error = error.map(|error| RingError::Map { what: "the used ring", error });
                return Err(error.map_or(CompleteError::Stopping, CompleteError::Ring));
            }
        };
        if calls {
            ring_bell(&self.setup.call);
        }
        Ok(())
    }
}

fn ring_bell(bell: &Replaceable) {
    let bell = bell.lock().clone();
    if let Some(bell) = bell {
        bell.ring();
    }
}

/// A request of the driver: buffers that the device may read, and buffers that it may write. The
/// buffers are in flight as long as it exists.
///
/// If it is dropped without [`complete`](Self::complete), it is taken again when the ring is
/// stopped and continues. If later requests are done, it is lost. If it is leaked, its ring never
/// ends, and a front-end that stops the ring waits for ever. Do not ask for another translation
/// while you have a chain: the front-end may be waiting for it (V2).
pub struct Chain {
    head: u16,
    /// Its entry in the available ring.
    entry: u16,
    readable: Buffers,
    writable: Buffers,
    shared: Arc<Shared>,
}

impl Chain {
    /// Returns the first descriptor, which identifies the request for the driver.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Returns the buffers that the device may read.
    pub fn readable(&self) -> &Buffers {
        &self.readable
    }

    /// Returns the buffers that the device may write.
    pub fn writable(&self) -> &Buffers {
        &self.writable
    }

    /// Completes the request: the device has ended its access, and has written the first `len`
    /// bytes of the writable buffers. It may have written more that the driver must not use (0 if
    /// only the status counts). Drops the buffers first, then puts the request into the used ring.
    ///
    /// # Errors
    /// [`CompleteError`]. The driver is not told then. If the ring is stopping, the driver is told
    /// when the ring continues.
    ///
    /// # Cancel safety
    /// If the future is dropped, the buffers have been dropped, and the driver may be told or not.
    pub async fn complete(self, len: u32) -> Result<(), CompleteError> {
        let Self { head, entry, readable, writable, shared } = self;
        drop((readable, writable));
        shared.push(entry, head, len).await
    }

    /// Puts the request into the used ring while the buffers are still in use. A fault, for tests
    /// of guests.
    #[doc(hidden)]
    pub async fn complete_early(&self, len: u32) -> Result<(), CompleteError> {
        self.shared.push(self.entry, self.head, len).await
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Chain({}, reads {}, writes {})",
            self.head,
            self.readable.len(),
            self.writable.len()
        )
    }
}

impl Drop for Ring {
    /// A ring that the device drops by itself is dead: the guest waits for the requests in it.
    fn drop(&mut self) {
        if self.shared.stop.value() == 0 {
            tracing::warn!(
                ring = self.index(),
                "the device has dropped a ring that was not to stop"
            );
            ring_bell(&self.shared.setup.error);
        }
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ring({}, next {})", self.index(), self.next)
    }
}
