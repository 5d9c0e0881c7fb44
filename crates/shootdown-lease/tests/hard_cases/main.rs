//! What simulation and search leave out: the ends in the engine, numbers at their ends, what a peer
//! can have the other side keep, and trees of hosts.
#![allow(missing_docs)]

mod mirrors;
mod numbers;
mod owners;
mod peers;
mod support;
mod trees;
