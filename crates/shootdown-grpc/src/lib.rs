#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]
#![forbid(unsafe_code)]

// Map of the modules. Each uses only those above it.
//
// | module | contents |
// | --- | --- |
// | `clock` | `CLOCK_BOOTTIME` |
// | `limits` | limits |
// | `proto`, `codec` | messages, and their malformed forms |
// | `name`, `tls` | identity of a peer |
// | `observe` | counters, `tracing`, `metrics` |
// | `space` | shared memory, and the mirrors that may join it |
// | `list`, `socket`, `accept` | connections of an owner |
// | `sending`, `service`, `server` | streams of an owner |
// | `backoff`, `dial`, `carry`, `client` | the link of a mirror |
// | `etcd` | election of the owner |

mod accept;
mod backoff;
mod carry;
mod client;
mod clock;
mod codec;
mod dial;
#[cfg(feature = "etcd")]
pub mod etcd;
mod limits;
mod list;
mod name;
mod observe;
mod proto;
mod sending;
mod server;
mod service;
mod socket;
mod space;
mod tls;

pub use client::{Client, ClientBuilder, ClientCounts, ClientError, Connection};
pub use clock::BootClock;
pub use codec::Malformed;
pub use limits::Limits;
pub use name::Name;
pub use observe::{ServerCounts, Tally};
pub use server::{Server, ServerBuilder, ServerError};
pub use space::{Checked, Contents, Space, Unreadable};
pub use tls::{ClientTls, ServerTls, TlsError};
