//! userfaultfd, and what `/proc` tells about the pages and mappings of this process.
//!
//! None of these calls changes what the process can read or write, so all of them are safe to call.

use super::{Memory, page_size};
use crate::range::AddressRange;
use crate::sync::Ordering;
use core::ffi::c_void;
use core::ptr;
use core::sync::atomic::AtomicU8;
use linux_raw_sys::general as raw;
use linux_raw_sys::ioctl as codes;
use rustix::fd::{AsFd, FromRawFd, OwnedFd};
use rustix::io;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Setter, Updater, ioctl, opcode};
use rustix::mm::{self, Advice, UserfaultfdFlags};
use std::fs::File;

/// Size of a message in bytes.
pub(crate) const MESSAGE: usize = size_of::<raw::uffd_msg>();

/// Flag that lets an ordinary user open a descriptor. Faults of the kernel cannot be handled
/// through such a descriptor.
pub(crate) const USER_MODE_ONLY: u32 = raw::UFFD_USER_MODE_ONLY;

/// Opens a non-blocking descriptor by the system call.
pub(crate) fn open(flags: u32) -> io::Result<OwnedFd> {
    let flags = UserfaultfdFlags::from_bits_retain(flags)
        | UserfaultfdFlags::CLOEXEC
        | UserfaultfdFlags::NONBLOCK;
    // SAFETY: what the descriptor can do to the process's memory is done by `register`, which
    // changes nothing that can be read.
    unsafe { mm::userfaultfd(flags) }
}

/// `USERFAULTFD_IOC_NEW`: its argument is a number, its result a descriptor.
struct New(usize);

// SAFETY: the kernel reads no memory through the argument, which is a number, and on success
// returns a descriptor that is new and the caller's.
unsafe impl Ioctl for New {
    type Output = OwnedFd;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::none(0xaa, 0)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        ptr::without_provenance_mut(self.0)
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> io::Result<OwnedFd> {
        // SAFETY: called with what the kernel returned.
        Ok(unsafe { OwnedFd::from_raw_fd(out) })
    }
}

/// Opens a non-blocking descriptor through `/dev/userfaultfd` (Linux 6.1). The mode of that file
/// tells who may do so.
pub(crate) fn open_by(device: &File, flags: u32) -> io::Result<OwnedFd> {
    let flags = UserfaultfdFlags::from_bits_retain(flags)
        | UserfaultfdFlags::CLOEXEC
        | UserfaultfdFlags::NONBLOCK;
    // SAFETY: `USERFAULTFD_IOC_NEW` takes the flags as a number; see `open`.
    unsafe { ioctl(device, New(flags.bits() as usize)) }
}

/// Does the handshake, which is allowed once for a descriptor. Returns the features that the kernel
/// knows.
pub(crate) fn api(fd: impl AsFd, features: u64) -> io::Result<u64> {
    let mut api = raw::uffdio_api { api: u64::from(raw::UFFD_API), features, ioctls: 0 };
    // SAFETY: `UFFDIO_API` reads and writes one `uffdio_api`.
    unsafe { ioctl(fd, Updater::<{ codes::UFFDIO_API }, _>::new(&mut api))? };
    Ok(api.features)
}

/// Registers pages for events, in write-protect mode. The kernel itself removes a mark of
/// [`Pagemap::mark`] when the page is written, so no access raises a fault that must be handled.
pub(crate) fn register(fd: impl AsFd, pages: AddressRange) -> io::Result<()> {
    let range = bounds(pages)?;
    let mut register =
        raw::uffdio_register { range, mode: u64::from(raw::UFFDIO_REGISTER_MODE_WP), ioctls: 0 };
    // SAFETY: `UFFDIO_REGISTER` reads and writes one `uffdio_register`; see above for what it does
    // to the memory.
    unsafe { ioctl(fd, Updater::<{ codes::UFFDIO_REGISTER }, _>::new(&mut register)) }
}

/// Unregisters pages.
pub(crate) fn unregister(fd: impl AsFd, pages: AddressRange) -> io::Result<()> {
    // SAFETY: `UFFDIO_UNREGISTER` reads one `uffdio_range`.
    unsafe { ioctl(fd, Setter::<{ codes::UFFDIO_UNREGISTER }, _>::new(bounds(pages)?)) }
}

fn bounds(pages: AddressRange) -> io::Result<raw::uffdio_range> {
    Ok(raw::uffdio_range { start: pages.start(), len: pages.len().ok_or(io::Errno::INVAL)? })
}

/// Returns `true` if a change is under way whose event may not have been raised yet. The kernel
/// checks this before it fills a page, so it is asked to fill an empty range.
pub(crate) fn changing(fd: impl AsFd) -> bool {
    let mut nothing = raw::uffdio_zeropage {
        range: raw::uffdio_range { start: 0, len: 0 },
        mode: 0,
        zeropage: 0,
    };
    // SAFETY: `UFFDIO_ZEROPAGE` reads and writes one `uffdio_zeropage`; it fills no page of an
    // empty range.
    let answer = unsafe { ioctl(fd, Updater::<{ codes::UFFDIO_ZEROPAGE }, _>::new(&mut nothing)) };
    answer == Err(io::Errno::AGAIN)
}

