//! The passes of fenced notifiers (L5).
#![forbid(unsafe_code)]

use super::{Finished, Pass, Passes, Slot};
use crate::engine::host::Host;
use crate::engine::work::Listed;
use crate::entry::EntryRef;
use crate::foreign::Callback;
use crate::observe;
use crate::sync::Ordering;
use alloc::vec::Vec;

impl Passes {
    /// Returns whether a notifier was fenced since these passes were last searched for theirs.
    pub(crate) fn is_behind(&self, fences: u64) -> bool {
        self.fences != fences
    }

    /// Drops the passes of notifiers that were fenced since the last search, unfinished. They count
    /// as done.
    pub(crate) fn cut(&mut self, host: &Host) {
        loop {
            let fences = host.fences.load(Ordering::Acquire);
            // The drop of a pass may fence another notifier.
            if core::mem::replace(&mut self.fences, fences) == fences {
                return;
            }
            self.cut_fenced(host);
        }
    }

    #[cold]
    fn cut_fenced(&mut self, host: &Host) {
        for pass in self.take_unpolled(|entry| entry.is_fenced()).0 {
            self.end(pass, host);
        }
        (0..core::mem::take(&mut self.untold)).for_each(|_| observe::pass_pends(&host.losses));
        let Some(join) = &mut self.join else { return };
        // A pass cannot be taken out of the join before it is done, so a shell stays there.
        let cut = |pass: &&mut Pass| pass.future.is_some() && pass.entry.is_fenced();
        let cut: Vec<Pass> = join.running.iter_mut().filter(cut).map(Pass::move_out).collect();
        join.shells += cut.len();
        for pass in cut {
            observe::pass_pends_no_more(&host.losses);
            self.end(pass, host);
        }
    }

    /// Ends a pass that is not done.
    fn end(&mut self, mut pass: Pass, host: &Host) {
        let dropped = pass.future.as_mut().map_or(Ok(()), Slot::clear);
        if pass.budgeted {
            host.give_permit_back();
        }
        self.finished.push(Finished {
            entry: pass.entry,
            listed: pass.listed,
            budgeted: pass.budgeted,
        });
        self.trace.pass(&host.losses, pass.entry, pass.began, dropped.is_err());
        match dropped {
            Ok(()) => self.spare_slots.extend(pass.future),
            Err(panic) => self.panic.note(&host.losses, Callback::Pass, panic),
        }
    }

    /// Takes the passes of some notifiers out that wait for their first poll.
    fn take_unpolled(&mut self, of: impl Fn(EntryRef) -> bool) -> Unpolled {
        if !self.slots[..self.started].iter().any(|pass| of(pass.entry)) {
            return Unpolled(Vec::new());
        }
        let unpolled = self.slots.drain(..self.started);
        let (taken, left): (Vec<_>, Vec<_>) = unpolled.partition(|pass| of(pass.entry));
        self.started = left.len();
        self.slots.splice(..0, left);
        Unpolled(taken)
    }

    /// Takes the passes of some notifiers out that wait for their first poll, and takes them off
    /// the list of pending passes by `unlist`. Drops nothing: it is called under the lock.
    pub(crate) fn take_unpolled_of(
        &mut self,
        of: impl Fn(EntryRef) -> bool,
        mut unlist: impl FnMut(Listed),
    ) -> Unpolled {
        let mut taken = self.take_unpolled(of);
        for pass in &mut taken.0 {
            pass.listed.take().into_iter().for_each(&mut unlist);
        }
        taken
    }

    /// Drops the shells when nothing else is left in the join.
    pub(super) fn tidy(&mut self) {
        if let Some(join) = &mut self.join
            && join.shells > 0
            && join.shells == join.running.len()
        {
            join.running.clear();
            join.shells = 0;
        }
    }
}

/// Passes of fenced notifiers that were never polled.
#[must_use]
pub(crate) struct Unpolled(Vec<Pass>);

impl Unpolled {
    /// Drops the passes. A panic of that is lost: their invalidation waits for its caller, which is
    /// not told of it.
    pub(crate) fn discard(self, host: &Host) {
        for mut pass in self.0 {
            if let Some(Err(panic)) = pass.future.as_mut().map(Slot::clear) {
                host.losses.lose(Callback::Pass, panic);
            }
            if pass.budgeted {
                host.give_permit_back();
            }
        }
    }
}
