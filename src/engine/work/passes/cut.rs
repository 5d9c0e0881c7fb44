//! The passes of devices that were cut off (L5).
#![forbid(unsafe_code)]

use super::{Finished, Pass, Passes, Slot};
use crate::engine::host::Host;
use crate::foreign::Callback;
use crate::observe;
use crate::sync::Ordering;
use alloc::vec::Vec;

impl Passes {
    /// Whether a notifier was fenced since these passes were looked at.
    pub(crate) fn is_behind(&self, fences: u64) -> bool {
        self.fences != fences
    }

    /// Drops the passes of notifiers that were fenced since the last look, unfinished: they are done.
    pub(crate) fn cut(&mut self, host: &Host) {
        let fences = host.fences.load(Ordering::Acquire);
        if core::mem::replace(&mut self.fences, fences) != fences {
            self.cut_fenced(host);
        }
    }

    #[cold]
    fn cut_fenced(&mut self, host: &Host) {
        // Those that nobody has polled are skipped when their turn comes.
        for pass in self.slots[..self.started].iter_mut().filter(|pass| pass.entry.is_fenced()) {
            if let Some(Err(panic)) = pass.future.as_mut().map(Slot::clear) {
                self.panic.note(&host.losses, Callback::Pass, panic);
                // A slot whose drop may have panicked is not used again.
                pass.future = None;
            }
        }
        let Some(join) = &mut self.join else { return };
        if !join.running.iter().any(|pass| pass.entry.is_fenced()) {
            return;
        }
        (0..core::mem::take(&mut self.untold)).for_each(|_| observe::pass_pends(&host.losses));
        // There is no way to take one out of the join, so it is made anew: who stays is polled again.
        let mut passes: Vec<Pass> = core::mem::take(&mut join.running).into_iter().collect();
        // The youngest comes first there.
        passes.reverse();
        for mut pass in passes {
            if !pass.entry.is_fenced() {
                join.running.push(pass);
                continue;
            }
            let dropped = pass.future.as_mut().map_or(Ok(()), Slot::clear);
            if pass.budgeted {
                host.give_permit_back();
            }
            self.finished.push(Finished { entry: pass.entry, listed: pass.listed, budgeted: pass.budgeted });
            observe::pass_pends_no_more(&host.losses);
            self.trace.pass(&host.losses, pass.entry, pass.began, dropped.is_err());
            match dropped {
                Ok(()) => self.spare_slots.extend(pass.future),
                Err(panic) => self.panic.note(&host.losses, Callback::Pass, panic),
            }
        }
        join.wakers.note_woken();
    }
}