/// Takes over a descriptor that a message carries.
pub(crate) fn adopt(number: u32) -> OwnedFd {
    // SAFETY: called for the descriptor in a fork event, which the kernel has just made for its
    // reader.
    unsafe { OwnedFd::from_raw_fd(number.cast_signed()) }
}

/// Excludes pages from the children of a fork (`MADV_DONTFORK`), or includes them again.
pub(crate) fn keep_from_children(pages: AddressRange, keep: bool) -> io::Result<()> {
    let range = bounds(pages)?;
    let (at, len) = (usize::try_from(range.start), usize::try_from(range.len));
    let (Ok(at), Ok(len)) = (at, len) else { return Err(io::Errno::INVAL) };
    let advice = if keep { Advice::LinuxDontFork } else { Advice::LinuxDoFork };
    // SAFETY: this process's memory stays as it is; what changes is what its children get.
    unsafe { mm::madvise(ptr::without_provenance_mut(at), len, advice) }
}

/// The page tables of this process, as in `/proc/self/pagemap`.
pub(crate) struct Pagemap(OwnedFd);

/// `struct pm_scan_arg` of `linux/fs.h`.
#[repr(C)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region` of `linux/fs.h`.
#[repr(C)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// Kind of pages to scan for: those that have all categories of `with`, none of `without`, and some
/// of `any`.
struct Kind {
    with: u64,
    without: u64,
    any: u64,
}

/// Action of a scan on the pages that it finds.
#[derive(PartialEq)]
enum Found {
    /// Marks all of them.
    Marked,
    /// Returns the first region.
    Region,
    /// Returns the first page.
    Page,
}

const PAGEMAP_SCAN: Opcode = opcode::read_write::<Scan>(b'f', 16);
const PM_SCAN_WP_MATCHING: u64 = 1;
const PAGE_IS_WPALLOWED: u64 = 1;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

impl Pagemap {
    /// Opens the file, if the kernel can scan it (Linux 6.7).
    pub(crate) fn open() -> Option<Self> {
        let pagemap = Self(File::open("/proc/self/pagemap").ok()?.into());
        // A kernel that can scan accepts an empty range; one that cannot refuses it.
        pagemap
            .scan(0, 0, Kind { with: 0, without: 0, any: PAGE_IS_PRESENT }, Found::Page)
            .is_ok()
            .then_some(pagemap)
    }

    /// Scans `start` to `end` (exclusive) for pages of a kind. Returns where the scan stopped, and
    /// the first region found.
    fn scan(
        &self,
        start: u64,
        end: u64,
        of: Kind,
        found: Found,
    ) -> io::Result<(u64, Option<Region>)> {
        let mut region = Region { start: 0, end: 0, categories: 0 };
        let mut scan = Scan {
            size: size_of::<Scan>() as u64,
            flags: 0,
            start,
            end,
            walk_end: 0,
            vec: 0,
            vec_len: 0,
            max_pages: 0,
            category_inverted: of.without,
            category_mask: of.with | of.without,
            category_anyof_mask: of.any,
            return_mask: PAGE_IS_WPALLOWED,
        };
        match found {
            Found::Marked => scan.flags = PM_SCAN_WP_MATCHING,
            Found::Region | Found::Page => {
                (scan.vec, scan.vec_len) =
                    (ptr::from_mut(&mut region).expose_provenance() as u64, 1);
                scan.max_pages = u64::from(found == Found::Page);
            }
        }
        // SAFETY: `PAGEMAP_SCAN` reads and writes one `pm_scan_arg`, and writes at most `vec_len`
        // regions to `vec`. With `PM_SCAN_WP_MATCHING` it marks pages; `register` tells what
        // removes the marks.
        let count = unsafe { ioctl(&self.0, CountedUpdater(&mut scan))? };
        Ok((scan.walk_end, (count > 0).then_some(region)))
    }

    /// Returns `true` if all of `pages` is mapped and registered, at one moment.
    pub(crate) fn is_watched(&self, pages: AddressRange) -> io::Result<bool> {
        let of = Kind { with: PAGE_IS_WPALLOWED, without: 0, any: 0 };
        let (_, found) =
            self.scan(pages.start(), pages.last().wrapping_add(1), of, Found::Region)?;
        // The kernel reports adjacent mappings as one region.
        Ok(found.is_some_and(|found| {
            found.start == pages.start() && found.end == pages.last().wrapping_add(1)
        }))
    }

    /// Marks the present pages, in memory or swapped out, as far as they are registered. Does not
    /// allocate.
    pub(crate) fn mark(&self, pages: AddressRange) -> io::Result<()> {
        let (mut at, end) = (pages.start(), pages.last().wrapping_add(1));
        while at < end {
            let of = Kind {
                with: PAGE_IS_WPALLOWED,
                without: 0,
                any: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            };
            let (walked, _) = self.scan(at, end, of, Found::Marked)?;
            if walked <= at {
                return Err(io::Errno::IO);
            }
            at = walked;
        }
        Ok(())
    }

