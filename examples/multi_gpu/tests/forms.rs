//! One program, recorded with many options of strace: all recordings say the same. The forms are in
//! `tests/forms`, what is in them in its `expected.json`.

use crate::memory::{Action, Change, Program};
use crate::recording::{Error, NoteKind, Recording, open};
use serde::Deserialize;
use shootdown::Event;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const DIR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/multi_gpu/tests/forms");

#[derive(Deserialize)]
struct Expected {
    #[serde(default)]
    operations: BTreeMap<String, usize>,
    address_spaces: Option<usize>,
    error: Option<String>,
}

fn expected() -> BTreeMap<String, Expected> {
    serde_json::from_str(&std::fs::read_to_string(Path::new(DIR).join("expected.json")).unwrap())
        .unwrap()
}

fn read(form: &str) -> Result<Recording, Error> {
    let path = if form == "17-ff" { "17-ff.strace.*".into() } else { format!("{form}.strace") };
    open(&[Path::new(DIR).join(path)], false).map(|(_, recording)| recording)
}

fn actions(recording: &Recording) -> Vec<Action> {
    let mut program = Program::default();
    recording.calls.iter().flat_map(|call| program.run(call)).collect()
}

/// An action without its addresses, which differ from run to run.
fn outline(action: &Action) -> String {
    match action {
        Action::Created { space, mappings } => format!("{space} created with {}", mappings.len()),
        Action::Mapped { space, range, access } => {
            format!("{space} mapped {:?} {access:?}", range.len())
        }
        Action::Released { space } => format!("{space} released"),
        Action::Invalidate { space, range, event, .. } => {
            format!("{space} {} {:?}", event.name(), range.len())
        }
    }
}

#[test]
fn each_form_holds_what_is_in_it() {
    let expected = expected();
    assert_eq!(expected.len(), 30);
    for (form, expected) in expected {
        let recording = match (read(&form), expected.error) {
            (Ok(recording), None) => recording,
            (Err(Error::NotStrace { .. } | Error::OnlyCounts { .. }), Some(_)) => continue,
            (got, should) => panic!(
                "{form}: {:?} and not {should:?}",
                got.map(|recording| recording.operations())
            ),
        };
        assert_eq!(recording.operations(), expected.operations, "{form}");
        if let Some(spaces) = expected.address_spaces {
            let mut program = Program::default();
            recording.calls.iter().for_each(|call| drop(program.run(call)));
            assert_eq!(program.spaces(), spaces, "{form}");
        }
        assert!(recording.skipped.is_empty() && recording.unfinished == 0, "{form}");
    }
}

/// The tasks run side by side, so their calls are compared space by space.
#[test]
fn all_options_give_the_same_recording_of_the_same_program() {
    let of = |form: &str| -> Vec<Vec<String>> {
        let actions = actions(&read(form).unwrap());
        let of_space = |space: usize| {
            let mut lines: Vec<String> = actions.iter().map(outline).collect();
            lines.retain(|line| line.starts_with(&format!("{space} ")));
            lines
        };
        (0..5).map(of_space).collect()
    };
    let whole = of("00-recommended");
    assert!(whole.iter().all(|space| space.len() >= 3));
    for form in expected().keys().filter(|form| form.as_str() < "20") {
        // One process each.
        if ["01-no-pid-no-time", "18-k-stacks"].contains(&form.as_str()) {
            continue;
        }
        assert_eq!(of(form), whole, "{form}");
    }
}

