//! Changes that raise no event (M6): each is pinned on the kernel that the test runs on, and each
//! shows its remedy, an invalidation by hand before the change. `loud.rs` has those that raise one.
//! The guide `memory_changes` is the table of both.

use crate::kinds::{
    Area, Change, HUGES, Kind, Outcome, SMALL, check, frame, outcome, refused, segment, silent,
};
use crate::memory::{PAGE, Raw};
use crate::uffd::no_fork;
use shootdown::Event;
use std::io;
use std::ptr;
use std::time::{Duration, Instant};

crate::list![
    a_hole_punched_into_a_file_raises_none,
    a_file_made_shorter_raises_none,
    zeros_written_over_a_file_on_disk_raise_none,
    madv_remove_through_another_mapping_of_the_memory_raises_none,
    shmdt_raises_none,
    shmat_over_a_watched_range_raises_none,
    remap_file_pages_raises_none,
    mprotect_raises_none,
    guard_pages_that_drop_what_was_there_raise_none,
    pageout_of_a_file_drops_the_pages_and_raises_none,
    pageout_to_swap_raises_none,
    cold_and_locked_and_populated_memory_raises_none,
    writes_of_another_process_raise_none,
    the_first_write_to_a_page_that_was_only_read_moves_it_and_raises_none,
    pages_that_collapse_into_a_huge_one_move_and_raise_none,
    pages_that_are_merged_move_and_raise_none,
    pages_that_move_to_another_node_raise_none,
    pages_that_userfaultfd_itself_moves_away_raise_none,
];

crate::list![fn huge_tests: of_huge_pages_the_same_changes_raise_none];

/// What a test needs and this machine does not have.
pub fn lacking(test: &str) -> Option<String> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    match test {
        "pageout_to_swap_raises_none" => {
            (read("/proc/swaps").lines().count() < 2).then(|| "no swap".into())
        }
        "pages_that_move_to_another_node_raise_none" => {
            let several = read("/sys/devices/system/node/online").contains(['-', ',']);
            (!several).then(|| "one NUMA node: pages have nowhere to go".into())
        }
        "pages_that_are_merged_move_and_raise_none" => std::fs::write(KSM_RUN, read(KSM_RUN))
            .err()
            .map(|error| format!("KSM cannot be switched on: {error}")),
        "guard_pages_that_drop_what_was_there_raise_none" => {
            let refused = Raw::map(1).advise(GUARD_INSTALL).err();
            refused
                .map(|error| format!("no MADV_GUARD_INSTALL, which Linux has since 6.13: {error}"))
        }
        "pages_that_userfaultfd_itself_moves_away_raise_none" => {
            let open = raw_uffd();
            open.err().map(|error| format!("no UFFDIO_MOVE, which Linux has since 6.8: {error}"))
        }
        "the_first_write_to_a_page_that_was_only_read_moves_it_and_raises_none"
        | "pages_that_collapse_into_a_huge_one_move_and_raise_none"
        | "pageout_of_a_file_drops_the_pages_and_raises_none" => {
            let page = Raw::map(1);
            page.write(1);
            (frame(page) == Some(0))
                .then(|| "the frames of pages are not shown: CAP_SYS_ADMIN is needed".into())
        }
        _ => None,
    }
}

const GUARD_INSTALL: i32 = 102;
const COLLAPSE: i32 = 25;
const KSM_RUN: &str = "/sys/kernel/mm/ksm/run";

fn punch(area: Area) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: the kernel checks the descriptor.
    check(unsafe { libc::fallocate(area.fd, mode, 0, area.raw.len as i64) })
}

fn truncate(area: Area) -> io::Result<()> {
    // SAFETY: as above.
    check(unsafe { libc::ftruncate(area.fd, 0) })
}

/// firecracker PR #18.
fn a_hole_punched_into_a_file_raises_none() {
    for kind in [Kind::Memfd, Kind::File] {
        silent(kind, Event::Clear, |area| {
            punch(area)?;
            assert!(
                area.raw.look().unwrap().iter().all(|byte| *byte == 0),
                "what was there is gone"
            );
            Ok(())
        });
    }
    // Pages of a private mapping that were written to are copies: they stay.
    for kind in [Kind::MemfdPrivate, Kind::FilePrivate] {
        silent(kind, Event::Clear, |area| {
            punch(area)?;
            assert!(area.raw.look().unwrap().iter().all(|byte| *byte == 1));
            Ok(())
        });
    }
}

fn a_file_made_shorter_raises_none() {
    for kind in [Kind::Memfd, Kind::MemfdPrivate, Kind::File, Kind::FilePrivate] {
        silent(kind, Event::Clear, |area| {
            truncate(area)?;
            assert!(area.raw.look().is_none(), "the copies of a private mapping go, too");
            Ok(())
        });
    }
}

