//! [`Event`]: the reason for an invalidation; [`Owner`]: on whose behalf it happens.
#![forbid(unsafe_code)]

use core::num::NonZeroU64;
use core::sync::atomic::{AtomicU64, Ordering};

/// Identifies the driver that causes a migration or an exclusive mapping. Its own notifier can then
/// recognise the event and ignore it (rule [S4](crate::docs::contract)).
///
/// Two owners are equal if their numbers are. The kernel compares a `void *` that the driver
/// chooses. A notifier finds the owner with [`Invalidation::owner`](crate::Invalidation::owner).
///
/// ```
/// use shootdown::{Event, Owner};
///
/// let driver = Owner::new();
/// let event = Event::Migrate { owner: Some(driver) };
/// assert_eq!(event.owner(), Some(driver));
/// assert_ne!(event.owner(), Some(Owner::new()));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner(NonZeroU64);

impl Owner {
    /// Makes an owner that differs from every other one that this function makes in the process.
    #[expect(
        clippy::new_without_default,
        reason = "each call returns another value, which a default must not"
    )]
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        // A process does not live long enough for 2^64 owners. The next one after these would equal
        // the first.
        Self(NonZeroU64::new(NEXT.fetch_add(1, Ordering::Relaxed)).unwrap_or(NonZeroU64::MIN))
    }

    /// Makes an owner of a number that the caller chooses, such as the address of its device.
    pub const fn from_raw(raw: NonZeroU64) -> Self {
        Self(raw)
    }
}

/// Says why memory is invalidated: the kernel's `enum mmu_notifier_event`.
///
/// [`AddressSpace::invalidate`](crate::AddressSpace::invalidate) takes it, and a driver reads it
/// with [`Invalidation::event`](crate::Invalidation::event).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// `MMU_NOTIFY_UNMAP`: the range is unmapped or moved. Its contents are lost afterwards.
    Unmap,
    /// `MMU_NOTIFY_CLEAR`: pages are discarded or replaced (`madvise`, copy-on-write, reclaim). The
    /// range stays mapped.
    Clear,
    /// `MMU_NOTIFY_PROTECTION_VMA`: the protection of the whole range changes (`mprotect`).
    ProtectionVma,
    /// `MMU_NOTIFY_PROTECTION_PAGE`: the protection of single pages changes.
    ProtectionPage,
    /// `MMU_NOTIFY_SOFT_DIRTY`: pages are write-protected to see which ones are written next.
    SoftDirty,
    /// `MMU_NOTIFY_RELEASE`: the address space ends
    /// ([`AddressSpace::release`](crate::AddressSpace::release)).
    Release,
    /// `MMU_NOTIFY_MIGRATE`: pages move to or from device memory on behalf of `owner`.
    ///
    /// A notifier that finds its own owner here may ignore the event (rule
    /// [S4](crate::docs::contract)). Its driver must then not wait in
    /// [`read_begin`](crate::Subscription::read_begin) of the same range before its own migration
    /// has ended.
    Migrate {
        /// The driver that causes the migration, or `None` if no driver does.
        owner: Option<Owner>,
    },
    /// `MMU_NOTIFY_EXCLUSIVE`: a device gets exclusive (atomic) access on behalf of `owner`.
    Exclusive {
        /// The driver whose device gets the access, or `None` if there is none.
        owner: Option<Owner>,
    },
}

impl Event {
    /// Returns the owner of [`Migrate`](Self::Migrate) and [`Exclusive`](Self::Exclusive), and
    /// `None` for other events.
    #[inline]
    pub const fn owner(self) -> Option<Owner> {
        match self {
            Self::Migrate { owner } | Self::Exclusive { owner } => owner,
            _ => None,
        }
    }

    /// Returns the event's name in lower case, without the owner: `"unmap"`, `"protection-vma"`, …
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unmap => "unmap",
            Self::Clear => "clear",
            Self::ProtectionVma => "protection-vma",
            Self::ProtectionPage => "protection-page",
            Self::SoftDirty => "soft-dirty",
            Self::Release => "release",
            Self::Migrate { .. } => "migrate",
            Self::Exclusive { .. } => "exclusive",
        }
    }
}

/// The kind of an [`Event`], without its owner, and flags of the invalidation, packed into one
/// word.
///
/// The word is passed in a register and stored once. Copying a two-word [`Event`] just after
/// building it would stall on store forwarding (measured: docs/measurements.md).
#[derive(Clone, Copy)]
pub(crate) struct Terms(u32);

