//! Small recordings, and what Linux 6.12 does for each: `linux/NAME.strace`, `linux/NAME.expected`.

use crate::memory::{Action, Change, Program};
use crate::recording::parse;
use shootdown::AddressRange;

/// The actions of a recording in a few words: `0x7f0000010000-0x7f0000014000` is `10000-14000`.
fn actions(text: &[u8]) -> Vec<String> {
    let recording = parse("the case", text, false).unwrap();
    let mut program = Program::default();
    recording.calls.iter().flat_map(|call| program.run(call)).map(|action| show(&action)).collect()
}

pub(super) fn show(action: &Action) -> String {
    match action {
        Action::Created { space, mappings } => {
            let mappings: String = mappings
                .iter()
                .map(|(range, access)| format!(" {} {access:?}", at(*range)))
                .collect();
            format!("{space}: created{mappings}")
        }
        Action::Mapped { space, range, access } => {
            format!("{space}: mapped {} {access:?}", at(*range))
        }
        Action::Released { space } => format!("{space}: RELEASE"),
        Action::Invalidate { space, range, event, then } => {
            let event = event.name().to_uppercase().replace('-', "_");
            let then = match then {
                Change::Discarded => "discarded".to_owned(),
                Change::Unmapped(gone) => gone
                    .iter()
                    .map(|gone| format!("-{} ", at(*gone)))
                    .collect::<String>()
                    .trim_end()
                    .into(),
                Change::Protected(access) => format!("{access:?}"),
            };
            format!("{space}: {event} {} {then}", at(*range)).trim_end().into()
        }
    }
}

fn at(range: AddressRange) -> String {
    const BASE: u64 = 0x7f00_0000_0000;
    let short = |address: u64| if address > BASE { address - BASE } else { address };
    match range.last().checked_add(1) {
        Some(end) => format!("{:x}-{:x}", short(range.start()), short(end)),
        None => "ALL".into(),
    }
}

/// What the first mapping of nearly all cases does.
const MAPPED: [&str; 2] = ["0: created", "0: mapped 10000-14000 Write"];
const EACH_PAGE: [&str; 4] = [
    "0: CLEAR 10000-11000 discarded",
    "0: CLEAR 11000-12000 discarded",
    "0: CLEAR 12000-13000 discarded",
    "0: CLEAR 13000-14000 discarded",
];

/// A case: its files, and its actions after [`MAPPED`].
macro_rules! cases {
    ($($name:ident: $actions:expr;)*) => {
        $(
            #[test]
            fn $name() {
                let text = include_bytes!(concat!("linux/", stringify!($name), ".strace"));
                let expected = include_str!(concat!("linux/", stringify!($name), ".expected"));
                let actions = actions(text);
                let (mapped, then) = actions.split_at(MAPPED.len().min(actions.len()));
                assert_eq!(mapped, MAPPED, "{expected}");
                let should: &[&str] = &$actions;
                assert_eq!(then, should, "{expected}");
            }
        )*

        /// Every file has its test.
        const CASES: &[&str] = &[$(stringify!($name)),*];
    };
}

