//! The back-end under a real QEMU, with a guest that uses its disks. Where QEMU or a kernel for the
//! guest are missing the tests count as ignored, and say why. `guest.sh` of this package builds and
//! boots the guest. `SHOOTDOWN_BACKEND` names another back-end that has the options of the example
//! `blk`.
#![allow(missing_docs, unreachable_pub, clippy::print_stdout)]

mod compare;
mod disk;
mod exit;
#[path = "../../../shootdown-guest/src/pattern.rs"]
mod pattern;
mod rig;
mod vfio;

use libtest_mimic::{Arguments, Trial};

fn main() {
    let mut arguments = Arguments::from_args();
    // Guests and back-ends together are more threads than a small machine has processors, and times
    // are looked at.
    arguments.test_threads.get_or_insert(1);
    let missing = rig::missing();
    let trial = |missing: &Option<String>, (name, test): (&'static str, fn())| {
        let trial = Trial::test(name, move || {
            test();
            Ok(())
        });
        match missing {
            None => trial,
            Some(why) => trial.with_kind(format!("skipped: {why}")).with_ignored_flag(true),
        }
    };
    let backend = missing.clone().or_else(rig::no_backend);
    let own = compare::tests().into_iter().map(|test| trial(&missing, test));
    let others = [disk::tests(), vfio::tests(), exit::tests(), compare::tests_of_both()].concat();
    let trials = own.chain(others.into_iter().map(|test| trial(&backend, test))).collect();
    libtest_mimic::run(&arguments, trials).exit();
}

/// The name of each function and the function.
macro_rules! list {
    ($($test:ident),* $(,)?) => {
        $crate::list!(fn tests: $($test),*);
    };
    (fn $name:ident: $($test:ident),* $(,)?) => {
        pub fn $name() -> Vec<(&'static str, fn())> {
            vec![$((stringify!($test), $test as fn())),*]
        }
    };
}
pub(crate) use list;
