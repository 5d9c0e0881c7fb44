//! Messages to one host.

use super::hub::Hub;
use super::wake::Waiter;
use crate::message::{Epoch, Host, Nonce, ToMirror};
use alloc::borrow::Cow;
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{Ordering, fence};
use shootdown::{
    AddressRange, AddressSpace, IntervalNotifier, Invalidation, PassFuture, WouldBlock,
};

/// Work of a transport for a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outgoing {
    /// Send the message.
    Message(ToMirror),
    /// Send contents, with [`Serve::message`].
    Serve(Serve),
}

/// A fetch that must be answered with the contents of a range.
///
/// Wait until the range may be read ([`ready`](Self::ready)), read it, and send the contents with
/// the message. No check after the read is needed: an invalidation that comes in between reaches
/// the mirror before the memory changes, and the mirror then drops the results of earlier fetches.
///
/// **Continue with the link meanwhile**: the invalidation that `ready` waits for may wait for a
/// message of the same link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Serve {
    pub(super) epoch: Epoch,
    pub(super) nonce: Nonce,
    pub(super) range: AddressRange,
    pub(super) version: u64,
}

impl Serve {
    /// Waits until no invalidation of the range is under way in the owner's space, into which the
    /// [`Mirrors`](super::Mirrors) were inserted. Invalidations of other ranges do not delay it.
    ///
    /// # Errors
    /// [`Ended`], if the space was released: nothing can be read any more. Drop the fetch then.
    pub async fn ready(&self, space: &AddressSpace) -> Result<(), Ended> {
        read_unchanged(space, self.range, || ()).await
    }

    /// Returns the range to read.
    pub fn range(&self) -> AddressRange {
        self.range
    }

    /// Returns the mirror's epoch.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Returns the number of the fetch.
    pub fn nonce(&self) -> Nonce {
        self.nonce
    }

    /// Returns the message to send with the contents.
    pub fn message(&self) -> ToMirror {
        ToMirror::Fetched { epoch: self.epoch, nonce: self.nonce, version: self.version }
    }
}

/// Reads a range of the owner's memory while no invalidation of it is under way. Repeats the read
/// if an invalidation has begun meanwhile. So `read` may read memory that is being changed; it must
/// use means that allow that. Invalidations of other ranges do not delay it.
///
/// # Errors
/// [`Ended`], if the space was released: nothing can be read any more.
pub async fn read_unchanged<T>(
    space: &AddressSpace,
    range: AddressRange,
    mut read: impl FnMut() -> T,
) -> Result<T, Ended> {
    // A reader of its own range waits for no invalidation of another range (N2).
    let reader = space.insert(range, Reader).map_err(|_| Ended)?;
    loop {
        let seen = reader.read_begin().await;
        let contents = read();
        // The pair of the fence in the first pass of `Reader`.
        fence(Ordering::Acquire);
        if !reader.read_retry(seen) {
            return Ok(contents);
        }
    }
}

/// Error: the owner's space was released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended;

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the owner's address space was released: there is nothing to read")
    }
}

impl core::error::Error for Ended {}

/// A reader for a fetch. It holds nothing that must be released.
struct Reader;

impl IntervalNotifier for Reader {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        // `read_unchanged` checks the sequence without a lock, after it has read. Whoever has read
        // what the owner stores after this pass, and then fences, sees the sequence above.
        fence(Ordering::Release);
        Ok(None)
    }

    fn name(&self) -> Cow<'static, str> {
        Cow::Borrowed("fetch")
    }
}

/// Queue of messages to a host. A message that finds no room is dropped, as if the network had lost
/// it.
pub(super) struct Outbox {
    pub(super) generation: u64,
    pub(super) queue: VecDeque<Outgoing>,
    pub(super) waiter: Arc<Waiter>,
}

/// Messages to a host, for its transport. A newer link of the same host ends this one.
///
/// It has room for the `Inv` of the whole window, and as many answers. A message that finds no room
/// is dropped and counted ([`Hub::dropped`]), so that a stalled transport does not cost the owner
/// memory. The protocol repeats important messages.
pub struct Link {
    pub(super) hub: Hub,
    pub(super) host: Host,
    pub(super) generation: u64,
    pub(super) waiter: Arc<Waiter>,
}

impl Link {
    /// Waits for the next message to send. Returns `None` when a newer link has replaced this one.
    ///
    /// # Cancel safety
    /// The future may be dropped at any moment. A message that it has not returned stays queued.
    pub async fn next(&mut self) -> Option<Outgoing> {
        let (host, generation) = (self.host, self.generation);
        let look = |outbox: Option<&mut Outbox>| match outbox
            .filter(|outbox| outbox.generation == generation)
        {
            Some(outbox) => outbox.queue.pop_front().map(Some),
            None => Some(None),
        };
        self.hub
            .inner
            .state
            .until(&self.waiter, |state, _| look(state.outboxes.get_mut(&host)))
            .await
    }

    /// Returns the host of the link.
    pub fn host(&self) -> Host {
        self.host
    }
}

/// Drops the queued messages. No epoch ends.
impl Drop for Link {
    fn drop(&mut self) {
        self.hub.inner.state.with(|state, _| {
            if state
                .outboxes
                .get(&self.host)
                .is_some_and(|outbox| outbox.generation == self.generation)
            {
                state.outboxes.remove(&self.host);
            }
        });
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("host", &self.host).finish_non_exhaustive()
    }
}
