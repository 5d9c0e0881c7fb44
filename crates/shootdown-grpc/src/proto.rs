//! Code generated from `proto/shootdown.proto`.
#![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, reason = "generated")]

tonic::include_proto!("shootdown.v1");
