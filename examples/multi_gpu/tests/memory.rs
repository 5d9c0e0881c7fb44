//! What calls do to address spaces, beyond the cases in `linux`.

use super::linux::show;
use crate::memory::{Access, Action, Change, Program};
use crate::recording::parse;
use shootdown::{AddressRange, Event};

fn range(start: u64, end: u64) -> AddressRange {
    AddressRange::try_from(start..end).unwrap()
}

fn all(lines: &[&str]) -> Vec<Vec<Action>> {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let mut program = Program::default();
    parse("the test", text.as_bytes(), false)
        .unwrap()
        .calls
        .iter()
        .map(|call| program.run(call))
        .collect()
}

/// What the last line causes.
fn last(lines: &[&str]) -> Vec<String> {
    all(lines).last().unwrap().iter().map(show).collect()
}

const MAP: &str = "1 1.000000 mmap(NULL, 16384, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x10000";

#[test]
fn munmap_of_parts_leaves_the_rest() {
    let part = "1 1.000001 munmap(0x11000, 4096) = 0";
    assert_eq!(last(&[MAP, part]), ["0: UNMAP 11000-12000 -11000-12000"]);
    let rest = "1 1.000002 munmap(0x10000, 16384) = 0";
    assert_eq!(last(&[MAP, part, rest]), ["0: UNMAP 10000-14000 -10000-11000 -12000-14000"]);
    assert_eq!(last(&[MAP, "1 1.000001 munmap(0x90000, 4096) = 0"]), [""; 0], "nothing was there");
}

#[test]
fn a_mapping_over_another_unmaps_it_first() {
    let over = "1 1.000001 mmap(0x12000, 8192, PROT_READ, MAP_PRIVATE|MAP_FIXED, 3, 0) = 0x12000";
    assert_eq!(
        last(&[MAP, over]),
        ["0: UNMAP 12000-14000 -12000-14000", "0: mapped 12000-14000 Read"]
    );
}

#[test]
fn what_a_device_may_do_follows_what_the_processor_may() {
    for (prot, access) in [
        ("PROT_NONE", "None"),
        ("PROT_EXEC", "None"),
        ("PROT_WRITE", "None"),
        ("PROT_READ|PROT_EXEC", "Read"),
    ] {
        let map =
            format!("1 1.0 mmap(NULL, 4096, {prot}, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x10000");
        assert_eq!(last(&[&map])[1], format!("0: mapped 10000-11000 {access}"));
    }
}

#[test]
fn mremap_shrinks_grows_copies_and_leaves_the_old_one_empty() {
    assert_eq!(
        last(&[MAP, "1 1.1 mremap(0x10000, 16384, 4096, 0) = 0x10000"]),
        ["0: UNMAP 11000-14000 -11000-14000"]
    );
    assert_eq!(
        last(&[MAP, "1 1.1 mremap(0x10000, 16384, 20480, 0) = 0x10000"]),
        ["0: mapped 14000-15000 Write"]
    );
    let copied = "1 1.1 mremap(0x10000, 0, 16384, MREMAP_MAYMOVE) = 0x50000";
    assert_eq!(last(&[MAP, copied]), ["0: mapped 50000-54000 Write"]);
    let kept = "1 1.1 mremap(0x10000, 16384, 16384, MREMAP_MAYMOVE|MREMAP_DONTUNMAP) = 0x50000";
    assert_eq!(
        last(&[MAP, kept]),
        ["0: UNMAP 10000-14000 discarded", "0: mapped 50000-54000 Write"]
    );
    // What is left is empty: `fork` has nothing to protect there.
    assert_eq!(
        last(&[MAP, kept, "1 1.2 fork() = 2"]),
        ["0: PROTECTION_PAGE 50000-54000 Write", "1: created 10000-14000 Write 50000-54000 Write"]
    );
}

#[test]
fn brk_goes_both_ways() {
    let began = "1 1.000000 brk(NULL) = 0x5800";
    let up = "1 1.000001 brk(0x8000) = 0x8000";
    assert_eq!(last(&[began, up]), ["0: mapped 6000-8000 Write"]);
    assert_eq!(
        last(&[began, up, "1 1.000002 brk(0x6800) = 0x6800"]),
        ["0: UNMAP 7000-8000 -7000-8000"]
    );
    assert_eq!(
        last(&[began, up, "1 1.000002 brk(0xff0000000) = 0x8000"]),
        [""; 0],
        "refused: the break stays"
    );
}

