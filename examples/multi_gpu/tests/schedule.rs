//! In which order calls are replayed.

use crate::memory::{Access, Action, Change};
use crate::recording::parse;
use crate::schedule::{Plan, at_once};
use shootdown::{AddressRange, Event};
use std::time::Duration;

fn plan(text: &str) -> Plan {
    gathering(text, 1)
}

fn gathering(text: &str, batch: usize) -> Plan {
    Plan::new(&parse("the test", text.as_bytes(), false).unwrap(), Duration::from_micros(50), batch)
}

fn after(plan: &Plan) -> Vec<Vec<usize>> {
    plan.calls.iter().map(|call| call.after.iter().copied().collect()).collect()
}

const BEGIN: &str =
    "1 1.0 mmap(NULL, 65536, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x10000
1 1.1 clone(child_stack=0x7f, flags=CLONE_VM|CLONE_THREAD) = 2
";

#[test]
fn calls_of_two_threads_keep_their_order_where_they_touch_the_same_pages() {
    let plan = plan(&format!(
        "{BEGIN}1 1.2 munmap(0x10000, 8192) = 0\n2 1.3 munmap(0x14000, 4096) = 0\n\
         2 1.4 mmap(0x11000, 4096, PROT_READ, MAP_PRIVATE|MAP_FIXED, 3, 0) = 0x11000\n1 1.5 munmap(0x11000, 4096) = 0\n"
    ));
    // The thread's first page was mapped by the first call, its second one unmapped by the third;
    // the last call waits for the thread.
    assert_eq!(after(&plan), [&[][..], &[], &[], &[0], &[2], &[4]]);
    assert_eq!(plan.first, [1]);
    assert_eq!(plan.calls[1].begins, Some(2));
    assert_eq!((&plan.tasks[&1], &plan.tasks[&2]), (&vec![0, 1, 2, 5], &vec![3, 4]));
}

#[test]
fn what_concerns_a_whole_address_space_comes_after_all_that_was_before() {
    let plan = plan(&format!("{BEGIN}2 1.2 munmap(0x14000, 4096) = 0\n1 1.3 exit_group(0) = ?\n"));
    assert_eq!(after(&plan)[3], [2]);
}

#[test]
fn gpus_follow_the_space_in_which_the_most_is_invalidated() {
    let fork =
        "1 1.1 fork() = 2\n2 1.2 munmap(0x10000, 4096) = 0\n2 1.3 munmap(0x11000, 4096) = 0\n";
    let plan = plan(&format!("{}{fork}", BEGIN.split_inclusive('\n').next().unwrap()));
    assert_eq!((plan.spaces, plan.followed, plan.followed_process), (2, 1, Some(2)));
}

/// What each call changes.
fn changes(plan: &Plan) -> Vec<usize> {
    plan.calls
        .iter()
        .map(|call| {
            call.actions.iter().filter(|action| matches!(action, Action::Invalidate { .. })).count()
        })
        .collect()
}

#[test]
fn changes_of_one_kind_in_calls_that_follow_one_another_are_gathered_where_the_last_of_them_is() {
    let text = format!(
        "{BEGIN}1 1.2 munmap(0x10000, 4096) = 0\n1 1.3 munmap(0x12000, 4096) = 0\n2 1.4 munmap(0x1f000, 4096) = 0\n\
         1 1.5 munmap(0x14000, 4096) = 0\n1 1.6 madvise(0x16000, 4096, MADV_DONTNEED) = 0\n1 1.7 munmap(0x17000, 4096) = 0\n\
         1 1.8 clone(child_stack=0x7f, flags=CLONE_VM|CLONE_THREAD) = 3\n1 1.9 munmap(0x18000, 4096) = 0\n"
    );
    // The first call maps, the second one is the clone.
    assert_eq!(changes(&gathering(&text, 1)), [0, 0, 1, 1, 1, 1, 1, 1, 0, 1]);
    assert_eq!(changes(&gathering(&text, 2)), [0, 0, 2, 1, 1, 1, 1, 0, 1]);
    let all = gathering(&text, 64);
    assert_eq!(
        changes(&all),
        [0, 0, 1, 3, 1, 1, 0, 1],
        "another event, and a call that does more, come between them"
    );
    assert_eq!((&all.tasks[&1], &all.tasks[&2]), (&vec![0, 1, 3, 4, 5, 6, 7], &vec![2]));
    let starts = |call: usize| -> Vec<u64> {
        let start = |action: &Action| match action {
            Action::Invalidate { range, .. } => range.start(),
            other => panic!("{other:?}"),
        };
        all.calls[call].actions.iter().map(start).collect()
    };
    assert_eq!(starts(3), [0x10000, 0x12000, 0x14000]);
    assert_eq!(after(&all), [&[][..], &[], &[0], &[], &[], &[], &[], &[]]);
    let at_first = gathering(&text, 1).calls[2].at;
    assert!(all.calls[3].at > at_first, "it is made when the last of them was");
}

