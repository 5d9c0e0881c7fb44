//! A vhost-user back-end with an IOMMU: an INVALIDATE is answered when everything that overlaps it has
//! let go, and waits for nothing else.
//!
//! ```text
//!  front-end ── messages ──▶ Session ── rings ──▶ Device ── I/O ──▶ guest memory
//!      ▲                        │                   │
//!      └── answers, misses ─────┴───── Iotlb ◀──────┘  Mapping: a translation in flight
//! ```
#![forbid(unsafe_code)]

mod buffers;
mod device;
pub mod driver;
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
pub use stats::IotlbStats;
pub use vm::{BlockingIommu, Held};
pub use vm_memory::Permissions;