#[test]
fn the_files_of_one_run_are_one_recording_by_pattern_directory_and_name() {
    let files: Vec<PathBuf> = ["19223", "19224", "19225"]
        .map(|pid| Path::new(DIR).join(format!("17-ff.strace.{pid}")))
        .into();
    let (name, by_name) = open(&files, false).unwrap();
    assert_eq!(name, "17-ff.strace.19223 and 2 more files");
    let dir = std::env::temp_dir().join(format!("shootdown-ff-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    for file in &files {
        std::fs::copy(file, dir.join(file.file_name().unwrap())).unwrap();
    }
    let (_, by_directory) = open(std::slice::from_ref(&dir), false).unwrap();
    assert_eq!(by_directory.calls, by_name.calls);
    assert_eq!(read("17-ff").unwrap().calls, by_name.calls);
    assert!(by_name.calls.is_sorted_by_key(|call| call.at_ns));
    assert_eq!(
        by_name.calls.iter().map(|call| call.pid).collect::<std::collections::BTreeSet<_>>().len(),
        3
    );

    // Without times a new task runs where it is made.
    for file in &files {
        let text = std::fs::read_to_string(file).unwrap();
        let cut: String =
            text.lines().map(|line| format!("{}\n", line.split_once(' ').unwrap().1)).collect();
        std::fs::write(dir.join(file.file_name().unwrap()), cut).unwrap();
    }
    let (_, without) = open(std::slice::from_ref(&dir), false).unwrap();
    assert_eq!(without.operations(), by_name.operations());
    assert!(without.calls.iter().all(|call| call.at_ns == 0));
    let spaces = |recording: &Recording| {
        actions(recording).iter().filter(|action| matches!(action, Action::Created { .. })).count()
    };
    assert_eq!((spaces(&without), spaces(&by_name)), (5, 5));
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn times_are_since_the_first_line_in_every_unit() {
    let last = |form: &str| read(form).unwrap().calls.last().unwrap().at_ns;
    // Between 5 and 30 ms, in every form that has fractions.
    for form in [
        "00-recommended",
        "04-f-tt",
        "05-f-r",
        "06-f-ns",
        "07-f-ttt-T",
        "15-all-calls",
        "19-f-tt-T-y-i",
    ] {
        assert!((3_000_000..30_000_000).contains(&last(form)), "{form}: {}", last(form));
    }
    assert_eq!(last("02-f"), 0);
    assert_eq!(last("22-old-mmap"), 2_000_000_000);
}

#[test]
fn addresses_of_32_bit_processes_are_the_same_in_results_and_arguments() {
    let actions = actions(&read("21-i386-sign-extended").unwrap());
    let gone: Vec<u64> = actions
        .iter()
        .filter_map(|action| match action {
            Action::Invalidate { event: Event::Unmap, then: Change::Unmapped(gone), .. } => {
                Some(gone)
            }
            _ => None,
        })
        .flatten()
        .map(|gone| gone.start())
        .collect();
    assert_eq!(gone, [0xf77b_a000, 0xf77d_7000]);
}

#[test]
fn an_execve_from_a_thread_ends_the_others_and_releases_their_memory() {
    let recording = read("23-execve-from-a-thread").unwrap();
    let lines: Vec<String> = actions(&recording).iter().map(outline).collect();
    let at = |line: &str| {
        lines
            .iter()
            .position(|other| other == line)
            .unwrap_or_else(|| panic!("{line} in {lines:?}"))
    };
    assert!(at("1 released") < at("2 created with 0"));
    let mut program = Program::default();
    recording
        .calls
        .iter()
        .take_while(|call| call.line <= 8)
        .for_each(|call| drop(program.run(call)));
    assert_eq!((program.space_of(500), program.space_of(501)), (Some(2), None));
}

#[test]
fn what_is_not_known_is_counted_and_listed() {
    let terminal = read("25-terminal-copy").unwrap();
    assert_eq!(
        terminal.other,
        BTreeMap::from([("openat".into(), 1), ("read".into(), 1), ("write".into(), 1)])
    );
    assert_eq!(
        (terminal.notes, terminal.noted[&NoteKind::Text], terminal.noted[&NoteKind::Message]),
        (2, 1, 1)
    );
    assert_eq!(terminal.listed[0].text, "user@host:~$ strace ./program");

    let middle = read("26-unfinished-at-the-start").unwrap();
    assert_eq!((middle.incomplete, middle.other["restart_syscall"]), (1, 1));
    assert!(!actions(&middle).iter().any(|action| matches!(action, Action::Mapped { .. })));

    let summary = read("16-with-summary").unwrap();
    assert_eq!(summary.noted[&NoteKind::Summary], 10);
    assert!(read("18-k-stacks").unwrap().noted[&NoteKind::Stack] > 100);
    assert_eq!(read("15-all-calls").unwrap().other["close"], 31);
    assert_eq!(read("29-killed-task").unwrap().other["???"], 1);
}

#[test]
fn what_is_no_recording_says_so_and_how_to_make_one() {
    for (form, says) in
        [("27-another-tools-log", "is not strace's"), ("28-counts-only", "only counts")]
    {
        let error = read(form).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains("strace -f -ttt"), "{error}");
    }
    let says = |paths: &[&str]| {
        let paths: Vec<PathBuf> = paths.iter().map(PathBuf::from).collect();
        open(&paths, false).unwrap_err().to_string()
    };
    assert!(says(&["/does/not/exist"]).contains("cannot be read"));
    assert!(says(&["/does/not/ex*"]).contains("there is no file"));
    assert!(says(&["/dev/null"]).contains("holds no system call"));
}

#[test]
fn the_recordings_that_are_built_in_are_read_without_a_rest() {
    let (_, numpy) = open(&[], false).unwrap();
    assert_eq!(
        (numpy.unfinished, numpy.incomplete, numpy.skipped.len(), numpy.other.len()),
        (0, 0, 0, 0)
    );
    for (file, lines) in [("numpy.strace", 2596), ("cargo-build.strace", 11596)] {
        let path = Path::new(DIR).join("../../workloads").join(file);
        let (_, recording) = open(&[path], false).unwrap();
        assert_eq!(
            (recording.lines, recording.unfinished, recording.incomplete),
            (lines, 0, 0),
            "{file}"
        );
    }
}

#[test]
fn the_size_of_a_segment_may_be_in_another_file() {
    let dir = std::env::temp_dir().join(format!("shootdown-segments-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("trace.7"), "1.1 shmat(5, NULL, 0) = 0x5000\n").unwrap();
    std::fs::write(
        dir.join("trace.8"),
        "1.0 shmget(1, 65536, IPC_CREAT|0600) = 5\n1.2 shmget(1, 0, 0) = 5\n",
    )
    .unwrap();
    let (_, recording) = open(std::slice::from_ref(&dir), false).unwrap();
    assert!(matches!(
        recording.calls[0].op,
        crate::recording::Op::Attach { at: 0x5000, len: 65536, .. }
    ));
    std::fs::remove_dir_all(dir).unwrap();
}