#[test]
fn neighbours_that_are_alike_are_one_mapping() {
    let next =
        "1 1.1 mmap(NULL, 4096, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x14000";
    let discard = "1 1.2 madvise(0x10000, 20480, MADV_DONTNEED) = 0";
    assert_eq!(last(&[MAP, next, discard]), ["0: CLEAR 10000-15000 discarded"]);
    let file = "1 1.1 mmap(NULL, 4096, PROT_READ|PROT_WRITE, MAP_PRIVATE, 3, 0) = 0x14000";
    assert_eq!(last(&[MAP, file, discard]).len(), 2);
    // Marks tell them apart.
    for mark in [
        "madvise(0x14000, 4096, MADV_HUGEPAGE)",
        "madvise(0x10000, 16384, MADV_DONTDUMP)",
        "mlock(0x14000, 4096)",
    ] {
        assert_eq!(last(&[MAP, next, &format!("1 1.1 {mark} = 0"), discard]).len(), 2, "{mark}");
    }
    let (lock, unlock) = ("1 1.1 mlock(0x14000, 4096) = 0", "1 1.1 munlockall() = 0");
    assert_eq!(last(&[MAP, next, lock, unlock, discard]).len(), 1);
    // One that was made of two by `mprotect`, and of one again.
    let off = "1 1.1 mprotect(0x11000, 4096, PROT_READ) = 0";
    let on = "1 1.2 mprotect(0x11000, 4096, PROT_READ|PROT_WRITE) = 0";
    let discard = "1 1.3 madvise(0x10000, 16384, MADV_DONTNEED) = 0";
    assert_eq!(last(&[MAP, off, discard]).len(), 3);
    assert_eq!(last(&[MAP, off, on, discard]), ["0: CLEAR 10000-14000 discarded"]);
}

#[test]
fn enomem_without_a_hole_is_no_partial_success() {
    for call in ["mprotect(0x10000, 8192, PROT_READ)", "madvise(0x10000, 8192, MADV_DONTNEED)"] {
        let line = format!("1 1.1 {call} = -1 ENOMEM (Cannot allocate memory)");
        assert_eq!(last(&[MAP, &line]), [""; 0], "too many mappings: {call}");
    }
    let hole_first =
        "1 1.1 mprotect(0xf000, 16384, PROT_READ) = -1 ENOMEM (Cannot allocate memory)";
    assert_eq!(last(&[MAP, hole_first]), [""; 0]);
    let hole_first =
        "1 1.1 madvise(0xf000, 16384, MADV_DONTNEED) = -1 ENOMEM (Cannot allocate memory)";
    assert_eq!(last(&[MAP, hole_first]), ["0: CLEAR 10000-13000 discarded"]);
}

#[test]
fn a_call_that_succeeds_on_unknown_memory_makes_it_known() {
    let protect = "1 1.0 mprotect(0x10000, 8192, PROT_READ) = 0";
    assert_eq!(last(&[protect]), ["0: created", "0: mapped 10000-12000 Read"]);
    let discard = "1 1.1 madvise(0x10000, 16384, MADV_DONTNEED) = 0";
    assert_eq!(
        last(&[protect, discard]),
        ["0: CLEAR 10000-12000 discarded", "0: mapped 12000-14000 Write"]
    );
}

#[test]
fn protection_keys_are_part_of_the_protection() {
    let key = "1 1.1 pkey_mprotect(0x10000, 16384, PROT_READ|PROT_WRITE, 2) = 0";
    let event = ["0: PROTECTION_VMA 10000-14000 Write"];
    assert_eq!(last(&[MAP, key]), event);
    assert_eq!(last(&[MAP, key, key]), [""; 0]);
    let same = "1 1.2 mprotect(0x10000, 16384, PROT_READ|PROT_WRITE) = 0";
    assert_eq!(last(&[MAP, key, same]), [""; 0]);
}

