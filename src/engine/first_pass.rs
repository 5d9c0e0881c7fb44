//! C7: in debug builds, a wait inside a first pass fails with the notifier's name instead of hanging.

// Model checkers run all their threads on one.
#[cfg(all(feature = "std", debug_assertions, not(any(loom, shuttle))))]
mod check {
    use crate::engine::Shared;
    use crate::entry::EntryRef;
    use std::cell::RefCell;
    use std::vec::Vec;

    std::thread_local! {
        /// The first passes that run on this thread, innermost last: the space's address and the notifier.
        static RUNNING: RefCell<Vec<(usize, EntryRef)>> = const { RefCell::new(Vec::new()) };
    }

    fn address(space: &Shared) -> usize {
        core::ptr::from_ref(space).addr()
    }

    /// A first pass runs while this exists.
    pub(crate) struct InFirstPass;

    impl InFirstPass {
        pub(crate) fn enter(space: &Shared, entry: EntryRef) -> Self {
            RUNNING.with_borrow_mut(|running| running.push((address(space), entry)));
            Self
        }
    }

    impl Drop for InFirstPass {
        fn drop(&mut self) {
            RUNNING.with_borrow_mut(|running| running.pop());
        }
    }

    /// To be called where a future of the space is about to wait.
    #[track_caller]
    pub(crate) fn forbid_waiting(space: &Shared, what: &str) {
        let inside =
            RUNNING.with_borrow(|running| running.iter().rev().find(|(of, _)| *of == address(space)).map(|(_, entry)| *entry));
        if let Some(entry) = inside {
            panic!(
                "{what} waits inside the first pass of {}, which the invalidation under way waits for in its turn: \
                 start the work there and wait in the future that the first pass returns",
                entry.name()
            );
        }
    }
}

#[cfg(not(all(feature = "std", debug_assertions, not(any(loom, shuttle)))))]
mod check {
    use crate::engine::Shared;
    use crate::entry::EntryRef;

    pub(crate) struct InFirstPass;

    impl InFirstPass {
        #[inline]
        pub(crate) fn enter(_space: &Shared, _entry: EntryRef) -> Self {
            Self
        }
    }

    #[inline]
    pub(crate) fn forbid_waiting(_space: &Shared, _what: &str) {}
}

pub(crate) use check::{InFirstPass, forbid_waiting};
