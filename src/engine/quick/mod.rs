//! What exists for nanoseconds only.
//!
//! An invalidation that hits nothing takes tens of nanoseconds, so a store that the next load has
//! to wait for, or six spilled registers, can be seen. This folder has everything that is written
//! as it is because of that. Everything here has a *plain form* outside, which is its
//! specification: code without tricks that handles every case. A quick form handles the common
//! case and leaves for the plain form in all others. The rest of the engine reads as ordinary
//! Rust and may be changed without a thought for this folder, except that both forms change
//! together.
//!
//! | quick form | plain form | leaves for it when |
//! | --- | --- | --- |
//! | [`begin`]: start, first passes, first polls | `running::begin_request` | the lock is taken; the space has a clock or a pass budget; `tracing` or `metrics` is on; a first pass panics or refuses; a pass pends or panics |
//! | `begin_quickly`: the first poll of [`Invalidate`](crate::Invalidate) | `Invalidate::go_on` | the handle is owned; it is no first poll; it is of many ranges |
//! | [`end`]: the end of an invalidation | `Shared::end_plainly` | the lock is taken; the invalidation is timed or in the crowd; notifiers were inserted under it; `tracing` or `metrics` is on |
//! | the first look of [`ReadBegin`](crate::ReadBegin) | `futures::read::wait_for_sequence` | the notifier is covered or closed, or the gate is |
//! | `register`: insertion into the memory of a former entry | `Shared::register_plainly` | no such memory is there, or it does not fit |
//! | `detach`: a removal that need not wait | `Shared::detach_plainly`; with `plain_only`, `State::close` and the wait of [`Remove`](crate::Remove) | the lock is taken; the notifier is covered, held or closed |
//!
//! The protocol has six quick forms of its own (`protocol/quick.rs` lists them), and its own test.
//!
//! # The tricks, and why
//! - **Values stay in registers.** The second lock of an invalidation is an atomic
//!   read-modify-write, which waits for each store before it. So a future that resolves at its
//!   first poll, and its guard, are never written to memory: no function gets their address.
//!   [`Begun`] has two words and goes through registers.
//! - **No spilled registers.** A function whose only calls are tail calls saves no callee-saved
//!   register. So each way out is a `#[cold]`, `#[inline(never)]` function in tail position, and
//!   the common case is one inlined piece.
//! - **Drops by hand.** [`ByHand`] is a field without drop glue, and [`fill_empty`] is a store that
//!   drops nothing. Both replace code that would do nothing, but that the compiler cannot leave
//!   out.
//! - **Forced inlining.** `#[inline(always)]` stands outside of this folder only where the function
//!   is part of these pieces. An attribute stays only if a measurement shows what it saves:
//!   docs/measurements.md, "Attributes".
//!
//! # The test
//! A space made with `Builder::plain_only` (feature `test-util`) takes none of these. `tests/fuzz`
//! runs the same random schedules on a space that does and on one that does not, and compares
//! everything that can be seen: results, panics, the order of calls, sequences, counters, what is
//! listed as active, and each wake.
//!
//! Two things differ and are not compared: how often foreign code is asked that panics or answers
//! at random (a clock, a lease, the clone of a waker), because the plain form may ask once more;
//! and the `Debug` form of [`Remove`](crate::Remove), which is removed at once or waits.
#![forbid(unsafe_code)]

mod begun;
mod by_hand;
mod end;
mod first_passes;
mod poll;
mod registration;
mod start;

pub(in crate::engine) use begun::Begun;
pub(in crate::engine) use by_hand::{ByHand, fill_empty};
pub(in crate::engine) use end::end;
pub(in crate::engine) use start::begin;
