//! The trait of a device.
#![forbid(unsafe_code)]

use crate::ring::Ring;

/// A virtio device. Sessions use it one after the other: rings of a session have ended before the
/// next session begins.
pub trait Device: Send + Sync + 'static {
    /// Returns the feature bits of its type (VIRTIO_BLK_F_…). The session adds those of the
    /// transport.
    fn features(&self) -> u64;

    /// Returns the maximum number of its queues.
    fn queues(&self) -> u16;

    /// Returns its configuration space. Reads of the front-end beyond the end return zero.
    fn config(&self) -> Vec<u8>;

    /// Handles a write of the driver to the configuration space. Returns `true` if it is permitted.
    fn set_config(&self, offset: u32, bytes: &[u8]) -> bool {
        let _ = (offset, bytes);
        false
    }

    /// Starts a ring. The session's driver calls it: spawn a task or a thread with the ring, and
    /// return. Do not translate here: the session that would ask waits for this call.
    fn start(&self, ring: Ring);
}
