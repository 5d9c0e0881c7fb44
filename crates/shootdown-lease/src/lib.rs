//! Memory of one host that other hosts mirror, and the invalidations that have to reach them.
//!
//! The *owner* may change the memory; a *mirror* has copies of it, or devices that reach it by
//! themselves. Before the owner changes a range, every mirror has to let go of it. Some are
//! stopped, cut off or dead, and the owner cannot tell which: so a mirror holds on by a *lease*,
//! which it stops using before it ends, and the owner waits for an acknowledgement or for the end
//! of the lease, whichever comes first. A link that is down, a new incarnation of a host, a missing
//! heartbeat end no wait.
//!
//! [`Owner`] and [`Mirror`] are plain state machines: times and messages in, messages and decisions
//! out, all of them to be carried and carried out (these enums are exhaustive). They have no lock,
//! no clock, no socket and no task, and can be cloned, compared and hashed. What carries the
//! messages may lose them, send them twice and in any order. With the feature `engine` (on by
//! default) `engine::Mirrors` is an `IntervalNotifier` whose passes end when all mirrors have let
//! go, and `engine::Leased` gives an `AddressSpace` whose readers are checked against the lease.
//!
//! ```
//! use shootdown::{AddressRange, RangeSet};
//! use shootdown_lease::{Boot, Decision, Host, Incarnation, Memory, Mirror, MirrorDecision, MirrorSettings, Owner, Terms, Time};
//! use std::time::Duration;
//!
//! let now = Time::from_nanos(0); // both clocks here; in earnest each host reads its own
//! let terms = Terms::new(Duration::from_millis(100)); // how long a mirror may hold on without asking
//! let mut owner = Owner::new(Boot(1), terms, Memory::New, now)?;
//! let mut mirror = Mirror::new(Incarnation(7), MirrorSettings::default(), now);
//! let host = Host(1); // whom the transport has authenticated
//! # let carry = |owner: &mut Owner, mirror: &mut Mirror| loop {
//! #     let mut quiet = true;
//! #     while let Some(message) = mirror.next_message() { owner.handle(host, message, now); quiet = false; }
//! #     while let Some((_, message)) = owner.next_message() { mirror.handle(message, now); quiet = false; }
//! #     if quiet { break }
//! # };
//! mirror.tick(now);
//! carry(&mut owner, &mut mirror); // Join, Welcome: both ways, by any means
//! assert!(matches!(mirror.next_decision(), Some(MirrorDecision::Joined { .. })));
//!
//! let page = AddressRange::try_from(0x1000..0x2000)?;
//! let invalidation = owner.invalidate(RangeSet::from(page), now);
//! carry(&mut owner, &mut mirror);
//! let Some(MirrorDecision::Invalidate { epoch, invalidation: asked, .. }) = mirror.next_decision() else { unreachable!() };
//! assert_eq!(owner.next_decision(), None); // the owner waits
//! mirror.invalidated(epoch, asked, now); // zapped and flushed
//! carry(&mut owner, &mut mirror);
//! assert!(matches!(owner.next_decision(), Some(Decision::Done { invalidation: done, .. }) if done == invalidation));
//! owner.end(invalidation, now)?; // the memory has changed
//! # Ok::<(), Box<dyn core::error::Error>>(())
//! ```
#![no_std]
#![cfg_attr(docsrs, feature(doc_cfg))]

extern crate alloc;
#[cfg(feature = "engine")]
extern crate std;

// | module | it holds | imports |
// | --- | --- | --- |
// | `time` | `Time` | |
// | `rules` | the rules, and which one a test leaves out | |
// | `terms` | `Terms`, `MirrorSettings` | |
// | `message` | what the two ends say | `time` |
// | `owner`, `mirror` | the state machines | all above |
// | `engine` | the two ends in an `AddressSpace` | all above |

#[cfg(feature = "engine")]
#[cfg_attr(docsrs, doc(cfg(feature = "engine")))]
pub mod engine;
mod message;
mod mirror;
mod owner;
mod rules;
mod terms;
mod time;

pub use message::{
    Asker, Boot, Epoch, Host, Incarnation, InvalidationId, Nonce, Refusal, ToMirror, ToOwner,
};
pub use mirror::{Denied, FetchError, Mirror, MirrorCounts, MirrorDecision, Standing};
pub use owner::{Decision, EndError, Ending, Fenced, Memory, Owner, OwnerCounts};
#[cfg(feature = "test-util")]
pub use rules::Rule;
pub use terms::{MirrorSettings, Terms, TermsError};
pub use time::Time;