cases! {
    exit: ["0: RELEASE", "0: UNMAP ALL -10000-14000"];
    killed: [
        "0: RELEASE",
        "0: UNMAP ALL -10000-14000",
        "1: created",
        "1: mapped 10000-14000 Read",
        "1: UNMAP 10000-14000 -10000-14000",
    ];
    thread_execs: ["0: RELEASE", "0: UNMAP ALL -10000-14000", "1: created"];
    fork_relro: ["0: PROTECTION_VMA 10000-14000 Read", "0: PROTECTION_PAGE 10000-14000 Read", "1: created 10000-14000 Read"];
    fork_never_written: ["1: created 10000-14000 Write"];
    fork_dontfork_and_wipeonfork: ["0: mapped 20000-24000 Write", "1: created 20000-24000 Write"];
    madvise_dontneed_two_vmas: [
        "0: mapped 14000-18000 Write",
        "0: CLEAR 10000-14000 discarded",
        "0: CLEAR 14000-18000 discarded",
    ];
    madvise_dontneed_over_a_hole_fails_and_takes_effect: ["0: CLEAR 10000-14000 discarded"];
    madvise_collapse: ["0: mapped 300000-700000 Write", "0: CLEAR 400000-600000 discarded"];
    madvise_pageout: EACH_PAGE;
    process_madvise: EACH_PAGE;
    mbind_move: EACH_PAGE;
    move_pages_migrate_pages: [EACH_PAGE[0], EACH_PAGE[0], EACH_PAGE[1], EACH_PAGE[2], EACH_PAGE[3]];
    mprotect_over_a_hole_fails_and_takes_effect: ["0: PROTECTION_VMA 10000-14000 Read"];
    mprotect_pages_of_a_none_mapping_to_none: ["0: PROTECTION_VMA 10000-14000 Read", "0: PROTECTION_VMA 10000-14000 None"];
    mprotect_two_vmas: ["0: mapped 14000-18000 Read", "0: PROTECTION_VMA 10000-14000 Read"];
    mremap_move: [
        "0: UNMAP 10000-14000 discarded",
        "0: UNMAP 10000-14000 -10000-14000",
        "0: mapped 50000-58000 Write",
    ];
    mremap_fixed_over: [
        "0: mapped 50000-54000 Write",
        "0: UNMAP 50000-52000 -50000-52000",
        "0: UNMAP 12000-14000 -12000-14000",
        "0: UNMAP 10000-12000 discarded",
        "0: UNMAP 10000-12000 -10000-12000",
        "0: mapped 50000-52000 Write",
    ];
    msync_shared_file: [
        "0: PROTECTION_PAGE 10000-11000 Write",
        "0: PROTECTION_PAGE 11000-12000 Write",
        "0: PROTECTION_PAGE 12000-13000 Write",
        "0: PROTECTION_PAGE 13000-14000 Write",
    ];
    remap_file_pages: ["0: UNMAP 10000-11000 -10000-11000", "0: mapped 10000-11000 Write"];
}

#[test]
fn mprotect_none_to_read() {
    let actions = actions(include_bytes!("linux/mprotect_none_to_read.strace"));
    let event = "0: PROTECTION_VMA 10000-14000 Read";
    let expected = include_str!("linux/mprotect_none_to_read.expected");
    assert_eq!(actions, ["0: created", "0: mapped 10000-14000 None", event, event], "{expected}");
}

#[test]
fn shmat_shmdt() {
    let actions = actions(include_bytes!("linux/shmat_shmdt.strace"));
    let expected = include_str!("linux/shmat_shmdt.expected");
    assert_eq!(
        actions,
        ["0: created", "0: mapped 10000-11000 Write", "0: UNMAP 10000-11000 -10000-11000"],
        "{expected}"
    );
}

#[test]
fn thread_execs_real() {
    let actions = actions(include_bytes!("linux/thread_execs_real.strace"));
    let expected = include_str!("linux/thread_execs_real.expected");
    let of_spaces: Vec<&str> = actions
        .iter()
        .map(String::as_str)
        .filter(|action| action.contains("created") || action.contains("RELEASE"))
        .collect();
    let should =
        ["0: created", "0: RELEASE", "1: created", "1: RELEASE", "2: created", "2: RELEASE"];
    assert_eq!(of_spaces, should, "{expected}");
    // The loader of the second program maps at other places than that of the first.
    let read_only = |space: usize| {
        actions
            .iter()
            .filter(|action| action.starts_with(&format!("{space}: PROTECTION_VMA")))
            .count()
    };
    assert_eq!((read_only(1), read_only(2)), (2, 1), "{expected}");
}

#[test]
fn every_case_is_tested() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/multi_gpu/tests/linux");
    let mut files: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    let others = ["mprotect_none_to_read", "shmat_shmdt", "thread_execs_real"];
    let mut tested: Vec<String> = CASES
        .iter()
        .chain(&others)
        .flat_map(|name| [format!("{name}.expected"), format!("{name}.strace")])
        .collect();
    tested.sort();
    assert_eq!(files, tested);
    assert_eq!(files.len(), 46);
}
