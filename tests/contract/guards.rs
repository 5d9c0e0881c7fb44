//! What the compiler knows of a driver's lock and its guard.

use shootdown::{DriverGuard, DriverLock};
use std::cell::Cell;
use std::marker::PhantomData;
use std::panic::{RefUnwindSafe, UnwindSafe};

struct Is<T>(PhantomData<T>);
macro_rules! asks {
    ($no:ident, $name:ident, $bound:path) => {
        #[allow(dead_code)]
        trait $no {
            const $name: bool = false;
        }
        impl<T> $no for Is<T> {}
        #[allow(dead_code)]
        impl<T: $bound> Is<T> {
            const $name: bool = true;
        }
    };
}
asks!(NoU, UNWIND, UnwindSafe);
asks!(NoR, REF_UNWIND, RefUnwindSafe);
asks!(NoS, SYNC, Sync);
asks!(NoSend, SEND, Send);

type Tables = Box<dyn FnMut() + Send + Sync>;
type SyncOnly = std::sync::MutexGuard<'static, u8>;

/// A function, because a constant that is asserted is refused by a lint.
fn check(holds: bool, of: &str) {
    assert!(holds, "{of}");
}

#[test]
fn a_driver_guard_is_unwind_safe_like_that_of_std() {
    check(Is::<std::sync::MutexGuard<'static, Cell<u8>>>::UNWIND, "std's");
    check(Is::<DriverGuard<'static, Cell<u8>>>::UNWIND, "Cell");
    check(Is::<DriverGuard<'static, Tables>>::UNWIND, "Box<dyn>");
}
#[test]
fn a_driver_guard_is_ref_unwind_safe_like_that_of_std() {
    check(Is::<std::sync::MutexGuard<'static, Cell<u8>>>::REF_UNWIND, "std's");
    check(Is::<DriverGuard<'static, Cell<u8>>>::REF_UNWIND, "Cell");
}
#[test]
fn a_driver_guard_is_sync_where_its_mappings_are() {
    check(Is::<std::sync::MutexGuard<'static, SyncOnly>>::SYNC, "std's");
    check(Is::<DriverGuard<'static, SyncOnly>>::SYNC, "shared, but not sent");
}
#[test]
fn a_driver_lock_is_sent_and_shared_where_a_mutex_of_std_is() {
    check(
        !Is::<DriverGuard<'static, u8>>::SEND && Is::<DriverGuard<'static, u8>>::SYNC,
        "as before",
    );
    check(!Is::<DriverGuard<'static, Cell<u8>>>::SYNC, "as before");
    check(Is::<DriverLock<Cell<u8>>>::SYNC && Is::<DriverLock<Cell<u8>>>::SEND, "as before");
    check(
        !Is::<DriverLock<std::rc::Rc<u8>>>::SYNC && !Is::<DriverLock<std::rc::Rc<u8>>>::SEND,
        "as before",
    );
    check(Is::<DriverLock<Tables>>::UNWIND && Is::<DriverLock<Tables>>::REF_UNWIND, "as before");
}
