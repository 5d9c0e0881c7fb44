//! In which order calls are replayed.

use crate::recording::parse;
use crate::schedule::Plan;
use std::time::Duration;

fn plan(text: &str) -> Plan {
    Plan::new(&parse("the test", text.as_bytes(), false).unwrap(), Duration::from_micros(50))
}

const BEGIN: &str = "1 1.0 mmap(NULL, 65536, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x10000
1 1.1 clone(child_stack=0x7f, flags=CLONE_VM|CLONE_THREAD) = 2
";

#[test]
fn calls_of_two_threads_keep_their_order_where_they_touch_the_same_pages() {
    let plan = plan(&format!(
        "{BEGIN}1 1.2 munmap(0x10000, 8192) = 0\n2 1.3 munmap(0x14000, 4096) = 0\n\
         2 1.4 mmap(0x11000, 4096, PROT_READ, MAP_PRIVATE|MAP_FIXED, 3, 0) = 0x11000\n1 1.5 munmap(0x11000, 4096) = 0\n"
    ));
    let after: Vec<&[usize]> = plan.calls.iter().map(|call| call.after.as_slice()).collect();
    // The thread's first page was mapped by the first call, its second one unmapped by the third; the last call waits for the thread.
    assert_eq!(after, [&[][..], &[], &[], &[0], &[2], &[4]]);
    assert_eq!(plan.first, [1]);
    assert_eq!(plan.calls[1].begins, Some(2));
    assert_eq!((&plan.tasks[&1], &plan.tasks[&2]), (&vec![0, 1, 2, 5], &vec![3, 4]));
}

#[test]
fn what_concerns_a_whole_address_space_comes_after_all_that_was_before() {
    let plan = plan(&format!("{BEGIN}2 1.2 munmap(0x14000, 4096) = 0\n1 1.3 exit_group(0) = ?\n"));
    assert_eq!(plan.calls[3].after, [2]);
}

#[test]
fn gpus_follow_the_space_in_which_the_most_is_invalidated() {
    let fork = "1 1.1 fork() = 2\n2 1.2 munmap(0x10000, 4096) = 0\n2 1.3 munmap(0x11000, 4096) = 0\n";
    let plan = plan(&format!("{}{fork}", BEGIN.split_inclusive('\n').next().unwrap()));
    assert_eq!((plan.spaces, plan.followed, plan.followed_process), (2, 1, Some(2)));
}
