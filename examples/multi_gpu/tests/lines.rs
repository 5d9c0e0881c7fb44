//! Single lines.

use crate::recording::{Advice, Advised, Call, Error, NoteKind, Op, Prot, Recording, parse};

fn read(text: &str) -> Recording {
    parse("the test", text.as_bytes(), false).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn error(text: &str) -> String {
    parse("the test", text.as_bytes(), false).unwrap_err().to_string()
}

fn ops(lines: &[&str]) -> Vec<Op> {
    let text: String = lines.iter().map(|line| format!("7 1000.000000 {line}\n")).collect();
    read(&text).calls.into_iter().map(|call| call.op).collect()
}

#[test]
fn interleaved_calls_are_put_together_and_take_effect_when_they_return() {
    let recording = read(
        "\
        5 1.000000 mmap(NULL, 4096, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0 <unfinished ...>\n\
        6 1.000001 munmap(0x9000, 4096 <unfinished ...>\n\
        6 1.000002 <... munmap resumed>)        = 0\n\
        5 1.000003 <... mmap resumed> )         = 0x8000\n",
    );
    let calls: Vec<_> =
        recording.calls.iter().map(|call| (call.pid, call.at_ns, call.line)).collect();
    assert_eq!(calls, [(6, 1000, 3), (5, 0, 4)]);
    assert!(matches!(recording.calls[1].op, Op::Map { at: 0x8000, len: 4096, .. }));
}

#[test]
fn a_new_task_exists_from_the_beginning_of_the_call_that_makes_it() {
    let recording = read(
        "\
        5 1.000000 brk(NULL) = 0x1000\n\
        5 1.000000 clone3({flags=CLONE_VM|CLONE_VFORK, exit_signal=SIGCHLD, stack=0x7f, stack_size=0x9000}, 88 <unfinished ...>\n\
        6 1.000001 brk(NULL) = 0x1000\n\
        6 1.000001 clone(child_stack=NULL, flags=SIGCHLD <unfinished ...>\n\
        7 1.000001 brk(NULL) = 0x1000\n\
        6 1.000001 <... clone resumed>) = 7\n\
        5 1.000002 <... clone3 resumed> => {parent_tid=[0]}, 88) = 6\n",
    );
    let order: Vec<_> = recording.calls.iter().map(|call| (call.pid, call.line)).collect();
    assert_eq!(order, [(5, 1), (5, 7), (6, 3), (6, 6), (7, 5)]);
    assert_eq!(recording.calls[1].op, Op::Clone { child: 6, shares_memory: true, thread: false });
}

#[test]
fn every_call_is_understood_with_names_and_with_numbers() {
    let both = [
        ("madvise(0x1000, 4096, MADV_DONTNEED) = 0", "madvise(0x1000, 4096, 0x4) = 0"),
        (
            "mprotect(0x1000, 4096, PROT_READ|PROT_WRITE) = 0",
            "mprotect(0x1000, 0x1000, 0x3 /* PROT_READ|PROT_WRITE */) = 0",
        ),
        (
            "mremap(0x1000, 4096, 8192, MREMAP_MAYMOVE|MREMAP_FIXED, 0x5000) = 0x5000",
            "mremap(0x1000, 4096, 8192, 3, 0x5000) = 0x5000",
        ),
        (
            "mbind(0x1000, 4096, MPOL_BIND, [0x1], 64, MPOL_MF_MOVE) = 0",
            "mbind(0x1000, 4096, 0x2, [0x1], 64, 0x2) = 0",
        ),
        ("msync(0x1000, 4096, MS_SYNC) = 0", "msync(0x1000, 4096, 0x4) = 0"),
        ("shmat(5, NULL, SHM_RDONLY) = 0x5000", "shmat(5, NULL, 0x1000) = 0x5000"),
        (
            "clone(child_stack=NULL, flags=CLONE_VM|SIGCHLD) = 9",
            "clone(child_stack=NULL, flags=0x100|17) = 9",
        ),
        (
            "clone(child_stack=NULL, flags=CLONE_VM|CLONE_THREAD) = 9",
            "clone(0x10100, 0x7f, 0, 0, 0) = 9",
        ),
        (
            "mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE|MAP_ANONYMOUS|MAP_HUGETLB|21<<MAP_HUGE_SHIFT, -1, 0) = 0x200000",
            "mmap(NULL, 4096, 0, 0x40022, 0xffffffff, 0) = 0x200000",
        ),
    ];
    for (names, numbers) in both {
        assert_eq!(ops(&[names]), ops(&[numbers]), "{names}");
        assert_eq!(ops(&[names]).len(), 1, "{names}");
    }
    assert_eq!(
        ops(&[
            "brk(0x3000)             = 0x3000",
            "madvise(0x1000, 4096, MADV_HUGEPAGE) = 0",
            "mbind(0x1000, 4096, MPOL_BIND, [0x1], 64, 0) = 0",
            "execve(\"a, b) = 1\", [\"x\\\"\"...], 0x7f /* 36 vars */) = 0",
            "vfork()                 = 10",
            "mprotect(0x1000, 4096, PROT_NONE) = 0 <0.000012>",
            "pkey_mprotect(0x1000, 4096, PROT_READ, 3) = 0",
            "mmap(NULL, 27028, PROT_READ, MAP_SHARED, 3</a, (b>, 0) = 0x7000",
            "exit_group(0)           = ?",
        ])
        .iter()
        .map(|op| op.kind().unwrap())
        .collect::<Vec<_>>(),
        ["brk", "madvise", "execve", "vfork", "mprotect", "mprotect", "mmap", "exit_group"]
    );
}

#[test]
fn lists_are_read_with_what_each_of_their_members_says() {
    assert_eq!(
        ops(&[
            "move_pages(0, 3, [0x1000, 0x2000, 0x3000], [1, 1, 1], [1, -ENOENT, 1], MPOL_MF_MOVE) = 0"
        ]),
        [Op::MovePages(Box::new((None, vec![0x1000, 0x3000])))]
    );
    assert_eq!(ops(&["move_pages(0, 1, [0x1000], NULL, [1], 0) = 0"]), []);
    let ranges = "[{iov_base=0x1000, iov_len=4096}, {iov_base=0x9000, iov_len=8192}]";
    assert_eq!(
        ops(&[&format!("process_madvise(3<pid:42>, {ranges}, 2, MADV_PAGEOUT, 0) = 8192")]),
        [Op::AdviseMany(Box::new(Advised {
            process: Some(42),
            ranges: vec![(0x1000, 4096), (0x9000, 4096)],
            advice: Advice::PageOut
        }))]
    );
    // The size of shared memory is in the call that makes it.
    let prot = Prot { read: true, write: true, exec: false };
    assert_eq!(
        ops(&["shmget(IPC_PRIVATE, 65536, IPC_CREAT|0600) = 5", "shmat(5, NULL, 0) = 0x5000"]),
        [Op::Attach { at: 0x5000, len: 65536, prot }]
    );
}

#[test]
fn a_call_takes_48_bytes() {
    assert_eq!(size_of::<Call>(), 48);
}

#[test]
fn failed_and_interrupted_calls_have_no_effect_with_some_exceptions() {
    let recording = read(
        "\
        munmap(0x1001, 4096) = -1 EINVAL (Invalid argument)\n\
        execve(\"cc\", [...], 0x7f /* 3 vars */) = -1 ENOENT (No such file or directory)\n\
        mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, 3, 0) = ?\n\
        mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, 3, 0) = 0x1000 (INJECTED)\n\
        madvise(0x1000, 8192, MADV_DONTNEED) = -1 ENOMEM (Cannot allocate memory)\n\
        mprotect(0x1000, 8192, PROT_READ) = -1 ENOMEM (Cannot allocate memory)\n",
    );
    assert_eq!(recording.idle["failed"], 4);
    assert!(matches!(
        recording.calls.iter().map(|call| &call.op).collect::<Vec<_>>()[..],
        [Op::Advise { partial: true, .. }, Op::Protect { partial: true, .. }]
    ));
}

#[test]
fn what_may_concern_memory_and_is_not_understood_is_an_error_with_its_line() {
    let good = "5 1.000000 brk(NULL) = 0x1000\n";
    for (bad, says) in [
        ("nonsense", "line 2: it is no line of strace's"),
        (
            "5 1.1 madvise(0x1000, 4096, MADV_WIBBLE) = 0",
            "line 2: madvise: \"MADV_WIBBLE\" is no advice",
        ),
        (
            "5 1.1 mmap(NULL, 4096, PROT_WIBBLE, MAP_PRIVATE, 3, 0) = 0x1000",
            "line 2: mmap: \"PROT_WIBBLE\" is no flag",
        ),
        (
            "5 1.1 mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, 3, 0) = 0x1001",
            "0x1001 is no address of a mapping",
        ),
        ("5 1.1 mmap(NULL, 4096, PROT_READ, PROT_READ, 3, 0) = 0x1000", "\"PROT_READ\" is no flag"),
        (
            "5 1.1 mmap(NULL, 40 96, PROT_READ, MAP_PRIVATE, 3, 0 = 0x1000\n5 1.2 brk(NULL) = 0x1000",
            "line 2: mmap has no result",
        ),
        ("5 1.1 munmap(0x1000, 4096hello) = 0", "\"4096hello\", is no number"),
        ("5 1.1 munmap(0x1000) = 0", "argument 2 is missing"),
        ("5 1.1 clone(0x7f) = 0x7fffffffffff", "no process id"),
        (
            "5 1.1 mmap(NULL, 1, PROT_READ, MAP_PRIVATE, 3, 0 <unfinished ...>\n5 1.2 <... brk resumed>) = 0x0",
            "another call is resumed",
        ),
    ] {
        let text = format!("{good}{bad}\n{good}");
        let error = error(&text);
        assert!(error.contains(says) && error.contains("--lenient"), "{bad}: {error}");
        let lenient = parse("the test", text.as_bytes(), true).unwrap();
        assert_eq!(lenient.skipped.len(), 1, "{bad}");
    }
    // A program's output, between the lines of a terminal.
    let mixed = "brk(NULL) = 0x1000\nhello (mmap is fun)\n munmap(0x1000, 4096) = 0\n";
    assert!(error(mixed).contains("line 3"));
    assert_eq!(read("brk(NULL) = 0x1000\nhello (mmap is fun)\n").notes, 1);
}

#[test]
fn names_of_tasks_contexts_and_pointers_stand_before_a_call() {
    for prefix in [
        "5 ",
        "[pid     5] ",
        "5<a b> 10:00:00 ",
        "[pid 5<a b>] 10:00:00.123 ",
        "5     [unconfined_u:unconfined_r] 1795651278.123456789 ",
        "5     1795651278 ",
        "5     1795651278.938 (+     0.000011) [ 59] [00007fc71dfcfad7] ",
        "[pid     5] 1.5 [????????????????] ",
    ] {
        let calls = read(&format!("{prefix}munmap(0x1000, 4096) = 0\n")).calls;
        assert_eq!((calls[0].pid, calls.len()), (5, 1), "{prefix}");
    }
    assert_eq!(read("1795651278.1 munmap(0x1000, 4096) = 0\n").calls[0].pid, u32::MAX);
}

#[test]
fn the_kind_of_time_is_told_apart() {
    let times = |lines: [&str; 3]| -> Vec<u64> {
        let text: String =
            lines.iter().map(|time| format!("{time} munmap(0x1000, 4096) = 0\n")).collect();
        read(&text).calls.iter().map(|call| call.at_ns).collect()
    };
    assert_eq!(times(["5 1.0", "5 1.5", "5 3.0"]), [0, 500_000_000, 2_000_000_000]);
    assert_eq!(
        times(["5          0.000000", "5          1.500000", "5          0.500000"]),
        [0, 1_500_000_000, 2_000_000_000]
    );
    // `-r` from the middle of a recording, and with its spaces lost.
    assert_eq!(
        times(["5          2.000000", "5          1.500000", "5          0.500000"]),
        [0, 1_500_000_000, 2_000_000_000]
    );
    assert_eq!(times(["5 2.0", "5 1.5", "5 0.5"]), [0, 1_500_000_000, 2_000_000_000]);
    // `-r` in whole seconds.
    assert_eq!(times(["     0", "     1", "    12"]), [0, 1_000_000_000, 13_000_000_000]);
    assert_eq!(
        times(["19217      0", "7          1", "[pid     7]     12"]),
        [0, 1_000_000_000, 13_000_000_000]
    );
    assert_eq!(
        read("     0 munmap(0x1000, 4096) = 0\n     3 munmap(0x1000, 4096) = 0\n").calls[1].pid,
        u32::MAX
    );
    // No task has the number 0.
    assert!(error("0 munmap(0x1000, 4096) = 0\n").contains("is not strace's"));
    assert!(error("[pid 0] munmap(0x1000, 4096) = 0\n").contains("is not strace's"));
    // Midnight.
    assert_eq!(times(["23:59:59", "23:59:59.5", "00:00:01"]), [0, 500_000_000, 2_000_000_000]);
}

#[test]
fn calls_that_never_end_are_counted() {
    let recording = read(
        "\
        5 1.000000 --- SIGCHLD {si_signo=SIGCHLD} ---\n\
        5 1.000001 munmap(0x1000, 4096 <unfinished ...>\n\
        6 1.000002 exit_group(1 <unfinished ...>\n\
        7 1.000002 mmap(NULL, 4096, PROT_REA",
    );
    assert_eq!((recording.notes, recording.unfinished), (1, 2));
    assert_eq!(recording.calls.iter().map(|call| &call.op).collect::<Vec<_>>(), [&Op::Exit]);
    let left = "[pid 5] munmap(0x1000, 4096 <detached ...>\n[pid 6] munmap(0x1000, 4096 <ptrace(SYSCALL):No such process>\n";
    assert_eq!(read(left).unfinished, 2);
}

#[test]
fn the_first_line_of_a_terminal_may_hold_anything() {
    let error = parse("the test", &b"program E mmap(0x0) = 5\n"[..], true).unwrap_err();
    assert!(matches!(error, Error::NotStrace { near: Some(1), .. }));
    assert!(error_of("only words\n").contains("is not strace's"));
    fn error_of(text: &str) -> String {
        parse("the test", text.as_bytes(), true).unwrap_err().to_string()
    }
}

#[test]
fn a_message_may_interrupt_a_call_anywhere() {
    for text in [
        "munmap(strace: Process 6 attached\n0x1000, 4096) = 0\n",
        "munmap(0x1000, 4096strace: Process 6 attached\n) = 0\n",
        "munmap(0x1000strace: Process 6 attached\n, 4096strace: Process 7 attached\n) = 0\n",
        "munmap(0x1000, 4096Process 6 attached (waiting for parent)\n) = 0\n",
        "munmap(0x1000, 4096strace: Process 6 attached\n <unfinished ...>\n[pid 5] <... munmap resumed>) = 0\n",
        "munmap(0x1000, 4096 <unfinished ...>\n[pid 5] <... munmap resumed>strace: Process 6 attached\n) = 0\n",
        "munmap(0x1000, 4096strace: Process 6 attached\n[pid 5] --- SIGCHLD ---\n) = 0\n",
    ] {
        let recording = read(&format!("[pid 5] {text}"));
        assert_eq!(
            (recording.calls.len(), recording.noted[&NoteKind::Message] > 0),
            (1, true),
            "{text}"
        );
        assert_eq!(recording.calls[0].op, Op::Unmap { start: 0x1000, len: 4096 }, "{text}");
        assert_eq!(
            (recording.calls[0].pid, recording.unfinished, recording.incomplete),
            (5, 0, 0),
            "{text}"
        );
    }
}

/// Versions of strace name the thread and its process in either order, or move the call themselves.
#[test]
fn an_execve_of_a_thread_goes_on_under_the_number_of_its_process() {
    let end = "1 1.3 <... execve resumed>) = 0\n";
    for begin in [
        "2 1.1 execve(\"a\", [], 0x7f <unfinished ...>\n2 1.2 +++ superseded by execve in pid 1 +++\n",
        "2 1.1 execve(\"a\", [], 0x7f <unfinished ...>\n1 1.2 +++ superseded by execve in pid 2 +++\n",
        "2 1.1 execve(\"a\", [], 0x7f <pid changed to 1 ...>\n1 1.2 +++ superseded by execve in pid 2 +++\n",
    ] {
        let recording = read(&format!("{begin}{end}"));
        let calls: Vec<_> =
            recording.calls.iter().map(|call| (call.pid, call.at_ns, &call.op)).collect();
        assert_eq!(calls, [(1, 0, &Op::Exec)], "{begin}");
        assert_eq!((recording.unfinished, recording.incomplete), (0, 0), "{begin}");
    }
}

/// On a terminal, output without an end of line stands before the next call.
#[test]
fn output_of_the_program_before_a_call_does_not_hide_it() {
    let good = "brk(NULL) = 0x1000\n";
    for bad in [
        "donemunmap(0x7fca4483c000, 1048576) = 0",
        "donemunmap(0x7fca4483c000, 1048576 <unfinished ...>",
        "donemunmap(0x7fca4483c000, 1048576strace: Process 6 attached",
        "step(1)munmap(0x1000, 4096) = 0",
        "step(1)munmap(0x1000, 4096 <unfinished ...>",
        "step(\"1)munmap(0x1000, 4096) = 0",
        "50% donemunmap(0x1000, 4096) = 0",
        "doneexit_group(0) = ?",
        "sbrk(0x1000) = 0x1000",
    ] {
        for text in [format!("{good}{bad}\n"), format!("{bad}\n{good}")] {
            assert!(error(&text).contains("it looks like a call"), "{bad}");
            let lenient = parse("the test", text.as_bytes(), true).unwrap();
            assert_eq!(
                (lenient.skipped.len(), lenient.calls.len(), lenient.other.len()),
                (1, 1, 0),
                "{bad}"
            );
        }
    }
    for other in [
        "write(1, \"munmap(0x1000, 4096) = 0\", 24) = 24",
        "write(1, \"munmap(0x1000, 4096\", 19 <unfinished ...>\n<... write resumed>) = 19",
        "close(3</tmp/munmap(1, 2) = 0>) = 0",
        "semop(1, [{0, -1, 0}], 1) = 0",
    ] {
        let recording = read(&format!("{good}{other}\n"));
        assert_eq!(
            (recording.calls.len(), recording.other.values().sum::<usize>()),
            (1, 1),
            "{other}"
        );
    }
}

#[test]
fn a_task_in_another_namespace_has_the_number_that_its_lines_carry() {
    for call in [
        "clone(child_stack=NULL, flags=CLONE_NEWPID|SIGCHLD)",
        "clone3({flags=CLONE_NEWPID, exit_signal=SIGCHLD}, 88)",
        "fork()",
        "vfork()",
    ] {
        let recording =
            read(&format!("7 {call} = 2 /* 9 in strace's PID NS */\n9 munmap(0x1000, 4096) = 0\n"));
        assert!(matches!(recording.calls[0].op, Op::Clone { child: 9, .. }), "{call}");
    }
    let moved = Op::MigratePages { process: Some(9) };
    assert_eq!(ops(&["migrate_pages(2 /* 9 in strace's PID NS */, 64, [1], [2]) = 0"]), [moved]);
}

/// Three before the first line of strace's, and more than are listed.
#[test]
fn all_lines_that_are_skipped_are_counted() {
    for count in [3, 3000] {
        let text =
            format!("{}brk(NULL) = 0x1000\n", "zz: munmap(0x1000, 4096) = 0\n".repeat(count));
        let recording = parse("the test", text.as_bytes(), true).unwrap();
        assert_eq!(
            (recording.skipped.len(), recording.skipped.listed().len()),
            (count, count.min(1000))
        );
        assert!(error(&text).contains("line 1"));
    }
}
