//! Why memory is invalidated, and on whose behalf.
#![forbid(unsafe_code)]

use core::num::NonZeroU64;
use core::sync::atomic::{AtomicU64, Ordering};

/// Who causes a migration or an exclusive mapping, so that its own notifier can recognise the event and ignore it.
///
/// The kernel compares a `void *` that the driver chooses; so does this type, by value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner(NonZeroU64);

impl Owner {
    /// An owner that differs from every other made by this function in the process.
    #[expect(clippy::new_without_default, reason = "every call gives another value, which a default must not")]
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        // 2^64 owners are not made in a process's life; if they were, the first would be given out again.
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
    /// `MMU_NOTIFY_CLEAR`: pages are discarded or replaced (`madvise`, copy-on-write, reclaim); the range stays mapped.
    Clear,
    /// `MMU_NOTIFY_PROTECTION_VMA`: the protection of the whole range changes (`mprotect`).
    ProtectionVma,
    /// `MMU_NOTIFY_PROTECTION_PAGE`: the protection of single pages changes.
    ProtectionPage,
    /// `MMU_NOTIFY_SOFT_DIRTY`: pages are write-protected to see which are written next.
    SoftDirty,
    /// `MMU_NOTIFY_RELEASE`: the address space goes away ([`AddressSpace::release`](crate::AddressSpace::release)).
    Release,
    /// `MMU_NOTIFY_MIGRATE`: pages move to or from device memory on behalf of `owner`.
    ///
    /// A notifier that finds its own owner here may ignore the event (rule S4). It must then not wait in
    /// `read_begin` of the same range before its own migration has ended.
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

/// An [`Event`] in two words that are copied each for itself: a copy of the whole, right after it was made, would wait for two stores at
/// once, and that wait is a tenth of a short invalidation.
#[derive(Clone, Copy, Default)]
pub(crate) struct Reason {
    pub(crate) kind: Kind,
    pub(crate) owner: Option<Owner>,
}

/// What happened, without an owner.
#[derive(Clone, Copy, Default)]
pub(crate) enum Kind {
    #[default]
    Unmap,
    Clear,
    ProtectionVma,
    ProtectionPage,
    SoftDirty,
    Release,
    Migrate,
    Exclusive,
}

impl From<Event> for Reason {
    #[inline]
    fn from(event: Event) -> Self {
        let kind = match event {
            Event::Unmap => Kind::Unmap,
            Event::Clear => Kind::Clear,
            Event::ProtectionVma => Kind::ProtectionVma,
            Event::ProtectionPage => Kind::ProtectionPage,
            Event::SoftDirty => Kind::SoftDirty,
            Event::Release => Kind::Release,
            Event::Migrate { .. } => Kind::Migrate,
            Event::Exclusive { .. } => Kind::Exclusive,
        };
        Self { kind, owner: event.owner() }
    }
}

impl From<Reason> for Event {
    #[inline]
    fn from(Reason { kind, owner }: Reason) -> Self {
        match kind {
            Kind::Unmap => Self::Unmap,
            Kind::Clear => Self::Clear,
            Kind::ProtectionVma => Self::ProtectionVma,
            Kind::ProtectionPage => Self::ProtectionPage,
            Kind::SoftDirty => Self::SoftDirty,
            Kind::Release => Self::Release,
            Kind::Migrate => Self::Migrate { owner },
            Kind::Exclusive => Self::Exclusive { owner },
        }
    }
}
