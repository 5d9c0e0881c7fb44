//! IOTLBs that are invalidated together.
#![forbid(unsafe_code)]

use super::Inner;
use crate::sync::Lock;
use shootdown::AddressSpace;
use std::fmt;
use std::sync::{Arc, Weak};

/// IOTLBs whose devices share an IOMMU domain. An INVALIDATE of one is an invalidation of all (V8).
///
/// When a guest's IOMMU driver unmaps a range, it sends one INVALIDATE to each device of the
/// domain, each after the answer to the one before. If the devices share a `Domain` in this
/// process, the first INVALIDATE waits for all devices at once, and the others have nothing left to
/// wait for.
#[derive(Clone, Default)]
pub struct Domain(pub(super) Arc<Members>);

#[derive(Default)]
pub(super) struct Members {
    pub(super) space: AddressSpace,
    pub(super) all: Lock<Vec<Weak<Inner>>>,
}

impl Domain {
    /// Makes a domain without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the I/O virtual addresses of all devices. Its notifiers are the mappings in flight.
    pub fn space(&self) -> &AddressSpace {
        &self.0.space
    }
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Domain({} in flight)", self.0.space.len())
    }
}
