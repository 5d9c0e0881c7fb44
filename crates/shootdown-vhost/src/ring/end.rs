//! State that a ring leaves to the next ring of its queue.
#![forbid(unsafe_code)]

use super::split::Layout;
use crate::parts::Parts;

/// Start of the next ring of a queue.
#[derive(Clone, Debug, Default)]
pub(crate) struct End {
    /// Next entry of the available ring.
    pub(crate) base: u16,
    /// Next entry of the used ring, if that has been read.
    index: Option<u16>,
    /// Requests that are done and not in the used ring: head and bytes written.
    untold: Vec<(u16, u32)>,
}

impl End {
    /// Makes a start at `base` with nothing left.
    pub(crate) fn at(base: u16) -> Self {
        Self { base, ..Self::default() }
    }
}

/// Progress of a ring with the requests that it has taken.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// Next entry of the used ring, once that has been read.
    index: Option<u16>,
    /// Entries of the available ring whose requests the device has.
    taken: Vec<u16>,
    untold: Vec<(u16, u32)>,
    /// State that the former ring has left.
    before: Option<End>,
}

impl Progress {
    pub(super) fn after(before: End) -> Self {
        let before = (!before.untold.is_empty()).then_some(before);
        Self { before, ..Self::default() }
    }

    /// Returns the number of requests that the device has.
    pub(super) fn in_flight(&self) -> usize {
        self.taken.len()
    }

    pub(super) fn take(&mut self, entry: u16) {
        self.taken.push(entry);
    }

    /// Reads the next entry of the used ring, once. Puts what the former ring has left there, if
    /// the used ring is still the same. Returns `true` if something was put.
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

    /// Puts the request of `entry` into the used ring. Returns its place there.
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

    /// Removes one: an entry that is 65,536 entries older may have the same number.
    fn forget(&mut self, entry: u16) {
        if let Some(at) = self.taken.iter().position(|taken| *taken == entry) {
            self.taken.swap_remove(at);
        }
    }

    /// Keeps a request that cannot be put now.
    pub(super) fn keep(&mut self, entry: u16, head: u16, len: u32) {
        self.forget(entry);
        self.untold.push((head, len));
    }

    /// Ends the ring at `base`. The next ring begins before the last requests that the device has
    /// given up.
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
        // Also if the used ring was never read.
        let before = self.before.take().unwrap_or_default();
        let index = self.index.or(before.index);
        let untold = before.untold.into_iter().chain(std::mem::take(&mut self.untold)).collect();
        End { base, index, untold }
    }
}
