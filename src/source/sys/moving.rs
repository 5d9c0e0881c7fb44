//! Moves memory by `mremap`: whole or not at all, and never onto memory of another owner.

use super::{Backing, LEAKED, Memory, Refused, map, page_size};
use alloc::vec::Vec;
use core::ffi::c_void;
use core::ptr::NonNull;
use rustix::io;
use rustix::mm::{self, MapFlags, MprotectFlags, MremapFlags, ProtFlags};
use std::sync::atomic::Ordering;

impl Memory {
    /// Makes the memory longer. It may move. New pages are readable and writable.
    pub(in crate::source) fn grow(&mut self, len: usize) -> io::Result<()> {
        assert!(len > self.len, "it becomes longer");
        if !self.plain || self.is_huge() {
            // New pages would get the protection of the last page, and huge pages cannot grow.
            return self.relocate(len);
        }
        // SAFETY: the mapping is ours, and there are no references into it. The kernel chooses
        // where it moves to, so nothing else is replaced; if it refuses, nothing has changed.
        match unsafe { mm::mremap(self.at(0), self.len, len, MremapFlags::MAYMOVE) } {
            Ok(at) => {
                (self.at, self.len) = (NonNull::new(at.cast()).ok_or(io::Errno::NOMEM)?, len);
                Ok(())
            }
            // The memory is several mappings for the kernel: a part is watched, locked, or advised
            // otherwise.
            Err(io::Errno::FAULT) => self.relocate(len),
            Err(error) => Err(error),
        }
    }

    /// Moves the memory to another address and makes it `len` bytes long, at least its length. If
    /// the kernel refuses, the memory stays where it is, whole.
    ///
    /// A part with another protection is a separate mapping for the kernel, and `mremap` moves one
    /// mapping. So the pieces are moved one by one to a place that was reserved for all of them.
    /// Each leaves an empty mapping behind (`MREMAP_DONTUNMAP`, Linux 5.7; for shared memory 5.13).
    /// It keeps the old address, so that the piece can go back if a later one is refused.
    pub(in crate::source) fn relocate(&mut self, len: usize) -> io::Result<()> {
        assert!(len >= self.len, "all of it moves");
        let pieces = self.pieces()?;
        let mut place = Reserved::new(len, &self.backing)?;
        room_for(pieces.len())?;
        let keep = if pieces.len() == 1 { MremapFlags::empty() } else { MremapFlags::DONTUNMAP };
        for (at, &(from, piece)) in pieces.iter().enumerate() {
            // SAFETY: the piece is ours, and there are no references into it.
            if let Err(error) = unsafe { place.take(self.at(from), from, piece, keep) } {
                self.move_back(place, &pieces[..at]);
                return Err(error);
            }
        }
        if pieces.len() > 1 {
            // SAFETY: the empty mappings that the pieces left are ours. If the kernel refuses, they
            // stay, empty.
            if unsafe { mm::munmap(self.at(0), self.len) }.is_err() {
                LEAKED.fetch_add(self.len as u64, Ordering::Relaxed);
            }
        }
        (self.at, self.len) = (place.keep(), len);
        Ok(())
    }

    /// Moves the pieces `moved` back to where they were.
    ///
    /// # Panics
    /// If the kernel refuses. It does so only if it lacks memory of its own: there was
    /// [room](room_for) for the mappings when the move began. Other threads may have used it up
    /// meanwhile, so this retries, within a bound.
    fn move_back(&mut self, place: Reserved, moved: &[(usize, usize)]) {
        let at = place.at;
        // Unmaps the places without a piece first, which frees a mapping.
        drop(place);
        for &(from, len) in moved.iter().rev() {
            let back = || {
                let piece = at.as_ptr().wrapping_add(from).cast();
                // SAFETY: the piece is ours, where it was moved to. So is the empty mapping that it
                // left behind and now replaces: kernels that leave one check for free mappings
                // before they unmap it.
                unsafe { mm::mremap_fixed(piece, len, len, MremapFlags::MAYMOVE, self.at(from)) }
            };
            let answer = (0..TRIES).find_map(|_| match back() {
                Err(io::Errno::NOMEM) => {
                    std::thread::yield_now();
                    None
                }
                answer => Some(answer),
            });
            assert!(
                matches!(answer, Some(Ok(_))),
                "the kernel has moved memory and refuses to move it back: {answer:?}"
            );
        }
    }

