//! Why memory is invalidated, and on whose behalf.
#![forbid(unsafe_code)]

use core::num::NonZeroU64;
use core::sync::atomic::{AtomicU64, Ordering};

/// Who causes a migration or an exclusive mapping, so that its own notifier can recognise the event
/// and ignore it.
///
/// The kernel compares a `void *` that the driver chooses; so does this type, by value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner(NonZeroU64);

impl Owner {
    /// An owner that differs from every other made by this function in the process.
    #[expect(
        clippy::new_without_default,
        reason = "every call gives another value, which a default must not"
    )]
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        // 2^64 owners are not made in a process's life; if they were, the first would be given out
        // again.
        Self(NonZeroU64::new(NEXT.fetch_add(1, Ordering::Relaxed)).unwrap_or(NonZeroU64::MIN))
    }

    /// An owner from a number of the caller's choice, such as the address of its device.
    pub const fn from_raw(raw: NonZeroU64) -> Self {
        Self(raw)
    }
}

/// The reason for an invalidation: the kernel's `enum mmu_notifier_event`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// `MMU_NOTIFY_UNMAP`: the range is unmapped or moved; what was there is gone afterwards.
    Unmap,
    /// `MMU_NOTIFY_CLEAR`: pages are discarded or replaced (`madvise`, copy-on-write, reclaim); the
    /// range stays mapped.
    Clear,
    /// `MMU_NOTIFY_PROTECTION_VMA`: the protection of the whole range changes (`mprotect`).
    ProtectionVma,
    /// `MMU_NOTIFY_PROTECTION_PAGE`: the protection of single pages changes.
    ProtectionPage,
    /// `MMU_NOTIFY_SOFT_DIRTY`: pages are write-protected to see which are written next.
    SoftDirty,
    /// `MMU_NOTIFY_RELEASE`: the address space goes away
    /// ([`AddressSpace::release`](crate::AddressSpace::release)).
    Release,
    /// `MMU_NOTIFY_MIGRATE`: pages move to or from device memory on behalf of `owner`.
    ///
    /// A notifier that finds its own owner here may ignore the event (rule S4). It must then not
    /// wait in `read_begin` of the same range before its own migration has ended.
    Migrate {
        /// On whose behalf; `None` when it is nobody's.
        owner: Option<Owner>,
    },
    /// `MMU_NOTIFY_EXCLUSIVE`: a device gets exclusive (atomic) access on behalf of `owner`.
    Exclusive {
        /// On whose behalf; `None` when it is nobody's.
        owner: Option<Owner>,
    },
}

impl Event {
    /// The owner that `Migrate` and `Exclusive` carry.
    #[inline]
    pub const fn owner(self) -> Option<Owner> {
        match self {
            Self::Migrate { owner } | Self::Exclusive { owner } => owner,
            _ => None,
        }
    }

    /// The reason's name in lower case, without the owner: `"unmap"`, `"protection-vma"`, …
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

/// An [`Event`] without its owner, and how the invalidation may be answered. One word, which goes
/// through registers and is stored once: an [`Event`] that was just put together cannot be copied
/// as a whole before both its words are stored, and that wait is a tenth of a short invalidation.
#[derive(Clone, Copy)]
pub(crate) struct Terms(u32);

impl Terms {
    /// The kinds of events, as [`Event`] lists them.
    const KIND: u32 = 7;
    const BLOCKABLE: u32 = 8;
    const MAY_DEFER: u32 = 16;
    const LATE: u32 = 32;
    const PAST: u32 = 64;

    /// Those of an invalidation whose passes may stay pending.
    #[inline(always)]
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

    #[inline]
    pub(crate) fn blockable(self) -> bool {
        self.0 & Self::BLOCKABLE != 0
    }

    #[inline]
    pub(crate) fn may_defer(self) -> bool {
        self.0 & Self::MAY_DEFER != 0
    }

    #[inline]
    pub(crate) fn is_late(self) -> bool {
        self.0 & Self::LATE != 0
    }

    /// Marks an invalidation of memory that has changed already (M7).
    #[inline]
    pub(crate) fn late(self) -> Self {
        Self(self.0 | Self::LATE)
    }

    /// Marks one of many changes that all have happened: who comes from now on sees what is there
    /// now, and need not wait (N4).
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    pub(crate) fn past(self) -> Self {
        Self(self.0 | Self::PAST)
    }

    #[inline]
    pub(crate) fn is_past(self) -> bool {
        self.0 & Self::PAST != 0
    }

    /// The same, for a pass that must not stay pending (B4).
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
                    for (terms, late) in [(terms, false), (terms.late(), true)] {
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
}