#[test]
fn fork_protects_what_was_written() {
    let file = |prot: &str| format!("1 1.1 mmap(NULL, 16384, {prot}, MAP_PRIVATE, 3, 0) = 0x20000");
    let fork = "1 1.9 fork() = 2";
    let made = |lines: &[&str]| {
        last(lines).into_iter().filter(|line| line.contains("PROTECTION_PAGE")).count()
    };
    assert_eq!(made(&[&file("PROT_READ"), fork]), 0);
    assert_eq!(made(&[&file("PROT_READ|PROT_WRITE"), fork]), 0);
    // A loader relocates, then takes the right to write away: all of it has pages of its own.
    let relro = "1 1.2 mprotect(0x20000, 4096, PROT_READ) = 0";
    assert_eq!(made(&[&file("PROT_READ|PROT_WRITE"), relro, fork]), 2);
    let shared = "1 1.1 mmap(NULL, 16384, PROT_READ|PROT_WRITE, MAP_SHARED, 3, 0) = 0x20000";
    assert_eq!(made(&[shared, fork]), 0);
    let huge = "1 1.1 mmap(NULL, 4096, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS|MAP_HUGETLB, -1, 0) = 0x200000";
    assert_eq!(last(&[huge, fork])[0], "0: CLEAR 200000-400000 Write");
}

#[test]
fn a_file_that_is_written_back_is_protected_in_every_space_that_shares_it() {
    let shared = "1 1.1 mmap(NULL, 4096, PROT_READ|PROT_WRITE, MAP_SHARED, 3, 0) = 0x20000";
    let lines = [shared, "1 1.2 fork() = 2", "1 1.3 msync(0x20000, 4096, MS_SYNC) = 0"];
    assert_eq!(
        last(&lines),
        ["0: PROTECTION_PAGE 20000-21000 Write", "1: PROTECTION_PAGE 20000-21000 Write"]
    );
    assert_eq!(last(&[MAP, "1 1.3 msync(0x10000, 4096, MS_SYNC) = 0"]), [""; 0], "no file");
}

#[test]
fn memory_that_could_never_be_accessed_has_no_folios() {
    let reserved = "1 1.0 mmap(NULL, 16384, PROT_NONE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x10000";
    assert_eq!(last(&[reserved, "1 1.1 madvise(0x10000, 16384, MADV_PAGEOUT) = 0"]), [""; 0]);
    let used = "1 1.1 mprotect(0x11000, 4096, PROT_READ|PROT_WRITE) = 0";
    assert_eq!(
        last(&[reserved, used, "1 1.2 migrate_pages(0, 64, [1], [2]) = 0"]),
        ["0: CLEAR 11000-12000 discarded"]
    );
}

#[test]
fn threads_share_an_address_space_and_processes_do_not() {
    let thread = "1 1.1 clone3({flags=CLONE_VM|CLONE_THREAD, exit_signal=0}, 88) = 2";
    assert_eq!(
        last(&[MAP, thread, "2 1.2 munmap(0x10000, 16384) = 0"]),
        ["0: UNMAP 10000-14000 -10000-14000"]
    );
    let fork = "1 1.1 clone(child_stack=NULL, flags=SIGCHLD) = 3";
    assert_eq!(
        last(&[MAP, fork]),
        ["0: PROTECTION_PAGE 10000-14000 Write", "1: created 10000-14000 Write"]
    );
    assert_eq!(
        last(&[MAP, fork, "3 1.2 munmap(0x10000, 16384) = 0"]),
        ["1: UNMAP 10000-14000 -10000-14000"]
    );
}

#[test]
fn a_space_ends_with_the_last_process_in_it() {
    let exec = "1 1.1 execve(\"a\", [], 0x7f /* 1 var */) = 0";
    let released = ["0: RELEASE", "0: UNMAP ALL -10000-14000"];
    assert_eq!(last(&[MAP, exec]), [released[0], released[1], "1: created"]);
    let (vfork, child_execs) =
        ("1 1.1 vfork() = 4", "4 1.2 execve(\"a\", [], 0x7f /* 1 var */) = 0");
    assert_eq!(
        last(&[MAP, vfork, child_execs]),
        ["1: created"],
        "the parent lives on in the space that it lent"
    );
    assert_eq!(last(&[MAP, vfork, "1 1.2 exit_group(0) = ?"]), [""; 0]);
    assert_eq!(
        last(&[MAP, vfork, "1 1.2 exit_group(0) = ?", "4 1.3 +++ exited with 0 +++"]),
        released
    );
}