fn zeros_written_over_a_file_on_disk_raise_none() {
    silent(Kind::File, Event::Clear, |area| {
        // SAFETY: the kernel checks the descriptor.
        check(unsafe {
            libc::fallocate(area.fd, libc::FALLOC_FL_ZERO_RANGE, 0, area.raw.len as i64)
        })?;
        assert!(area.raw.look().unwrap().iter().all(|byte| *byte == 0));
        Ok(())
    });
}

fn madv_remove_through_another_mapping_of_the_memory_raises_none() {
    silent(Kind::Memfd, Event::Clear, |area| {
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping where the kernel chooses, of which nobody else knows.
        let at = unsafe {
            libc::mmap(ptr::null_mut(), area.raw.len, rights, libc::MAP_SHARED, area.fd, 0)
        };
        let other = Raw { at: at.expose_provenance(), len: area.raw.len };
        other.advise(libc::MADV_REMOVE)?;
        other.unmap();
        assert!(
            area.raw.look().unwrap().iter().all(|byte| *byte == 0),
            "the event names the other mapping only"
        );
        Ok(())
    });
}

fn shmdt_raises_none() {
    // SAFETY: memory of a test, into which there are no references.
    silent(Kind::Sysv, Event::Unmap, |area| check(unsafe { libc::shmdt(area.ptr()) }));
}

fn shmat_over(area: Area) -> io::Result<()> {
    let segment = segment(area.raw.len);
    // SAFETY: memory of a test, into which there are no references.
    let at = unsafe { libc::shmat(segment, area.ptr(), libc::SHM_REMAP) };
    // SAFETY: the segment goes with its last mapping.
    unsafe { libc::shmctl(segment, libc::IPC_RMID, ptr::null_mut()) };
    if at != area.ptr() {
        return Err(io::Error::last_os_error());
    }
    assert!(area.raw.look().unwrap().iter().all(|byte| *byte == 0), "somebody else's memory");
    Ok(())
}

/// openucx/ucx PRs #2731, #2732, #2733.
fn shmat_over_a_watched_range_raises_none() {
    SMALL.into_iter().for_each(|kind| silent(kind, Event::Unmap, shmat_over));
}

/// The first page shows what was in the third.
fn remap_pages(area: Area) -> io::Result<()> {
    area.raw.part(2, 1).write(3);
    // SAFETY: memory of a test, into which there are no references.
    unsafe { check(libc::syscall(libc::SYS_remap_file_pages, area.ptr(), PAGE, 0, 2, 0)) }?;
    assert!(area.raw.part(0, 1).look().unwrap().iter().all(|byte| *byte == 3));
    Ok(())
}

fn remap_file_pages_raises_none() {
    for kind in [Kind::SharedAnonymous, Kind::Memfd, Kind::Sysv, Kind::File] {
        silent(kind, Event::Unmap, remap_pages);
    }
    for kind in [Kind::Private, Kind::MemfdPrivate, Kind::FilePrivate] {
        refused(kind, libc::EINVAL, |area| {
            // SAFETY: as above.
            unsafe { check(libc::syscall(libc::SYS_remap_file_pages, area.ptr(), PAGE, 0, 2, 0)) }
        });
    }
}

fn protect(area: Area) -> io::Result<()> {
    // SAFETY: memory of a test, into which there are no references.
    check(unsafe { libc::mprotect(area.ptr(), area.raw.len, libc::PROT_NONE) })
}

/// shadPS4 PR #4212.
fn mprotect_raises_none() {
    SMALL.into_iter().for_each(|kind| silent(kind, Event::ProtectionVma, protect));
}

fn guard_pages_that_drop_what_was_there_raise_none() {
    for kind in SMALL {
        silent(kind, Event::Clear, |area| {
            area.raw.advise(GUARD_INSTALL)?;
            assert!(area.raw.look().is_none(), "an access faults");
            area.raw.advise(GUARD_INSTALL + 1)?;
            let private =
                matches!(area.kind, Kind::Private | Kind::MemfdPrivate | Kind::FilePrivate);
            let stays = area.raw.look().unwrap().iter().all(|byte| *byte == 1);
            assert_eq!(
                stays, !private,
                "{:?}: guarded no more, private pages are as new",
                area.kind
            );
            Ok(())
        });
    }
}

