//! A vhost-user back-end with an IOMMU. An INVALIDATE is answered when everything that overlaps it
//! has been released, and waits for nothing else.
//!
//! ```text
//!  front-end ── messages ──▶ Session ── rings ──▶ Device ── I/O ──▶ guest memory
//!      ▲                        │                   │
//!      └── answers, misses ─────┴───── Iotlb ◀──────┘  Mapping: in flight
//! ```
//!
//! A device with plain threads:
//!
//! ```no_run
//! use shootdown_vhost::{Device, Iotlb, Ring, Session, driver};
//! use std::os::unix::net::UnixListener;
//! use std::sync::Arc;
//!
//! /// Fills the driver's buffers with zeros.
//! struct Zeros;
//!
//! impl Device for Zeros {
//!     fn features(&self) -> u64 {
//!         0 // features of the device's type
//!     }
//!     fn queues(&self) -> u16 {
//!         1
//!     }
//!     fn config(&self) -> Vec<u8> {
//!         Vec::new()
//!     }
//!     fn start(&self, mut ring: Ring) {
//!         std::thread::spawn(move || {
//!             // An error: the guest's ring is invalid or has no
//!             // translation.
//!             while let Ok(Some(chain)) = ring.next_wait() {
//!                 let len = chain.writable().len();
//!                 let zeros = vec![0; len];
//!                 let done = chain.writable().write(0, &zeros);
//!                 let len = if done.is_ok() { len as u32 } else { 0 };
//!                 // `Stopping`: the driver is told when the ring
//!                 // continues.
//!                 let _ = chain.complete_wait(len);
//!             }
//!         });
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (device, iotlb) = (Arc::new(Zeros), Iotlb::default());
//! let listener = UnixListener::bind("/tmp/zeros.sock")?;
//! loop {
//!     // One front-end after the other. `Session::stopper` ends one
//!     // from elsewhere.
//!     let (socket, _) = listener.accept()?;
//!     let session = Session::new(device.clone(), iotlb.clone());
//!     driver::serve(socket, session)?;
//! }
//! # }
//! ```
//!
//! With an executor: [`Ring::next`] and [`Chain::complete`] are futures, and
//! [`driver::serve_tokio`] drives the session. QEMU needs `iommu_platform=on,ats=on` on a device
//! behind a root port, `intel-iommu,device-iotlb=on`, and memory in a shared file
//! (`memory-backend-memfd,share=on`). `guest.sh` has such a command line.
//!
//! Features offered to the driver besides the device's own: VERSION_1, ACCESS_PLATFORM (the IOMMU),
//! INDIRECT_DESC, EVENT_IDX. Features offered to the front-end: MQ, REPLY_ACK, BACKEND_REQ, CONFIG.
#![forbid(unsafe_code)]

mod bell;
mod buffers;
mod device;
pub mod driver;
mod in_flight;
mod iotlb;
mod mapping;
mod memory;
pub mod message;
mod parts;
mod ring;
mod session;
mod stats;
mod sync;
mod vm;

pub use buffers::Buffers;
pub use device::Device;
pub use iotlb::{Domain, Invalidated, Iotlb, MapError, Want};
pub use mapping::{AccessError, Mapping};
pub use memory::{MemoryError, MemoryTable, Place, Region};
pub use ring::{Chain, CompleteError, Next, Ring, RingError};
pub use session::{Fault, Output, Session, Stopper};
pub use shootdown::AddressRange;
pub use stats::IotlbStats;
pub use vm::{BlockingIommu, Held};
pub use vm_memory;
pub use vm_memory::Permissions;
pub use {shootdown, vhost};
