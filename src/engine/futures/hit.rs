//! Waiting for the next invalidation of a notifier.
#![forbid(unsafe_code)]

use super::wait::{Goal, Verdict, Wait};
use crate::engine::Shared;
use crate::engine::state::{Parking, State, WaitFor};
use crate::entry::EntryRef;
use crate::notifier::Sequence;
use core::marker::PhantomData;
use core::task::{Context, Poll};

/// Resolves when the notifier's sequence changes, or when the notifier is covered or closed. Lets a
/// driver release what a pass of the notifier may wait for.
///
/// It is woken when an invalidation has passes pending. Only then can a pass wait.
pub(crate) struct Hit<'a> {
    space: &'a Shared,
    entry: EntryRef,
    sequence: Sequence,
    wait: Wait,
    /// Borrows the subscription, which keeps the entry alive.
    subscription: PhantomData<&'a ()>,
}

/// The goal that the sequence is not what it was.
struct Changed(EntryRef, Sequence);

impl Goal for Changed {
    fn queue(&self) -> Option<(EntryRef, WaitFor)> {
        // Such a waiter is woken at each change of the notifier and stays in the list until it
        // goes.
        Some((self.0, WaitFor::Quiet))
    }

    fn look(&mut self, _: &State, _: bool, _: bool) -> Verdict {
        if self.0.own.is_stable_at(self.1.0) { Verdict::Wait } else { Verdict::Over }
    }

    fn wants(&self, _: &Parking, _: u64) -> bool {
        false
    }
}

impl<'a> Hit<'a> {
    /// Makes the future. The entry lives as long as `'a`.
    pub(crate) fn new(space: &'a Shared, entry: EntryRef, sequence: Sequence) -> Self {
        Self { space, entry, sequence, wait: Wait::default(), subscription: PhantomData }
    }

    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.wait.poll(self.space, &mut Changed(self.entry, self.sequence), cx)
    }
}

impl Drop for Hit<'_> {
    fn drop(&mut self) {
        self.wait.give_up(self.space);
    }
}
