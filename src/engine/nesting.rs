//! The check of C7: in debug builds, a wait inside a first pass that would never end panics with
//! the notifier's name.
//!
//! The check keeps a stack of the first passes that run on this thread. A future that is about to
//! wait inside one panics only if that first pass waits for its own invalidation (F3). The future
//! is *suspected* of that if all of this is true:
//!
//! - The invalidation that holds it up cannot end before the first pass has returned.
//! - Nothing in between polls without blocking, such as a waker that runs a task inline.
//! - The future began to wait there, and its waker has data (that of [`Waker::noop`] has none).
//!
//! [`Waker::noop`]: core::task::Waker::noop
//!
//! A suspect is woken. Code that blocks on it polls it again inside the same first pass, and that
//! panics. A future that is polled once and left for later goes on.
//!
//! An invalidation inside a first pass of a notifier that it hits calls this first pass again, and
//! so on. That panics before the stack is used up.
//!
//! Waits of a *pass* are checked in [`passes`].
#![forbid(unsafe_code)]

pub(crate) mod passes;
#[cfg(not(all(feature = "std", debug_assertions, not(any(loom, shuttle)))))]
mod unchecked;

use crate::entry::EntryRef;
use crate::notifier::Request;
use crate::range::{AddressRange, RangeSet};

/// A first pass: its space, its notifier, and the ranges of its invalidation.
#[derive(Clone)]
#[cfg_attr(
    not(all(feature = "std", debug_assertions, not(any(loom, shuttle)))),
    allow(dead_code, reason = "for the check")
)]
pub(crate) struct FirstPassOf {
    /// [`Host::address`](super::host::Host::address).
    pub(crate) space: usize,
    pub(crate) entry: EntryRef,
    pub(crate) invalidates: Covers,
}

/// The ranges of an invalidation.
#[derive(Clone)]
pub(crate) enum Covers {
    One(AddressRange),
    Many(RangeSet),
}

impl Covers {
    pub(crate) fn of(request: &Request<'_>) -> Self {
        request.parts.map_or(Self::One(request.range), |parts| Self::Many(parts.to_set()))
    }

    pub(crate) fn overlaps(&self, range: AddressRange) -> bool {
        match self {
            Self::One(one) => one.overlaps(range),
            Self::Many(set) => set.overlaps(range),
        }
    }
}

/// A future that is about to wait.
#[cfg_attr(
    not(all(feature = "std", debug_assertions, not(any(loom, shuttle)))),
    allow(dead_code, reason = "for the check")
)]
pub(crate) struct Waits<'a> {
    /// Its name in the message.
    pub(crate) what: &'static str,
    /// Whether it begins to wait.
    pub(crate) first: bool,
    pub(crate) waker: &'a core::task::Waker,
}

// Model checkers run all their threads on one.
#[cfg(all(feature = "std", debug_assertions, not(any(loom, shuttle))))]
mod check {
    use super::{FirstPassOf, Waits};
    use crate::engine::host::Host;
    use crate::foreign::{Callback, Inline};
    use core::task::{RawWakerVTable, Waker};
    use std::cell::RefCell;
    use std::vec::Vec;

    type WakerId = (*const (), *const RawWakerVTable);

    struct Nesting {
        /// Innermost last, each with the number of inline polls below it.
        first_passes: Vec<(FirstPassOf, u32)>,
        /// Wakers of futures that are suspected of blocking a first pass, each with the depth of
        /// that first pass.
        suspects: Vec<(usize, WakerId)>,
    }

    std::thread_local! {
        static NESTING: RefCell<Nesting> = const {
            RefCell::new(Nesting { first_passes: Vec::new(), suspects: Vec::new() })
        };
    }

    fn id(waker: &Waker) -> WakerId {
        (waker.data(), core::ptr::from_ref(waker.vtable()))
    }

    /// How often a first pass of one notifier may be on the stack of a thread. Many more than a
    /// recursion that ends needs, and few enough for a small stack.
    const MOST_NESTED: usize = 32;

    /// Exists while a first pass runs. It is not noted in the destructor of a thread-local, where
    /// the stack may be gone.
    pub(crate) struct InFirstPass(bool);

    impl InFirstPass {
        #[track_caller]
        pub(crate) fn enter(host: &Host, of: impl FnOnce() -> FirstPassOf) -> Self {
            let frame = (of(), Inline::depth());
            let entry = frame.0.entry;
            let nested = NESTING.try_with(|nesting| {
                nesting.borrow().first_passes.iter().filter(|(of, _)| of.entry == entry).count()
                    >= MOST_NESTED
            });
            assert!(
                nested != Ok(true),
                "the first pass of {} invalidates what it watches itself: it is called {MOST_NESTED} times within itself, and would \
                 be for ever: start the invalidation in a task of its own",
                entry.name(&host.losses)
            );
            Self(NESTING.try_with(|nesting| nesting.borrow_mut().first_passes.push(frame)).is_ok())
        }
    }

    impl Drop for InFirstPass {
        fn drop(&mut self) {
            if self.0 {
                let _ = NESTING.try_with(|nesting| {
                    let nesting = &mut *nesting.borrow_mut();
                    nesting.first_passes.pop();
                    let depth = nesting.first_passes.len();
                    nesting.suspects.retain(|(of, _)| *of <= depth);
                });
            }
        }
    }

    /// Panics if a future of the space of `host` that is about to wait would wait for ever. `stuck`
    /// says whether the future waits for the end of a given first pass of this space on this
    /// thread. To be called without a lock.
    #[track_caller]
    pub(crate) fn forbid_waiting(
        host: &Host,
        waits: &Waits<'_>,
        stuck: impl Fn(&FirstPassOf) -> bool,
    ) {
        let found = NESTING.try_with(|nesting| {
            let nesting = &mut *nesting.borrow_mut();
            if nesting.first_passes.is_empty() {
                return None;
            }
            let suspect = (nesting.first_passes.len(), id(waits.waker));
            let suspected = nesting.suspects.contains(&suspect);
            if !suspected && (!waits.first || waits.waker.data().is_null()) {
                return None;
            }
            let depth = Inline::depth();
            let blocked = nesting
                .first_passes
                .iter()
                .rev()
                .take_while(|(_, of)| *of == depth)
                .map(|(of, _)| of);
            let of = blocked.filter(|of| of.space == host.address()).find(|of| stuck(of))?.entry;
            if !suspected {
                nesting.suspects.push(suspect);
            }
            // A new wait with this waker: the thread has left the former one.
            Some((of, suspected && !waits.first))
        });
        match found {
            Ok(Some((entry, true))) => panic!(
                "{} waits inside the first pass of {}, which the invalidation under way waits for in its turn: \
                 start the work there and wait in the future that the first pass returns",
                waits.what,
                entry.name(&host.losses)
            ),
            // Code that blocks on the future polls it again now.
            Ok(Some((_, false))) => {
                _ = host.losses.run(Callback::Waker, |_| waits.waker.wake_by_ref())
            }
            Ok(None) | Err(_) => {}
        }
    }
}

#[cfg(all(feature = "std", debug_assertions, not(any(loom, shuttle))))]
pub(crate) use check::{InFirstPass, forbid_waiting};
#[cfg(not(all(feature = "std", debug_assertions, not(any(loom, shuttle)))))]
pub(crate) use unchecked::{InFirstPass, forbid_waiting};