#[test]
fn what_is_gathered_comes_after_all_that_its_calls_come_after_and_those_after_them_come_after_it() {
    let plan = gathering(
        &format!(
            "{BEGIN}2 1.2 munmap(0x10000, 4096) = 0\n1 1.3 mmap(0x10000, 4096, PROT_READ, MAP_PRIVATE|MAP_FIXED, 3, 0) = 0x10000\n\
             2 1.4 munmap(0x10000, 4096) = 0\n2 1.5 munmap(0x12000, 4096) = 0\n1 1.6 mmap(0x12000, 4096, PROT_READ, MAP_PRIVATE|MAP_FIXED, 3, 0) = 0x12000\n"
        ),
        64,
    );
    assert_eq!(changes(&plan), [0, 0, 1, 0, 2, 0]);
    assert_eq!(after(&plan), [&[][..], &[], &[0], &[2], &[0, 3], &[4]]);
}

#[test]
fn changes_are_told_of_before_another_task_does_what_comes_after_one_of_them() {
    let map = "2 1.3 mmap(0x10000, 4096, PROT_READ, MAP_PRIVATE|MAP_FIXED, 3, 0) = 0x10000\n";
    // The second unmapping of the first task is of what the other task has mapped where the first
    // one was: put together, each task would wait for the other. Also if it is of something else
    // the other task maps what is still to be unmapped.
    for second in ["0x10000", "0x12000"] {
        let plan = gathering(
            &format!(
                "{BEGIN}1 1.2 munmap(0x10000, 4096) = 0\n{map}1 1.4 munmap({second}, 4096) = 0\n"
            ),
            64,
        );
        assert_eq!(changes(&plan), [0, 0, 1, 0, 1], "{second}");
        assert_eq!(after(&plan)[3], [2], "{second}");
    }
    // Nobody comes after the first one.
    let plan = gathering(
        &format!("{BEGIN}1 1.2 munmap(0x12000, 4096) = 0\n{map}1 1.4 munmap(0x10000, 4096) = 0\n"),
        64,
    );
    assert_eq!(
        (changes(&plan), after(&plan)),
        (vec![0, 0, 1, 2], vec![vec![], vec![], vec![0], vec![2]])
    );
}

#[test]
fn gathered_or_not_each_task_does_the_same_and_nobody_waits_for_what_is_later() {
    let of = |name| {
        std::fs::read(format!(
            "{}/examples/multi_gpu/workloads/{name}.strace",
            env!("CARGO_MANIFEST_DIR")
        ))
        .unwrap()
    };
    for name in ["numpy-training", "numpy", "cargo-build"] {
        let recording = parse(name, &of(name)[..], false).unwrap();
        let plan = |batch| Plan::new(&recording, Duration::from_micros(50), batch);
        let actions = |plan: &Plan, task: u32| -> Vec<Action> {
            plan.tasks[&task].iter().flat_map(|call| plan.calls[*call].actions.clone()).collect()
        };
        let alone = plan(1);
        let calls = [2, 64, 65_536].map(|batch| {
            let gathered = plan(batch);
            for (index, call) in gathered.calls.iter().enumerate() {
                assert!(
                    call.after.iter().all(|earlier| *earlier < index),
                    "{name}, {batch}: call {index}"
                );
                assert!(
                    call.actions.len() <= batch
                        || alone.calls.iter().any(|of_one| of_one.actions == call.actions)
                );
                assert!(at_once(&call.actions, batch).flatten().eq(&call.actions));
            }
            assert!(gathered.tasks.keys().eq(alone.tasks.keys()));
            for (task, calls) in &gathered.tasks {
                assert!(calls.is_sorted(), "{name}, {batch}");
                assert_eq!(
                    actions(&gathered, *task),
                    actions(&alone, *task),
                    "{name}, {batch}, task {task}"
                );
            }
            gathered.calls.len()
        });
        assert!(
            alone.calls.len() > calls[0] && calls[0] > calls[1],
            "{name}: {} and {calls:?}",
            alone.calls.len()
        );
    }
}

#[test]
fn changes_of_one_kind_that_follow_one_another_in_a_call_are_made_at_once() {
    let range = |page: u64| AddressRange::new(page << 12, 4096).unwrap();
    let change = |page, event| Action::Invalidate {
        space: 0,
        range: range(page),
        event,
        then: Change::Discarded,
    };
    let other_space = Action::Invalidate {
        space: 1,
        range: range(1),
        event: Event::Clear,
        then: Change::Discarded,
    };
    let mapped = Action::Mapped { space: 0, range: range(1), access: Access::None };
    let actions = [
        change(1, Event::Unmap),
        change(2, Event::Unmap),
        change(3, Event::Unmap),
        change(4, Event::Clear),
        other_space.clone(),
        other_space,
        mapped.clone(),
        mapped,
    ];
    let at_once = |batch| at_once(&actions, batch).map(<[Action]>::len).collect::<Vec<_>>();
    assert_eq!(at_once(64), [3, 1, 2, 1, 1]);
    assert_eq!(at_once(2), [2, 1, 1, 2, 1, 1]);
    assert_eq!(at_once(1), [1; 8]);
}
