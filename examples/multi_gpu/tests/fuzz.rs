//! No input makes the reader or the memory panic, loop or overflow.

use crate::memory::{Action, Program};
use crate::recording::{Recording, parse};
use proptest::prelude::*;
use proptest::sample::{Index, select};

/// Runs what has been read, to its end; returns how many actions that took.
fn run(recording: &Recording) -> usize {
    let mut program = Program::default();
    let mut actions: Vec<Action> =
        recording.calls.iter().flat_map(|call| program.run(call)).collect();
    actions.extend(program.end());
    let of = |action: &Action| match action {
        Action::Created { space, .. } | Action::Mapped { space, .. } => *space,
        Action::Invalidate { space, .. } | Action::Released { space } => *space,
    };
    assert!(actions.iter().all(|action| of(action) < program.spaces()));
    let released =
        actions.iter().filter(|action| matches!(action, Action::Released { .. })).count();
    assert_eq!(released, program.spaces(), "each space ends once");
    actions.len()
}

/// A line is read or refused; whatever is read can be run.
fn read(text: &[u8]) {
    for lenient in [false, true] {
        if let Ok(recording) = parse("the fuzz", text, lenient) {
            run(&recording);
            assert!(recording.skipped.is_empty() || lenient);
        }
    }
}

fn number() -> impl Strategy<Value = u64> {
    let page = 4096u64;
    prop_oneof![
        4 => (0u64..16).prop_map(move |at| 0x10000 + at * page),
        2 => select(vec![0, 1, page, page - 1, 1 << 21, 1 << 30, 1 << 47, u64::MAX, u64::MAX - 1, u64::MAX - page, u64::MAX / 2, 0xffff_ffff_f77d_7000]),
        1 => (0u64..64).prop_map(move |pages| (u64::MAX - pages * page) & !(page - 1)),
        1 => any::<u64>(),
    ]
}

fn call() -> impl Strategy<Value = String> {
    let prot = select(vec!["PROT_NONE", "PROT_READ", "PROT_READ|PROT_WRITE", "PROT_WRITE", "0x7"]);
    let how = select(vec![
        "MAP_PRIVATE|MAP_ANONYMOUS",
        "MAP_SHARED",
        "MAP_PRIVATE|MAP_FIXED",
        "0x40022",
        "MAP_PRIVATE",
    ]);
    let advice = select(vec![
        "MADV_DONTNEED",
        "MADV_PAGEOUT",
        "MADV_COLLAPSE",
        "MADV_DONTFORK",
        "MADV_WIPEONFORK",
        "MADV_HUGEPAGE",
        "25",
    ]);
    let end =
        select(vec!["= 0", "= -1 ENOMEM (Cannot allocate memory)", "= ?", "<unfinished ...>"]);
    let what =
        (number(), number(), number(), number(), prot, how, advice, end, 0usize..19, 0u32..9);
    what.prop_map(|(a, b, c, d, prot, how, advice, end, kind, pid)| match kind {
        0 => format!("mmap({a:#x}, {b}, {prot}, {how}, -1, 0) = {c:#x}"),
        1 => format!("munmap({a:#x}, {b}) {end}"),
        2 => format!("mremap({a:#x}, {b}, {c}, MREMAP_MAYMOVE|MREMAP_FIXED, {d:#x}) = {d:#x}"),
        3 => format!("mremap({a:#x}, {b}, {c}, MREMAP_MAYMOVE|MREMAP_DONTUNMAP) = {d:#x}"),
        4 => format!("brk({a:#x}) = {a:#x}"),
        5 => format!("madvise({a:#x}, {b}, {advice}) {end}"),
        6 => format!("mprotect({a:#x}, {b}, {prot}) {end}"),
        7 => format!("mbind({a:#x}, {b}, MPOL_BIND, [1], 64, MPOL_MF_MOVE) {end}"),
        8 => format!("move_pages({pid}, 2, [{a:#x}, {b:#x}], [1, 1], [1, 1], MPOL_MF_MOVE) = 0"),
        9 => format!("migrate_pages({pid}, 64, [1], [2]) {end}"),
        10 => format!("msync({a:#x}, {b}, MS_SYNC) {end}"),
        11 => format!("remap_file_pages({a:#x}, {b}, 0, 0, 0) {end}"),
        12 => {
            format!("process_madvise(3, [{{iov_base={a:#x}, iov_len={b}}}], 1, {advice}, 0) = {c}")
        }
        13 => format!("shmat(5, NULL, 0) = {a:#x}"),
        14 => format!("shmdt({a:#x}) {end}"),
        15 => format!("clone(child_stack=NULL, flags={how}|CLONE_VM) = {pid}"),
        16 => format!("fork() = {pid}"),
        17 => "execve(\"a\", [], 0x7f) = 0".into(),
        _ => format!("exit_group({pid}) = ?"),
    })
}

