//! Who says when memory goes away, where it is not the program itself (K5).
#![forbid(unsafe_code)]

use super::error::Unwatched;
use super::settings::Builder;
use crate::range::AddressRange;
#[cfg(test)]
use core::sync::atomic::{AtomicBool, Ordering};

/// What tells the space that registered memory has changed: a userfaultfd, or nobody but the
/// program.
pub(super) struct Source {
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    uffd: Option<crate::source::Uffd>,
    #[cfg(test)]
    pub(super) forked: AtomicBool,
}

/// A range is watched as long as this exists. Its drop takes a lock of the source.
#[derive(Default)]
pub(super) struct Watched {
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    _watch: Option<crate::source::Watch>,
}

impl Source {
    /// Takes what the settings have.
    #[cfg_attr(
        not(all(feature = "userfaultfd", target_os = "linux")),
        allow(unused_variables, reason = "they have none")
    )]
    pub(super) fn of<D>(settings: &mut Builder<D>) -> Self {
        Self {
            #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
            uffd: settings.uffd.take(),
            #[cfg(test)]
            forked: AtomicBool::new(false),
        }
    }

    /// Whether there is one, so that its other answers are worth asking for.
    pub(super) fn is_set(&self) -> bool {
        #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
        return cfg!(test) || self.uffd.is_some();
        #[cfg(not(all(feature = "userfaultfd", target_os = "linux")))]
        return cfg!(test);
    }

    /// Whether this is a child of the process that the source belongs to (M4). Its locks may be
    /// held for ever by threads that do not exist here: nothing may be locked, nothing given up.
    pub(super) fn is_inert(&self) -> bool {
        #[cfg(test)]
        if self.forked.load(Ordering::Relaxed) {
            return true;
        }
        #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
        return self.uffd.as_ref().is_some_and(crate::source::Uffd::is_forked);
        #[cfg(not(all(feature = "userfaultfd", target_os = "linux")))]
        false
    }

    /// Whether there is one that nobody has but the cache: it has the space, and nobody reaches
    /// that through it.
    pub(super) fn is_abandoned(&self) -> bool {
        #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
        return self.uffd.as_ref().is_some_and(crate::source::Uffd::is_abandoned);
        #[cfg(not(all(feature = "userfaultfd", target_os = "linux")))]
        false
    }

    /// Watches `range`, if there is a source.
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    pub(super) fn watch(&self, range: AddressRange) -> Result<Watched, Unwatched> {
        let watch = self.uffd.as_ref().map(|uffd| uffd.watch_quietly(range)).transpose();
        watch.map(|watch| Watched { _watch: watch }).map_err(Unwatched::Source)
    }

    /// Does nothing: there is no source.
    #[cfg(not(all(feature = "userfaultfd", target_os = "linux")))]
    pub(super) fn watch(&self, _range: AddressRange) -> Result<Watched, Unwatched> {
        Ok(Watched::default())
    }
}

impl Unwatched {
    /// Whether the process has used up its mappings: each watch may split one. With others given up
    /// there may be room for a further watch.
    pub(super) fn is_full(&self) -> bool {
        #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
        return matches!(self, Self::Source(crate::source::UffdError::NoRoom { .. }));
        #[cfg(not(all(feature = "userfaultfd", target_os = "linux")))]
        false
    }
}
