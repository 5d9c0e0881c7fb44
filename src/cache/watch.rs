//! The source that reports changes of registered memory, where the program does not report them
//! itself (K5).
#![forbid(unsafe_code)]

use super::error::Unwatched;
use super::settings::Builder;
use crate::range::AddressRange;
#[cfg(test)]
use core::sync::atomic::{AtomicBool, Ordering};

/// Source of invalidations of registered memory: a `Uffd`, or none. Without one the cache learns
/// only of the program's own invalidations.
pub(super) struct Source {
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    uffd: Option<crate::source::Uffd>,
    #[cfg(test)]
    pub(super) forked: AtomicBool,
}

/// Keeps a range watched as long as it exists. Its drop takes a lock of the source.
#[derive(Default)]
pub(super) struct Watched {
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    _watch: Option<crate::source::Watch>,
}

impl Source {
    /// Takes the source out of `settings`.
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

    /// Returns `true` if there is a source. The other methods need not be called otherwise.
    pub(super) fn is_set(&self) -> bool {
        #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
        return cfg!(test) || self.uffd.is_some();
        #[cfg(not(all(feature = "userfaultfd", target_os = "linux")))]
        return cfg!(test);
    }

    /// Returns `true` in a child of the process that owns the source (M4). Threads that do not
    /// exist in the child may hold its locks, so nothing may be locked or given up.
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

    /// Returns `true` if only the cache holds the source. The source then holds the space, but no
    /// one can invalidate through it.
    pub(super) fn is_abandoned(&self) -> bool {
        #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
        return self.uffd.as_ref().is_some_and(crate::source::Uffd::is_abandoned);
        #[cfg(not(all(feature = "userfaultfd", target_os = "linux")))]
        false
    }

    /// Watches `range` if there is a source.
    #[cfg_attr(
        not(all(feature = "userfaultfd", target_os = "linux")),
        allow(unused_variables, reason = "no source can be set")
    )]
    pub(super) fn watch(&self, range: AddressRange) -> Result<Watched, Unwatched> {
        #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
        if let Some(uffd) = &self.uffd {
            let watch = uffd.watch_quietly(range).map_err(Unwatched::Source)?;
            return Ok(Watched { _watch: Some(watch) });
        }
        Ok(Watched::default())
    }
}

impl Unwatched {
    /// Returns `true` if the process has no mappings left. Each watch may split one. Giving up
    /// other watches may make room.
    pub(super) fn is_full(&self) -> bool {
        #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
        return matches!(self, Self::Source(crate::source::UffdError::NoRoom { .. }));
        #[cfg(not(all(feature = "userfaultfd", target_os = "linux")))]
        false
    }
}