    /// Returns the pieces that are one mapping for the kernel each: offset and length, in order.
    fn pieces(&self) -> io::Result<Vec<(usize, usize)>> {
        let mut pieces = Vec::new();
        if self.is_huge() {
            // Huge pages leave no empty mapping behind, so several pieces could not go back. Nor
            // can the start of a piece be found, because huge pages do not grow in place.
            if !self.plain {
                return Err(io::Errno::INVAL);
            }
            pieces.push((0, self.len));
            return Ok(pieces);
        }
        let mut from = 0;
        while from < self.len {
            let piece = self.piece(from);
            pieces.push((from, piece));
            from += piece;
        }
        Ok(pieces)
    }

    fn is_huge(&self) -> bool {
        self.unit() != page_size()
    }

    /// Returns the length of the piece that starts at `from`.
    fn piece(&self, from: usize) -> usize {
        let (unit, rest) = (self.unit(), self.len - from);
        if self.is_one(from, rest) {
            return rest;
        }
        let (mut one, mut several) = (1, rest / unit);
        while one + 1 < several {
            let middle = one.midpoint(several);
            if self.is_one(from, middle * unit) { one = middle } else { several = middle }
        }
        one * unit
    }

    /// Returns `true` if a part is one mapping for the kernel. Asks the kernel to make it a page
    /// longer in place: the kernel refuses with `EFAULT` first if it is several mappings.
    ///
    /// A trial move does not work: since Linux 6.17 `mremap` moves several mappings at once, and if
    /// it refuses one of them it does not tell which it has moved.
    fn is_one(&self, from: usize, len: usize) -> bool {
        assert!(self.inside(from, len), "what is asked about is outside of the mapping");
        let unit = self.unit();
        // SAFETY: inside the mapping, which is ours. It does not move, and nothing is replaced.
        match unsafe { mm::mremap(self.at(from), len, len + unit, MremapFlags::empty()) } {
            Ok(_) => {
                // SAFETY: the page that was just added behind the end, where nothing was mapped.
                if unsafe { mm::munmap(self.at(from + len), unit) }.is_err() {
                    LEAKED.fetch_add(unit as u64, Ordering::Relaxed);
                }
                true
            }
            // There is no room behind it. A sealed part is refused with another error before that.
            Err(error) => matches!(error, io::Errno::NOMEM | io::Errno::AGAIN),
        }
    }

    /// Maps other memory of the same length at the same address, readable and writable. The address
    /// is never free in between.
    pub(in crate::source) fn replace(&mut self, backing: Backing) -> Result<(), Refused> {
        let mut new = Reserved::new(self.len, &backing).map_err(Refused::Unchanged)?;
        // First tries everything that can be refused at an address where nothing is lost.
        let mut rehearsal = Reserved::new(self.len, &backing).map_err(Refused::Unchanged)?;
        room_for(1).map_err(Refused::Unchanged)?;
        // SAFETY: both are ours alone.
        unsafe { rehearsal.take(new.at.as_ptr().cast(), 0, self.len, MremapFlags::empty()) }
            .map_err(Refused::Unchanged)?;
        new.at = rehearsal.keep();
        // SAFETY: both mappings are ours, and there are no references into either.
        let put = unsafe {
            mm::mremap_fixed(
                new.at.as_ptr().cast(),
                self.len,
                self.len,
                MremapFlags::MAYMOVE,
                self.at(0),
            )
        };
        (self.backing, self.plain) = (backing, true);
        match put {
            Ok(_) => {
                new.keep();
                Ok(())
            }
            Err(error) => {
                // The memory at the old address may be gone, and another thread may have mapped its
                // own there.
                LEAKED.fetch_add(self.len as u64, Ordering::Relaxed);
                self.at = new.keep();
                Err(Refused::AddressLost(error))
            }
        }
    }
}

