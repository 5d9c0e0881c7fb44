//! The notifier of a mapping.
#![forbid(unsafe_code)]

use crate::sync::{AtomicU8, Ordering};
use shootdown::{IntervalNotifier, Invalidation, PassFuture, Timeline, WouldBlock};
use std::borrow::Cow;
use std::sync::OnceLock;

/// Notifier of the range of a mapping, registered while the mapping exists.
#[derive(Default)]
pub(crate) struct InFlight {
    state: AtomicU8,
    /// Made by the first wait. Most mappings are never waited for.
    gone: OnceLock<Timeline>,
}

/// States of a mapping, as flags.
const WAITED_FOR: u8 = 1;
const GONE: u8 = 2;

impl InFlight {
    pub(crate) fn end(&self) {
        if self.state.swap(GONE, Ordering::AcqRel) == WAITED_FOR
            && let Some(gone) = self.gone.get()
        {
            gone.signal(1);
        }
    }
}

impl IntervalNotifier for InFlight {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        let gone = self.gone.get_or_init(Timeline::new);
        let waits = self.state.compare_exchange(0, WAITED_FOR, Ordering::AcqRel, Ordering::Acquire)
            != Err(GONE);
        Ok(waits.then(|| PassFuture::new(gone.reached(1))))
    }

    fn name(&self) -> Cow<'static, str> {
        Cow::Borrowed("a mapping in flight")
    }
}
