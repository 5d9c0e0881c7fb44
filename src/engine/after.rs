//! What is noted under the lock and done when it is free (C8).
#![forbid(unsafe_code)]

use crate::engine::wakes::PassWaker;
use crate::entry::EntryRef;
use crate::observe::Trace;
use crate::sync::{Arc, Panic, catch, resume};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::task::Waker;

/// What remains to be done once the lock is free. Mostly nothing, which costs one comparison.
#[derive(Default)]
pub(crate) struct After(Option<Box<Work>>);

#[derive(Default)]
pub(crate) struct Work {
    pub(crate) wakers: Vec<Waker>,
    /// Wakers that nobody needs any more.
    pub(crate) unused: Vec<Waker>,
    /// Everybody who waits for the passes of some invalidation.
    pub(crate) wakes: Vec<Arc<PassWaker>>,
    pub(super) dead: Vec<EntryRef>,
    pub(crate) panics: Vec<Panic>,
    /// Spans to be closed.
    pub(crate) traces: Vec<Trace>,
}

impl After {
    #[cold]
    pub(crate) fn work(&mut self) -> &mut Work {
        self.0.get_or_insert_default()
    }

    /// Wakes and frees. Driver code may run and may panic: all of it is done first, then the first panic goes on.
    #[inline]
    pub(crate) fn run(self) {
        if let Some(work) = self.0 {
            (*work).run();
        }
    }
}

impl Work {
    #[cold]
    fn run(self) {
        let mut first = None;
        for waker in self.wakers {
            first = first.or(catch(|| waker.wake()).err());
        }
        for wakes in self.wakes {
            first = first.or(catch(|| wakes.wake_all()).err());
        }
        for entry in self.dead {
            first = first.or(catch(|| entry.free()).err());
        }
        for waker in self.unused {
            first = first.or(catch(|| drop(waker)).err());
        }
        for panic in self.panics {
            first = first.or(catch(|| drop(panic)).err());
        }
        if let Some(panic) = first {
            resume(panic);
        }
    }
}
