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

#[test]
fn a_driver_guard_is_unwind_safe_like_that_of_std() {
    assert!(Is::<std::sync::MutexGuard<'static, Cell<u8>>>::UNWIND, "std's");
    assert!(Is::<DriverGuard<'static, Cell<u8>>>::UNWIND, "Cell");
    assert!(Is::<DriverGuard<'static, Tables>>::UNWIND, "Box<dyn>");
}
#[test]
fn a_driver_guard_is_ref_unwind_safe_like_that_of_std() {
    assert!(Is::<std::sync::MutexGuard<'static, Cell<u8>>>::REF_UNWIND, "std's");
    assert!(Is::<DriverGuard<'static, Cell<u8>>>::REF_UNWIND, "Cell");
}
#[test]
fn a_driver_guard_is_sync_where_its_mappings_are() {
    assert!(Is::<std::sync::MutexGuard<'static, SyncOnly>>::SYNC, "std's");
    assert!(Is::<DriverGuard<'static, SyncOnly>>::SYNC, "shared, but not sent");
}
#[test]
fn a_driver_lock_is_sent_and_shared_where_a_mutex_of_std_is() {
    assert!(!Is::<DriverGuard<'static, u8>>::SEND && Is::<DriverGuard<'static, u8>>::SYNC);
    assert!(!Is::<DriverGuard<'static, Cell<u8>>>::SYNC);
    assert!(Is::<DriverLock<Cell<u8>>>::SYNC && Is::<DriverLock<Cell<u8>>>::SEND);
    assert!(!Is::<DriverLock<std::rc::Rc<u8>>>::SYNC && !Is::<DriverLock<std::rc::Rc<u8>>>::SEND);
    assert!(Is::<DriverLock<Tables>>::UNWIND && Is::<DriverLock<Tables>>::REF_UNWIND);
}
