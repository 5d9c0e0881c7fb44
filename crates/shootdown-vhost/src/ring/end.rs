//! What a ring leaves when it ends, for the next one of its queue.
#![forbid(unsafe_code)]

use super::split::Layout;
use crate::parts::Parts;

/// What the next ring of a queue goes on with.
#[derive(Clone, Debug, Default)]
pub(crate) struct End {
    /// The next entry of the available ring.
    pub(crate) base: u16,
    /// The next entry of the used ring, if that has been read.
    index: Option<u16>,
    /// Requests that are done and that the used ring could not be told of: head, bytes written.
    untold: Vec<(u16, u32)>,
}

impl End {
    /// Nothing is left.
    pub(crate) fn at(base: u16) -> Self {
        Self { base, ..Self::default() }
    }
}

/// How far a ring is with what it has taken.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// The next entry of the used ring, once that has been read.
    index: Option<u16>,
    /// Entries of the available ring that the device has.
    taken: Vec<u16>,
    untold: Vec<(u16, u32)>,
    /// Of the ring before.
    before: Option<End>,
}

impl Progress {
    pub(super) fn after(before: End) -> Self {
        let before = (!before.untold.is_empty()).then_some(before);
        Self { before, ..Self::default() }
    }

    /// How many requests the device has.
    pub(super) fn in_flight(&self) -> usize {
        self.taken.len()
    }

    pub(super) fn take(&mut self, entry: u16) {
        self.taken.push(entry);
    }

    /// Reads where the used ring is, once. Says whether something was put there: what the ring
    /// before could not tell, if this is the same used ring still.
    pub(super) fn begin(&mut self, layout: Layout, used: &Parts) -> Option<bool> {
        if self.index.is_some() {
            return Some(false);
        }
        let index = layout.used_index(used)?;
        self.index = Some(index);
        let Some(End { index: expected, untold, .. }) = self.before.take() else {
            return Some(false);
        };
        if expected != Some(index) {
            tracing::debug!(
                lost = untold.len(),
                "the device was reset: what was done before is not told"
            );
            return Some(false);
        }
        untold.into_iter().try_for_each(|(head, len)| self.put(layout, used, head, len))?;
        Some(true)
    }

    fn put(&mut self, layout: Layout, used: &Parts, head: u16, len: u32) -> Option<()> {
        let index = self.index?;
        layout.put_used(used, index, head, len)?;
        self.index = Some(index.wrapping_add(1));
        Some(())
    }

    /// Tells the used ring of what was taken from `entry`. Returns its place there.
    pub(super) fn tell(
        &mut self,
        layout: Layout,
        used: &Parts,
        entry: u16,
        head: u16,
        len: u32,
    ) -> Option<u16> {
        let index = self.index?;
        self.put(layout, used, head, len)?;
        self.forget(entry);
        Some(index)
    }

    /// Once: one that is 65,536 entries older may have the same number.
    fn forget(&mut self, entry: u16) {
        if let Some(at) = self.taken.iter().position(|taken| *taken == entry) {
            self.taken.swap_remove(at);
        }
    }

    /// It cannot be told now.
    pub(super) fn keep(&mut self, entry: u16, head: u16, len: u32) {
        self.forget(entry);
        self.untold.push((head, len));
    }

    /// The ring has ended at `base`. The next one begins before the last requests that the device
    /// has given up.
    pub(super) fn end(&mut self, mut base: u16) -> End {
        let mut taken = std::mem::take(&mut self.taken);
        while let Some(at) = taken.iter().position(|entry| *entry == base.wrapping_sub(1)) {
            taken.swap_remove(at);
            base = base.wrapping_sub(1);
        }
        if !taken.is_empty() {
            tracing::warn!(
                lost = taken.len(),
                "requests that the device has given up, and later ones are done"
            );
        }
        // Also if the used ring was never looked at.
        let before = self.before.take().unwrap_or_default();
        let index = self.index.or(before.index);
        let untold = before.untold.into_iter().chain(std::mem::take(&mut self.untold)).collect();
        End { base, index, untold }
    }
}
