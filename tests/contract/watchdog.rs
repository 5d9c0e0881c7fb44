//! The watchdog of this binary: `support/watchdog.rs`.

use std::process::Command;
use std::thread;

/// Hangs in the process that the next test starts.
#[test]
fn hangs_if_told_to() {
    crate::support::pages(0, 1);
    while std::env::var_os("SHOOTDOWN_HANGS").is_some() {
        thread::park();
    }
}

#[test]
fn a_test_that_hangs_is_named() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "watchdog::hangs_if_told_to", "--test-threads=2"])
        .envs([("SHOOTDOWN_HANGS", "1"), ("SHOOTDOWN_HANG_SECONDS", "1")])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(text.contains("hangs since 1s: watchdog::hangs_if_told_to"), "{text}");
}
