//! The notifier of a registration: what an invalidation does to each [`Phase`].
#![forbid(unsafe_code)]

use super::Entry;
use crate::cache::device::Device;
use crate::cache::phase::Phase;
use crate::notifier::{IntervalNotifier, Invalidation, WouldBlock};
use crate::pass::PassFuture;
use crate::sync::{Ordering, Weak};
use alloc::borrow::Cow;

/// The notifier of one registration. It does not keep the entry alive.
pub(in crate::cache) struct Guardian<D: Device>(pub(super) Weak<Entry<D>>);

impl<D: Device> IntervalNotifier for Guardian<D> {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        let Some(entry) = self.0.upgrade() else { return Ok(None) };
        let shelf = entry.shelf.upgrade();
        let (mut live, mut kept) = (None, None);
        let pass = {
            let mut progress = entry.progress.lock_for(invalidation);
            match &mut progress.phase {
                Phase::Waiting => None,
                Phase::Gone => {
                    entry.changed.store(true, Ordering::Release);
                    None
                }
                Phase::Registering { task } => {
                    let pass = PassFuture::new(entry.ended(task));
                    progress.by = Some((invalidation.event(), invalidation.range()));
                    Some(pass)
                }
                Phase::Live { leaving } => {
                    let leaving = leaving.clone();
                    let pass = leaving.wait();
                    progress.phase = Phase::Leaving { leaving };
                    progress.by = Some((invalidation.event(), invalidation.range()));
                    kept = progress.kept.take();
                    live = shelf
                        .as_ref()
                        .zip(entry.key.get())
                        .and_then(|(shelf, key)| shelf.take(*key));
                    entry.device.invalidations.fetch_add(1, Ordering::Relaxed);
                    Some(PassFuture::new(pass))
                }
                Phase::Leaving { leaving } => {
                    entry.changed.store(true, Ordering::Release);
                    Some(PassFuture::new(leaving.wait()))
                }
            }
        };
        // Drops the references of the shelf. If there are no users, polling the pass calls the
        // device.
        drop((live, kept));
        drop((shelf, entry));
        Ok(pass)
    }

    fn name(&self) -> Cow<'static, str> {
        Cow::Owned(alloc::format!("registration with {}", core::any::type_name::<D>()))
    }
}