    /// Returns `true` if a marked page is in memory and unwritten. A swapped-out page looks like
    /// the mark that the kernel keeps of a page that is gone. A zero page counts as gone.
    pub(crate) fn has_marked(&self, pages: AddressRange) -> io::Result<bool> {
        let end = pages.last().wrapping_add(1);
        let of = Kind {
            with: PAGE_IS_WPALLOWED | PAGE_IS_PRESENT,
            without: PAGE_IS_WRITTEN | PAGE_IS_PFNZERO,
            any: 0,
        };
        self.scan(pages.start(), end, of, Found::Page).map(|(_, found)| found.is_some())
    }
}

/// `PAGEMAP_SCAN`. Reads and writes its argument, and returns a count.
struct CountedUpdater<'a>(&'a mut Scan);

// SAFETY: the argument is one `pm_scan_arg`, as the opcode says.
unsafe impl Ioctl for CountedUpdater<'_> {
    type Output = i32;

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        PAGEMAP_SCAN
    }

    fn as_ptr(&mut self) -> *mut c_void {
        ptr::from_mut(self.0).cast()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> io::Result<i32> {
        Ok(out)
    }
}

/// The mappings of this process, as in `/proc/self/maps`.
pub(crate) struct Maps(OwnedFd);

/// `struct procmap_query` of `linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct Query {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

/// `PROCMAP_QUERY_COVERING_OR_NEXT_VMA`.
const COVERING_OR_NEXT: u64 = 16;
const PROCMAP_QUERY: Opcode = opcode::read_write::<Query>(b'f', 17);

/// A mapping of this process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mapping {
    pub(crate) range: AddressRange,
    /// Page size in bytes. Larger in hugetlbfs.
    pub(crate) page: u64,
}

impl Maps {
    /// Opens the file, if the kernel answers queries for single mappings (Linux 6.11).
    pub(crate) fn open() -> Option<Self> {
        let maps = Self(File::open("/proc/self/maps").ok()?.into());
        // The stack of this thread is certainly mapped.
        let here = ptr::from_ref(&maps).addr() as u64;
        maps.at(here).is_some().then_some(maps)
    }

    /// Returns the mapping that contains `address`.
    pub(crate) fn at(&self, address: u64) -> Option<Mapping> {
        self.query(address, 0)
    }

    /// Calls `each` with every mapped part of `range`, mapping by mapping. Does not allocate.
    pub(crate) fn walk(&self, range: AddressRange, mut each: impl FnMut(AddressRange)) {
        let mut from = range.start();
        while let Some(Mapping { range: found, .. }) = self.query(from, COVERING_OR_NEXT) {
            // Empty if the mapping lies behind `range`.
            let (start, last) = (found.start().max(from), found.last().min(range.last()));
            AddressRange::try_from(start..=last).into_iter().for_each(&mut each);
            match last.checked_add(1) {
                Some(next) if next <= range.last() => from = next,
                _ => break,
            }
        }
    }

    /// Returns `true` if every page of `range` is mapped.
    pub(crate) fn are_whole(&self, range: AddressRange) -> bool {
        let mut mapped = 0_u64;
        self.walk(range, |part| mapped = mapped.saturating_add(part.len().unwrap_or(u64::MAX)));
        Some(mapped) == range.len()
    }

    fn query(&self, address: u64, query_flags: u64) -> Option<Mapping> {
        let mut query = Query {
            size: size_of::<Query>() as u64,
            query_flags,
            query_addr: address,
            ..Query::default()
        };
        // SAFETY: `PROCMAP_QUERY` reads and writes one `procmap_query`. It has no buffers for
        // names, so the kernel writes none.
        unsafe { ioctl(self.0.as_fd(), Updater::<{ PROCMAP_QUERY }, _>::new(&mut query)).ok()? };
        let range =
            AddressRange::new(query.vma_start, query.vma_end.checked_sub(query.vma_start)?).ok()?;
        Some(Mapping { range, page: query.vma_page_size.max(page_size() as u64) })
    }
}

/// Detects a child of `fork`: a page that the kernel wipes in children (`MADV_WIPEONFORK`). The
/// check is one load.
pub(crate) struct ForkMark(Memory);

impl ForkMark {
    pub(crate) fn new() -> io::Result<Self> {
        let mut page = Memory::map(page_size())?;
        page.write(0, &[1]);
        // SAFETY: the page is ours, and only this value looks at it.
        unsafe { mm::madvise(page.as_ptr().cast(), page.len(), Advice::LinuxWipeOnFork)? };
        Ok(Self(page))
    }

    #[inline]
    pub(crate) fn is_forked(&self) -> bool {
        // SAFETY: mapped as long as `self` exists. Only the kernel writes it, in a child.
        unsafe { AtomicU8::from_ptr(self.0.as_ptr()) }.load(Ordering::Relaxed) == 0
    }
}

/// Returns the limit of mappings of the process.
pub(crate) fn most_mappings() -> usize {
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok();
    limit.and_then(|text| text.trim().parse().ok()).unwrap_or(65_530)
}
