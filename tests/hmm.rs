//! The kernel's HMM self-tests (`tools/testing/selftests/mm/hmm-tests.c`), by their names, on the
//! simulated memory and the mirroring driver of `examples/dmirror`; and what those tests do not
//! have.
//!
//! Each kernel case runs on a multi-threaded tokio runtime and on an executor of one thread, for a
//! device whose memory the processor cannot use (private) and one whose memory it can (coherent).
//! `anon_teardown` runs on real memory too, in `tests/source` (feature `userfaultfd`).
//!
//! Left out, because they test what has no counterpart here:
//!
//! | case | reason |
//! | --- | --- |
//! | `anon_write_hugetlbfs` | hugetlbfs is a file system of the kernel; `anon_write_huge` and `compound` have the big entries |
//! | `hmm_gup_test` | `get_user_pages` pins pages for other drivers; nothing pins here |
//! | `mixedmap` | `VM_MIXEDMAP` areas belong to drivers that map their own pages into the process |
//! | `migrate_anon_huge_err`, `migrate_anon_huge_zero_err` | an allocation of a big page in the device that fails; the device has small pages only |
//! | `benchmark_thp_migration` and the like | figures of the kernel's copying, not checks |
#![cfg(all(feature = "std", not(any(loom, shuttle))))]
#![allow(missing_docs, unreachable_pub)]

#[path = "../examples/dmirror/command.rs"]
mod command;
#[path = "../examples/dmirror/device.rs"]
mod device;
#[path = "../examples/dmirror/engine.rs"]
mod engine;
#[path = "../examples/dmirror/frame.rs"]
mod frame;
#[path = "../examples/dmirror/memory.rs"]
mod memory;
#[path = "../examples/dmirror/vma.rs"]
mod vma;

#[path = "support/mod.rs"]
mod support;

#[path = "hmm/beyond.rs"]
mod beyond;
#[path = "hmm/kernel.rs"]
mod kernel;
#[path = "hmm/runtime.rs"]
mod runtime;

/// Each case on each runtime.
macro_rules! cases {
    ($module:ident on $machine:expr; $($case:ident),* $(,)?) => {
        mod on_tokio {
            $(#[test]
            fn $case() {
                crate::runtime::on_tokio(|runtime| crate::$module::$case($machine(runtime)));
            })*
        }
        mod on_one_thread {
            $(#[test]
            fn $case() {
                crate::runtime::on_one_thread(|runtime| crate::$module::$case($machine(runtime)));
            })*
        }
    };
}

macro_rules! kernel_cases {
    ($($case:ident),* $(,)?) => {
        mod private {
            cases!(kernel on crate::kernel::Machine::private; $($case),*);
        }
        mod coherent {
            cases!(kernel on crate::kernel::Machine::coherent; $($case),*);
        }
    };
}

kernel_cases!(
    open_close,
    anon_read,
    anon_read_prot,
    anon_write,
    anon_write_prot,
    anon_write_child,
    anon_write_child_shared,
    anon_write_huge,
    file_read,
    file_write,
    migrate,
    migrate_fault,
    migrate_release,
    migrate_shared,
    migrate_mixed,
    migrate_multiple,
    anon_read_multiple,
    anon_teardown,
    snapshot,
    compound,
    double_map,
    exclusive,
    exclusive_mprotect,
    exclusive_cow,
    hmm_cow_in_device,
    migrate_anon_huge_empty,
    migrate_anon_huge_zero,
    migrate_anon_huge_free,
    migrate_anon_huge_fault,
    migrate_partial_unmap_fault,
    migrate_remap_fault,
);

mod beyond_the_kernel {
    cases!(beyond on std::convert::identity;
        there_are_two_passes,
        waits_of_devices_overlap,
        a_second_invalidation_does_not_wait_for_the_first_ones_pass,
        would_block_half_way_leaves_started_passes_to_the_space,
        a_range_is_stable_when_all_nested_invalidations_have_ended,
        insert_during_an_invalidation_waits_for_it,
        remove_during_an_invalidation_waits_for_its_own_pass_only,
        release_with_live_notifiers,
        sequence_wraps_around,
        a_reader_is_not_held_up_by_unrelated_traffic,
        a_retry_budget_that_is_used_up_is_an_error_that_says_so,
        a_step_in_progress_is_not_interrupted_by_the_budget,
    );
}
