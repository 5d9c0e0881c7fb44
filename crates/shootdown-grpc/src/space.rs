//! A space that a server offers: its memory, its contents, and the mirrors that may join.
#![forbid(unsafe_code)]

use crate::name::Name;
use bytes::Bytes;
use futures::future::BoxFuture;
use shootdown::{AddressRange, AddressSpace};
use shootdown_lease::Host;
use shootdown_lease::engine::{Hub, read_unchanged};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use thiserror::Error;

/// Error: a range cannot be read. The fetch is refused
/// ([`Refusal::Contents`](shootdown_lease::Refusal::Contents)).
#[derive(Debug, Error)]
#[error("the range cannot be read: {0}")]
pub struct Unreadable(
    /// The reason.
    pub Box<dyn std::error::Error + Send + Sync>,
);

impl Unreadable {
    /// Makes an error from a text or another error.
    pub fn new(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self(why.into())
    }
}

/// Reads the owner's memory for mirrors that fetch it.
///
/// A mirror may ask for any range: refuse memory that is not shared. Read only while no
/// invalidation of the range is under way in the owner's `AddressSpace`, as [`Checked`] does.
pub trait Contents: Send + Sync + 'static {
    /// Returns all bytes of a range, exactly as many as it has.
    fn read(&self, range: AddressRange) -> BoxFuture<'_, Result<Bytes, Unreadable>>;
}

/// Contents that a function reads from a shared range, while no invalidation of the part is under
/// way.
///
/// If an invalidation begins during a read, the read is repeated. So the function may read memory
/// that is being changed; it must use means that allow that, such as a file or `process_vm_readv`.
pub struct Checked<F> {
    space: AddressSpace,
    shared: AddressRange,
    read: F,
}

impl<F: Fn(AddressRange) -> Result<Bytes, Unreadable>> Checked<F> {
    /// Makes contents of `space`, into which the hub's
    /// [`Mirrors`](shootdown_lease::engine::Mirrors) were inserted over the range `shared`. The
    /// function runs on the server's threads and should not wait.
    pub fn new(space: AddressSpace, shared: AddressRange, read: F) -> Self {
        Self { space, shared, read }
    }
}

impl<F> Contents for Checked<F>
where
    F: Fn(AddressRange) -> Result<Bytes, Unreadable> + Send + Sync + 'static,
{
    fn read(&self, range: AddressRange) -> BoxFuture<'_, Result<Bytes, Unreadable>> {
        Box::pin(async move {
            if !self.shared.covers(range) {
                return Err(Unreadable::new(format!("{range} is not shared: {} is", self.shared)));
            }
            let contents = read_unchanged(&self.space, range, || (self.read)(range)).await;
            contents.map_err(|ended| Unreadable::new(ended.to_string()))?
        })
    }
}

impl<F> fmt::Debug for Checked<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checked").field("shared", &self.shared).finish_non_exhaustive()
    }
}

/// A space that mirrors may join.
///
/// The program itself spawns [`Hub::run`]: invalidations that wait for a dead mirror end only while
/// that runs.
#[derive(Clone)]
pub struct Space {
    pub(crate) hub: Hub,
    pub(crate) contents: Arc<dyn Contents>,
    admitted: BTreeMap<Name, Host>,
}

impl Space {
    /// Makes the space of a hub. No mirror may join it yet; see [`admit`](Self::admit). When the
    /// hub's owner no longer [holds](shootdown_lease::engine::Hub::while_held) the memory, streams
    /// end, so that mirrors look for another owner.
    pub fn new(hub: Hub, contents: impl Contents) -> Self {
        Self { hub, contents: Arc::new(contents), admitted: BTreeMap::new() }
    }

    /// Admits holders of a certificate with this name, as this host. Several names may be one host
    /// (an old and a new one). A host has one stream, so two machines need two hosts.
    pub fn admit(mut self, name: impl Into<Name>, host: Host) -> Self {
        self.admitted.insert(name.into(), host);
        self
    }

    /// Returns `true` if any of these names is admitted.
    pub(crate) fn knows(&self, names: &[Name]) -> bool {
        names.iter().any(|name| self.admitted.contains_key(name))
    }

    /// Returns the host with these names; `None` if there is none or more than one.
    pub(crate) fn host_of(&self, names: &[Name]) -> Option<Host> {
        let mut hosts = names.iter().filter_map(|name| self.admitted.get(name).copied());
        let host = hosts.next()?;
        hosts.all(|other| other == host).then_some(host)
    }
}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Space")
            .field("hub", &self.hub)
            .field("admitted", &self.admitted)
            .finish_non_exhaustive()
    }
}