impl Terms {
    /// Mask of the kind of event, a number in the order of [`Event`].
    const KIND: u32 = 7;
    /// Flag: the invalidation is blockable.
    const BLOCKABLE: u32 = 8;
    /// Flag: a pass may stay pending.
    const MAY_DEFER: u32 = 16;
    /// Flag: the change may have been made already (M7).
    const LATE: u32 = 32;
    /// Flag: all the changes have been made (N4).
    const PAST: u32 = 64;

    /// Makes the terms of an invalidation whose passes may stay pending.
    #[inline]
    pub(crate) fn new(event: Event, blockable: bool) -> Self {
        let kind = match event {
            Event::Unmap => 0,
            Event::Clear => 1,
            Event::ProtectionVma => 2,
            Event::ProtectionPage => 3,
            Event::SoftDirty => 4,
            Event::Release => 5,
            Event::Migrate { .. } => 6,
            Event::Exclusive { .. } => 7,
        };
        Self(kind | if blockable { Self::BLOCKABLE } else { 0 } | Self::MAY_DEFER)
    }

    /// Returns the event. `owner` is the owner of a migration or an exclusive access.
    #[inline]
    pub(crate) fn event(self, owner: Option<Owner>) -> Event {
        match self.0 & Self::KIND {
            0 => Event::Unmap,
            1 => Event::Clear,
            2 => Event::ProtectionVma,
            3 => Event::ProtectionPage,
            4 => Event::SoftDirty,
            5 => Event::Release,
            6 => Event::Migrate { owner },
            _ => Event::Exclusive { owner },
        }
    }

    /// Returns whether the invalidation is blockable.
    #[inline]
    pub(crate) fn blockable(self) -> bool {
        self.0 & Self::BLOCKABLE != 0
    }

    /// Returns whether a pass may stay pending.
    #[inline]
    pub(crate) fn may_defer(self) -> bool {
        self.0 & Self::MAY_DEFER != 0
    }

    /// Returns whether the change may have been made already (M7).
    #[inline]
    pub(crate) fn is_late(self) -> bool {
        self.0 & Self::LATE != 0
    }

    /// Returns the terms with the mark that the memory may have changed already (M7).
    #[inline]
    pub(crate) fn late(self) -> Self {
        Self(self.0 | Self::LATE)
    }

    /// Returns the terms with the mark that all the changes have been made. A notifier that is
    /// inserted from now on sees the memory as it is now, and its readers need not wait (N4).
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    pub(crate) fn past(self) -> Self {
        Self(self.0 | Self::PAST)
    }

    /// Returns whether all the changes have been made (N4).
    #[inline]
    pub(crate) fn is_past(self) -> bool {
        self.0 & Self::PAST != 0
    }

    /// Returns the terms without the permission that a pass may stay pending (B4).
    pub(crate) fn at_once(self) -> Self {
        Self(self.0 & !Self::MAY_DEFER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_keep_what_they_were_made_of() {
        for owner in [None, Some(Owner::new())] {
            let events = [
                Event::Unmap,
                Event::Clear,
                Event::ProtectionVma,
                Event::ProtectionPage,
                Event::SoftDirty,
                Event::Release,
                Event::Migrate { owner },
                Event::Exclusive { owner },
            ];
            for (event, blockable) in
                events.into_iter().flat_map(|event| [(event, true), (event, false)])
            {
                let terms = Terms::new(event, blockable);
                for (terms, may_defer) in [(terms, true), (terms.at_once(), false)] {
                    for (terms, late) in
                        [(terms, false), (terms.late(), true), (terms.late().late(), true)]
                    {
                        assert_eq!(
                            (terms.event(event.owner()), terms.blockable()),
                            (event, blockable)
                        );
                        assert_eq!((terms.may_defer(), terms.is_late()), (may_defer, late));
                    }
                }
            }
        }
    }

    #[test]
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    fn n4_terms_say_that_all_has_happened_however_often_they_were_told() {
        let terms = Terms::new(Event::Clear, true).late();
        assert!(!terms.is_past());
        for terms in [terms.past(), terms.past().past()] {
            assert!(terms.is_past() && terms.is_late() && terms.blockable() && terms.may_defer());
            assert_eq!(terms.event(None), Event::Clear);
        }
    }
}