#[test]
fn a_process_ends_with_its_last_thread_or_by_a_signal() {
    let thread = "1 1.1 clone3({flags=CLONE_VM|CLONE_THREAD, exit_signal=0}, 88) = 2";
    let released = ["0: RELEASE", "0: UNMAP ALL -10000-14000"];
    assert_eq!(last(&[MAP, thread, "1 1.2 +++ exited with 0 +++"]), [""; 0]);
    assert_eq!(
        last(&[MAP, thread, "1 1.2 +++ exited with 0 +++", "2 1.3 +++ exited with 0 +++"]),
        released
    );
    assert_eq!(last(&[MAP, thread, "1 1.2 exit(0) = ?", "2 1.3 exit(0) = ?"]), released);
    assert_eq!(last(&[MAP, thread, "2 1.2 +++ killed by SIGKILL +++"]), released);
    // What is recorded of a thread afterwards has no effect, until the number is used again.
    let late = "1 1.3 brk(NULL) = 0x1000";
    assert_eq!(last(&[MAP, thread, "2 1.2 exit_group(0) = ?", late]), [""; 0]);
    let over = ["2 1.2 exit_group(0) = ?", "1 1.3 +++ exited with 0 +++"];
    assert_eq!(last(&[MAP, thread, over[0], over[1], late]), ["1: created"]);
    assert_eq!(
        last(&[MAP, thread, over[0], "5 1.3 fork() = 1", "1 1.4 execve(\"a\", [], 0x7f) = 0"])
            .len(),
        3
    );
}

#[test]
fn the_end_of_the_recording_ends_what_is_left() {
    let text = format!(
        "{MAP}\n1 1.1 fork() = 2\n2 1.2 munmap(0x10000, 4096) = 0\n2 1.3 munmap(0x11000, 4096) = 0\n"
    );
    let recording = parse("the test", text.as_bytes(), false).unwrap();
    let mut program = Program::default();
    recording.calls.iter().for_each(|call| drop(program.run(call)));
    assert_eq!(
        (program.spaces(), program.space_of(1), program.space_of(2), program.space_of(3)),
        (2, Some(0), Some(1), None)
    );
    let end = program.end();
    assert_eq!(end.len(), 4);
    let then = Change::Unmapped(vec![range(0x12000, 0x14000)]);
    assert_eq!(
        end[3],
        Action::Invalidate { space: 1, range: AddressRange::ALL, event: Event::Unmap, then }
    );
    assert_eq!(program.end(), []);
}

#[test]
fn access_is_ordered() {
    assert!(Access::None < Access::Read && Access::Read < Access::Write);
}

#[test]
fn each_advice_does_what_linux_does_for_it() {
    let (discarded, paged) = (
        ["0: CLEAR 10000-12000 discarded"],
        ["0: CLEAR 10000-11000 discarded", "0: CLEAR 11000-12000 discarded"],
    );
    for (advice, events) in [
        ("DONTNEED", &discarded[..]),
        ("DONTNEED_LOCKED", &discarded),
        ("FREE", &discarded),
        ("REMOVE", &discarded),
        ("PAGEOUT", &paged),
        ("HWPOISON", &paged),
        ("SOFT_OFFLINE", &paged),
        ("COLLAPSE", &[]),
        ("DONTFORK", &[]),
    ] {
        let advise = format!("1 1.1 madvise(0x10000, 8192, MADV_{advice}) = 0");
        assert_eq!(last(&[MAP, &advise]), events, "{advice}");
    }
    let none = [
        "NORMAL",
        "RANDOM",
        "SEQUENTIAL",
        "WILLNEED",
        "COLD",
        "HUGEPAGE",
        "NOHUGEPAGE",
        "MERGEABLE",
        "DONTDUMP",
        "POPULATE_WRITE",
    ];
    let text: String =
        none.iter().map(|advice| format!("madvise(0x10000, 8192, MADV_{advice}) = 0\n")).collect();
    let recording = parse("advice", text.as_bytes(), false).unwrap();
    assert_eq!(recording.operations()["madvise"], none.len());
    let mut program = Program::default();
    assert!(
        recording
            .calls
            .iter()
            .flat_map(|call| program.run(call))
            .all(|action| matches!(action, Action::Created { .. }))
    );
}
