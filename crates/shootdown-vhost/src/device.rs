//! What a device has to say of itself.
#![forbid(unsafe_code)]

use crate::ring::Ring;

/// A virtio device. One session after the other has it; rings of an earlier session have ended
/// before the next one begins.
pub trait Device: Send + Sync + 'static {
    /// The features of its type (VIRTIO_BLK_F_…), as bits. Those of the transport are the
    /// session's.
    fn features(&self) -> u64;

    /// How many queues it has at most.
    fn queues(&self) -> u16;

    /// Its configuration space from the start. What a front-end reads beyond the end is zero.
    fn config(&self) -> Vec<u8>;

    /// The driver writes to the configuration space. Says whether that is allowed.
    fn set_config(&self, offset: u32, bytes: &[u8]) -> bool {
        let _ = (offset, bytes);
        false
    }

    /// A ring begins. Called by the session's driver: spawn a task or a thread that has the ring,
    /// and return. Translate nothing here: the session that would ask is waiting for this call.
    fn start(&self, ring: Ring);
}