fn pageout_of_a_file_drops_the_pages_and_raises_none() {
    silent(Kind::File, Event::Clear, |area| {
        // SAFETY: the kernel checks the descriptor. What is not on the disk is not dropped.
        check(unsafe { libc::fsync(area.fd) })?;
        // A page that somebody looks at is left alone, so it is asked for again.
        let began = Instant::now();
        while frame(area.raw).is_some() {
            assert!(began.elapsed() < Duration::from_secs(20), "the page stays in its frame");
            area.raw.advise(libc::MADV_PAGEOUT)?;
        }
        assert!(
            area.raw.look().unwrap().iter().all(|byte| *byte == 1),
            "and comes back with the same contents"
        );
        Ok(())
    });
}

fn pageout_to_swap_raises_none() {
    for kind in [Kind::Private, Kind::Memfd] {
        silent(kind, Event::Clear, |area| area.raw.advise(libc::MADV_PAGEOUT));
    }
}

fn cold_and_locked_and_populated_memory_raises_none() {
    let changes: [Change; 4] = [
        |area| area.raw.advise(libc::MADV_COLD),
        |area| area.raw.advise(libc::MADV_POPULATE_WRITE),
        |area| area.raw.advise(libc::MADV_HUGEPAGE),
        |area| {
            // SAFETY: memory of a test.
            unsafe { check(libc::mlock(area.ptr(), area.raw.len))? };
            // SAFETY: as above.
            check(unsafe { libc::munlock(area.ptr(), area.raw.len) })
        },
    ];
    for (kind, change) in SMALL.into_iter().flat_map(|kind| changes.map(|change| (kind, change))) {
        let _fork = no_fork();
        let area = Area::new(kind);
        assert_eq!(outcome(area.range(), || change(area)), Outcome::Silent, "{kind:?}");
        // Nothing has to be done.
        assert!(area.raw.look().unwrap().iter().all(|byte| *byte == 1));
    }
}

fn writes_of_another_process_raise_none() {
    for kind in SMALL {
        let _fork = no_fork();
        let area = Area::new(kind);
        let before = frame(area.raw);
        let write = || {
            let byte = [2_u8; 8];
            let local = libc::iovec { iov_base: byte.as_ptr().cast_mut().cast(), iov_len: 8 };
            let remote = libc::iovec { iov_base: area.ptr(), iov_len: 8 };
            // SAFETY: memory of a test, written to as another process would.
            let wrote = unsafe {
                libc::process_vm_writev(
                    libc::getpid(),
                    &raw const local,
                    1,
                    &raw const remote,
                    1,
                    0,
                )
            };
            assert_eq!(wrote, 8);
            // As a debugger does.
            use std::os::unix::fs::FileExt;
            let memory = std::fs::File::options().write(true).open("/proc/self/mem")?;
            memory.write_all_at(&[3; 8], area.raw.at as u64 + 8)
        };
        assert_eq!(outcome(area.range(), write), Outcome::Silent, "{kind:?}");
        let now = area.raw.part(0, 1).look().unwrap();
        // The same page: a device that has mapped it sees what was written, as with any write.
        assert_eq!((&now[..8], &now[8..16], frame(area.raw)), (&[2; 8][..], &[3; 8][..], before));
    }
}

fn the_first_write_to_a_page_that_was_only_read_moves_it_and_raises_none() {
    let write = |area: Area| {
        // SAFETY: memory of a test, into which there are no references.
        let read = unsafe { area.ptr().cast::<u8>().read_volatile() };
        let before = frame(area.raw).unwrap();
        area.raw.write(read + 1);
        assert_ne!(
            frame(area.raw).unwrap(),
            before,
            "it was the page of zeros, or the file's, and is a copy"
        );
        Ok(())
    };
    let _fork = no_fork();
    for kind in [Kind::Private, Kind::MemfdPrivate, Kind::FilePrivate] {
        let area = Area::untouched(kind);
        assert_eq!(outcome(area.range(), || write(area)), Outcome::Silent, "{kind:?}");
    }
    // The remedy: who registers memory for reading writes to it first.
    let area = Area::new(Kind::Private);
    let before = frame(area.raw);
    area.raw.write(9);
    assert_eq!(frame(area.raw), before);
}

/// Four MiB of private memory, of which the two in the middle are one huge page's place.
fn aligned() -> Raw {
    let memory = Raw::map(1024);
    let at = memory.at.next_multiple_of(2 << 20);
    let place = Raw { at, len: 2 << 20 };
    place.write(1);
    place
}

fn pages_that_collapse_into_a_huge_one_move_and_raise_none() {
    let _fork = no_fork();
    let place = aligned();
    let before = frame(place.part(7, 1));
    assert_eq!(outcome(place.range(), || place.advise(COLLAPSE)), Outcome::Silent);
    assert_ne!(frame(place.part(7, 1)), before);
    assert!(place.look().unwrap().iter().all(|byte| *byte == 1));
}

