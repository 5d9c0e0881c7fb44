//! Memory that other hosts mirror, over gRPC.
#![cfg_attr(docsrs, feature(doc_cfg))]
#![forbid(unsafe_code)]

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