/// Checks that the process may have `pieces` more mappings, and those that `mremap` wants to be
/// free at its start. Their number is limited (`vm.max_map_count`). If `mremap` itself refuses, it
/// may have unmapped the target.
fn room_for(pieces: usize) -> io::Result<()> {
    let page = page_size();
    let pages = pieces + FREE;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping where the kernel chooses, so it replaces none.
    let at = unsafe {
        mm::mmap_anonymous(core::ptr::null_mut(), pages * page, ProtFlags::empty(), flags)?
    };
    let at_page = |number: usize| at.cast::<u8>().wrapping_add(number * page).cast();
    // SAFETY: pages of that mapping, whose address is not shared. Every second page becomes a
    // mapping.
    let split = |number| unsafe { mm::mprotect(at_page(number), page, MprotectFlags::READ) };
    let room = (1..pages).step_by(2).try_for_each(split);
    // SAFETY: the mapping from above. If the kernel refuses, it stays, and is never used.
    if unsafe { mm::munmap(at, pages * page) }.is_err() {
        LEAKED.fetch_add((pages * page) as u64, Ordering::Relaxed);
    }
    room
}

/// Number of mappings that `mremap` wants to be free, and some for other threads.
const FREE: usize = 16;

/// Number of tries to move a piece back.
const TRIES: usize = 10_000;

/// Reserved address space. Pieces are moved into it one by one, in order.
struct Reserved {
    at: NonNull<u8>,
    len: usize,
    /// Number of bytes from its start that are not ours to unmap: a piece was moved there, or may
    /// have been.
    given: usize,
}

impl Reserved {
    fn new(len: usize, backing: &Backing) -> io::Result<Self> {
        Ok(Self { at: map(len, backing)?, len, given: 0 })
    }

    /// Moves `len` bytes from `piece` to offset `from`, behind the pieces moved before.
    ///
    /// # Safety
    /// The piece belongs to the caller, and there are no references into it.
    unsafe fn take(
        &mut self,
        piece: *mut c_void,
        from: usize,
        len: usize,
        keep: MremapFlags,
    ) -> io::Result<()> {
        assert!(
            from == self.given && len <= self.len - from,
            "the piece belongs behind the others"
        );
        let to = self.at.as_ptr().wrapping_add(from).cast();
        // From here on the place is not ours, whatever the kernel returns.
        self.given = from + len;
        // SAFETY: the piece is the caller's, and what is replaced was ours until now.
        let moved = unsafe { mm::mremap_fixed(piece, len, len, MremapFlags::MAYMOVE | keep, to) };
        if moved.is_err() {
            LEAKED.fetch_add(len as u64, Ordering::Relaxed);
        }
        moved.map(drop)
    }

    /// Gives all of it to the caller.
    fn keep(mut self) -> NonNull<u8> {
        self.given = self.len;
        self.at
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if self.given != self.len {
            // SAFETY: ours since it was reserved. No piece was moved there, and no move there was
            // tried.
            let _ = unsafe {
                mm::munmap(self.at.as_ptr().wrapping_add(self.given).cast(), self.len - self.given)
            };
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_piece_has_all_the_pages_with_one_protection() {
        let page = page_size();
        let mut memory = Memory::map(100 * page).unwrap();
        let (mut from, mut expected) = (0, Vec::new());
        for (at, pages) in [1, 2, 3, 40, 5, 49].into_iter().enumerate() {
            let rights = [MprotectFlags::READ, MprotectFlags::empty()][at % 2];
            memory.protect(from, pages * page, rights).unwrap();
            expected.push((from, pages * page));
            from += pages * page;
        }
        assert_eq!(memory.pieces().unwrap(), expected);
    }
}