fn pages_that_are_merged_move_and_raise_none() {
    let _fork = no_fork();
    let area = Raw::map(64);
    area.write(0x5a);
    let set = |name: &str, value: &str| std::fs::write(format!("/sys/kernel/mm/ksm/{name}"), value);
    let get = |name: &str| std::fs::read_to_string(format!("/sys/kernel/mm/ksm/{name}")).unwrap();
    let (run, scan, sleep) = (get("run"), get("pages_to_scan"), get("sleep_millisecs"));
    let merge = || {
        area.advise(libc::MADV_MERGEABLE)?;
        set("pages_to_scan", "10000")?;
        set("sleep_millisecs", "1")?;
        set("run", "1")?;
        let began = Instant::now();
        let merged =
            || std::fs::read_to_string("/proc/self/ksm_merging_pages").unwrap().trim() != "0";
        while !merged() && began.elapsed() < Duration::from_secs(20) {
            std::thread::yield_now();
        }
        assert!(merged(), "no page was merged");
        Ok(())
    };
    let outcome = outcome(area.range(), merge);
    set("run", run.trim())
        .and(set("pages_to_scan", scan.trim()))
        .and(set("sleep_millisecs", sleep.trim()))
        .unwrap();
    assert_eq!(outcome, Outcome::Silent);
    assert!(area.look().unwrap().iter().all(|byte| *byte == 0x5a));
    area.advise(libc::MADV_UNMERGEABLE).unwrap();
}

fn pages_that_move_to_another_node_raise_none() {
    let _fork = no_fork();
    let area = Area::new(Kind::Private);
    let before = frame(area.raw);
    let migrate = || {
        for node in [0_i32, 1] {
            let (pages, mut status) = ([area.ptr()], [0_i32]);
            let all = 2; // MPOL_MF_MOVE
            // SAFETY: names one page of a test.
            unsafe {
                check(libc::syscall(
                    libc::SYS_move_pages,
                    0,
                    1,
                    pages.as_ptr(),
                    (&raw const node),
                    status.as_mut_ptr(),
                    all,
                ))
            }?;
            assert_eq!(status, [node]);
        }
        Ok(())
    };
    assert_eq!(outcome(area.range(), migrate), Outcome::Silent);
    assert!(before == Some(0) || frame(area.raw) != before);
}

/// A userfaultfd of the test's own, that can move pages.
fn raw_uffd() -> io::Result<i32> {
    // SAFETY: makes a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | 1) }
        as i32;
    check(fd)?;
    let mut api = [0xaa_u64, 1 << 16, 0];
    // SAFETY: `UFFDIO_API` reads and writes three words.
    check(unsafe { libc::ioctl(fd, 0xc018_aa3f, api.as_mut_ptr()) })?;
    Ok(fd)
}

fn pages_that_userfaultfd_itself_moves_away_raise_none() {
    let _fork = no_fork();
    let (area, to, fd) = (Area::new(Kind::Private), Raw::map(16), raw_uffd().unwrap());
    let mut register = [to.at as u64, to.len as u64, 1, 0];
    // SAFETY: `UFFDIO_REGISTER` reads and writes four words.
    check(unsafe { libc::ioctl(fd, 0xc020_aa00, register.as_mut_ptr()) }).unwrap();
    let away = || {
        let mut order = [to.at as u64, area.raw.at as u64, area.raw.len as u64, 0, 0];
        // SAFETY: `UFFDIO_MOVE` reads and writes five words; both are memory of this test.
        check(unsafe { libc::ioctl(fd, 0xc028_aa05, order.as_mut_ptr()) })
    };
    assert_eq!(outcome(area.range(), away), Outcome::Silent);
    assert!(area.raw.look().unwrap().iter().all(|byte| *byte == 0), "the old addresses are as new");
    assert!(to.look().unwrap().iter().all(|byte| *byte == 1));
}

fn of_huge_pages_the_same_changes_raise_none() {
    silent(Kind::HugeMemfd, Event::Clear, punch);
    silent(Kind::HugeMemfd, Event::Clear, truncate);
    for kind in HUGES {
        silent(kind, Event::Unmap, shmat_over);
        silent(kind, Event::ProtectionVma, protect);
        for advice in
            [libc::MADV_COLD, libc::MADV_PAGEOUT, libc::MADV_FREE, GUARD_INSTALL, COLLAPSE]
        {
            let area = Area::new(kind);
            assert_eq!(
                outcome(area.range(), || area.raw.advise(advice)),
                Outcome::Refused(libc::EINVAL),
                "{kind:?} {advice}"
            );
        }
    }
}
