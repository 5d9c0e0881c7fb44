//! What goes out to one host.

use super::hub::Hub;
use super::wake::Waiter;
use crate::message::{Epoch, Host, Nonce, ToMirror};
use alloc::borrow::Cow;
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use core::fmt;
use shootdown::{
    AddressRange, AddressSpace, IntervalNotifier, Invalidation, PassFuture, WouldBlock,
};

/// What a transport has to do for a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outgoing {
    /// Send it.
    Message(ToMirror),
    /// Send contents, with [`Serve::message`].
    Serve(Serve),
}

/// A fetch to be answered with the contents of a range.
///
/// Wait until it may be read ([`ready`](Self::ready)), read the range, send what was read with the
/// message. Nothing has to be checked after the reading: an invalidation that comes in between
/// reaches the mirror before the memory changes, and the mirror drops what it had asked for before
/// that.
///
/// **Go on with the link meanwhile**: the invalidation that is waited for may be waiting for a
/// message of the same link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Serve {
    pub(super) epoch: Epoch,
    pub(super) nonce: Nonce,
    pub(super) range: AddressRange,
    pub(super) version: u64,
}

impl Serve {
    /// Waits until no invalidation of the range is under way in the owner's space, the one into
    /// which the [`Mirrors`](super::Mirrors) were inserted. Invalidations of other ranges hold
    /// nobody up.
    ///
    /// # Errors
    /// [`Ended`], if the space was released: nothing can be read any more. Drop the fetch then.
    pub async fn ready(&self, space: &AddressSpace) -> Result<(), Ended> {
        read_unchanged(space, self.range, || ()).await
    }

    /// What to read.
    pub fn range(&self) -> AddressRange {
        self.range
    }

    /// The mirror's epoch.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Of the fetch.
    pub fn nonce(&self) -> Nonce {
        self.nonce
    }

    /// What the contents are sent with.
    pub fn message(&self) -> ToMirror {
        ToMirror::Fetched { epoch: self.epoch, nonce: self.nonce, version: self.version }
    }
}

/// Reads a range of the owner's memory while no invalidation of it is under way; again, if one has
/// begun meanwhile. So `read` may read what is being changed, by means that allow that.
/// Invalidations of other ranges hold nobody up.
///
/// # Errors
/// [`Ended`], if the space was released: nothing can be read any more.
pub async fn read_unchanged<T>(
    space: &AddressSpace,
    range: AddressRange,
    mut read: impl FnMut() -> T,
) -> Result<T, Ended> {
    // Of its own range, so that it waits for no invalidation of another one (N2).
    let reader = space.insert(range, Reader).map_err(|_| Ended)?;
    loop {
        let seen = reader.read_begin().await;
        let contents = read();
        if !reader.read_retry(seen) {
            return Ok(contents);
        }
    }
}

/// The owner's space was released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended;

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the owner's address space was released: there is nothing to read")
    }
}

impl core::error::Error for Ended {}

/// Who reads for a fetch: nothing of it has to be let go of.
struct Reader;

impl IntervalNotifier for Reader {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        Ok(None)
    }

    fn name(&self) -> Cow<'static, str> {
        Cow::Borrowed("fetch")
    }
}

/// What waits to go out to a host. What finds no room is dropped, as if the network had lost it.
pub(super) struct Outbox {
    pub(super) generation: u64,
    pub(super) queue: VecDeque<Outgoing>,
    pub(super) waiter: Arc<Waiter>,
}

/// The way out to a host: what its transport sends. A newer link of the same host ends this one.
///
/// It keeps `Inv` for the whole window and as many answers again; what finds no room is dropped and
/// counted ([`Hub::dropped`]), because a transport that stands still must not cost the owner
/// memory. The protocol sends again what matters.
pub struct Link {
    pub(super) hub: Hub,
    pub(super) host: Host,
    pub(super) generation: u64,
    pub(super) waiter: Arc<Waiter>,
}

impl Link {
    /// The next to send, once there is one; `None` when a newer link has taken over. Cancel safe:
    /// what it does not return stays.
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

    /// Whose it is.
    pub fn host(&self) -> Host {
        self.host
    }
}

/// What waits is dropped; no epoch ends.
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
