//! Memory of one host that other hosts mirror, and the invalidations that must reach them.
//!
//! The *owner* may change the memory. A *mirror* has copies of it, or devices that reach it by
//! themselves. Before the owner changes a range, every mirror must release it. A mirror may be
//! stopped, cut off or dead, and the owner cannot tell which. So a mirror holds on by a *lease*,
//! and stops before the lease ends. The owner waits for an acknowledgement or for the end of the
//! lease, whichever comes first. A broken link, a new incarnation of a host or a missing heartbeat
//! ends no wait.
//!
//! [`Owner`] and [`Mirror`] are plain state machines. Times and messages go in; messages and
//! decisions come out, and the program carries all of them out (these enums are exhaustive). The
//! machines have no lock, clock, socket or task, and can be cloned, compared and hashed. The
//! transport may lose messages, duplicate them and reorder them.
//!
//! With the feature `engine` (on by default), `engine::Mirrors` is an `IntervalNotifier` whose
//! passes end when all mirrors have released the range, and `engine::Leased` has an `AddressSpace`
//! whose readers are checked against the lease.
//!
//! ```
//! use shootdown::{AddressRange, RangeSet};
//! use shootdown_lease::{Boot, Decision, Host, Incarnation, Memory};
//! use shootdown_lease::{Mirror, MirrorDecision, MirrorSettings};
//! use shootdown_lease::{Owner, Terms, Time};
//! use std::time::Duration;
//!
//! // One clock for both here. In practice each host reads its own.
//! let now = Time::from_nanos(0);
//! // A mirror may hold on for 100 ms without a renewal.
//! let terms = Terms::new(Duration::from_millis(100));
//! let mut owner = Owner::new(Boot(1), terms, Memory::New, now)?;
//! let settings = MirrorSettings::default();
//! let mut mirror = Mirror::new(Incarnation(7), settings, now);
//! let host = Host(1); // as the transport has authenticated it
//! # let carry = |owner: &mut Owner, mirror: &mut Mirror| loop {
//! #     let mut quiet = true;
//! #     while let Some(message) = mirror.next_message() {
//! #         owner.handle(host, message, now);
//! #         quiet = false;
//! #     }
//! #     while let Some((_, message)) = owner.next_message() {
//! #         mirror.handle(message, now);
//! #         quiet = false;
//! #     }
//! #     if quiet { break }
//! # };
//!
//! mirror.tick(now);
//! carry(&mut owner, &mut mirror); // Join and Welcome, over any transport
//! let decision = mirror.next_decision();
//! assert!(matches!(decision, Some(MirrorDecision::Joined { .. })));
//!
//! let page = AddressRange::try_from(0x1000..0x2000)?;
//! let invalidation = owner.invalidate(RangeSet::from(page), now);
//! carry(&mut owner, &mut mirror);
//! let (epoch, asked) = match mirror.next_decision() {
//!     Some(MirrorDecision::Invalidate { epoch, invalidation, .. }) => {
//!         (epoch, invalidation)
//!     }
//!     _ => unreachable!(),
//! };
//! assert_eq!(owner.next_decision(), None); // the owner waits
//!
//! mirror.invalidated(epoch, asked, now); // zapped and flushed
//! carry(&mut owner, &mut mirror);
//! let decision = owner.next_decision();
//! assert!(matches!(decision, Some(Decision::Done { .. })));
//! owner.end(invalidation, now)?; // the memory has changed
//! # Ok::<(), Box<dyn core::error::Error>>(())
//! ```
#![no_std]
#![cfg_attr(docsrs, feature(doc_cfg))]

extern crate alloc;
#[cfg(feature = "engine")]
extern crate std;

// | module | contents | imports |
// | --- | --- | --- |
// | `time` | `Time` | |
// | `rules` | the rules, and the one that a test leaves out | |
// | `terms` | `Terms`, `MirrorSettings` | |
// | `message` | messages between the two sides | `time` |
// | `owner`, `mirror` | the state machines | all above |
// | `engine` | both sides with an `AddressSpace` | all above |

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