fn line() -> impl Strategy<Value = String> {
    let body = prop_oneof![
        12 => call(),
        1 => (1u32..9).prop_map(|pid| format!("clone3({{flags=CLONE_VM|CLONE_THREAD}}, 88) = {pid}")),
        1 => select(vec![
            "+++ exited with 0 +++",
            "+++ killed by SIGKILL +++",
            "+++ superseded by execve in pid 3 +++",
            "<... munmap resumed>) = 0",
            "execve(\"a\" <pid changed to 3 ...>",
            "<... execve resumed>) = 0",
            "strace: Process 4 attached with 3 threads",
            "--- SIGCHLD ---",
            "mlockall(MCL_CURRENT) = 0",
            "munlock(0x11000, 8192) = 0",
            "% time     seconds  usecs/call     calls    errors syscall",
            "mmap(NULL, 4096, PROT_READstrace: Process 5 attached",
            ", MAP_PRIVATE, 3, 0) = 0x7000",
        ])
        .prop_map(String::from),
    ];
    let prefix = prop_oneof![
        (1u32..9).prop_map(|pid| format!("{pid} 1.5 ")),
        (1u32..9).prop_map(|pid| format!("[pid {pid}] ")),
        Just(String::new()),
        (any::<u64>(), any::<u32>()).prop_map(|(time, ns)| format!("3 {time}.{ns} ")),
    ];
    (prefix, body).prop_map(|(prefix, body)| format!("{prefix}{body}\n"))
}

fn cases() -> ProptestConfig {
    let cases =
        std::env::var("SHOOTDOWN_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(256);
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

const FORMS: [&[u8]; 8] = [
    include_bytes!("forms/04-f-tt.strace"),
    include_bytes!("forms/05-f-r.strace"),
    include_bytes!("forms/12-f-ttt-Xverbose.strace"),
    include_bytes!("forms/14-stderr-pid-prefix.strace"),
    include_bytes!("forms/20-attached-threads.strace"),
    include_bytes!("forms/23-execve-from-a-thread.strace"),
    include_bytes!("forms/25-terminal-copy.strace"),
    include_bytes!("forms/29-killed-task.strace"),
];

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn calls_with_any_numbers(lines in prop::collection::vec(line(), 0..60)) {
        read(lines.concat().as_bytes());
    }

    #[test]
    fn any_bytes(lines in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..80), 0..20)) {
        read(&lines.join(&b'\n'));
    }

    /// Bytes changed, lines doubled, left out and cut, at random.
    #[test]
    fn recordings_that_were_damaged(
        form in 0..FORMS.len(),
        changes in prop::collection::vec((any::<Index>(), any::<Index>(), 0u8..6, any::<u8>()), 1..12),
    ) {
        let mut text = FORMS[form].to_vec();
        for (from, to, kind, byte) in changes {
            if text.is_empty() {
                break;
            }
            let (from, to) = (from.index(text.len()), to.index(text.len()));
            let (from, to) = (from.min(to), from.max(to));
            match kind {
                0 => text[from] = byte,
                1 => text.insert(from, byte),
                2 => drop(text.drain(from..to.min(from + 300))),
                3 => text.truncate(to),
                4 => text[from..to].rotate_left((to - from) / 2),
                _ => {
                    let copy = text[from..to.min(from + 300)].to_vec();
                    text.splice(to..to, copy);
                }
            }
        }
        read(&text);
    }
}

#[test]
fn a_call_causes_no_more_than_some_hundred_actions_for_each_mapping() {
    let text = format!(
        "mmap(NULL, {0}, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x10000\n\
         madvise(0x10000, {0}, MADV_PAGEOUT) = 0\nmadvise(0x10000, {0}, MADV_COLLAPSE) = 0\n",
        1u64 << 46
    );
    let actions = run(&parse("large", text.as_bytes(), false).unwrap());
    assert!((500..530).contains(&actions), "{actions}");
}

#[test]
fn deep_brackets_and_long_lines_are_no_matter() {
    let deep = "(".repeat(1 << 20);
    read(format!("mmap{deep}\nbrk(NULL) = 0x1000\n").as_bytes());
    read(format!("execve(\"{}\", [], 0x7f) = 0\n", "\\\"".repeat(1 << 20)).as_bytes());
    read(
        format!("mmap(NULL, {}, PROT_READ, MAP_PRIVATE, 3, 0) = 0x1000\n", "9".repeat(1 << 20))
            .as_bytes(),
    );
    read("= ".repeat(1 << 16).as_bytes());
    for open in ["3<a", "\"a", "/* a", "[{(", "<unfin", "0<<"] {
        read(
            format!(
                "mmap(NULL, {open}, PROT_READ, MAP_PRIVATE, 3, 0) = 0x1000\n7 [{open} brk({open}"
            )
            .as_bytes(),
        );
    }
}

/// Each of these would take minutes if the whole was looked at again for each piece of it.
#[test]
fn many_pieces_take_no_more_than_their_length() {
    read(format!("brk(NULL) = 0x1000\n- {}\n", "brk(".repeat(1 << 18)).as_bytes());
    read(format!("mmap(NULL, {}\n", "a<".repeat(1 << 19)).as_bytes());
    for piece in [",1\n", "<... mmap resumed>,1 <unfinished ...>\n"] {
        let text = format!("mmap(1 <unfinished ...>\nmmap(1\n{}", piece.repeat(1 << 17));
        read(text.as_bytes());
        assert!(parse("pieces", text.as_bytes(), false).is_err());
    }
}
