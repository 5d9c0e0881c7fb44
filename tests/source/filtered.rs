//! Older kernels and stricter systems: a filter refuses the calls that they do not have or do not
//! permit. In processes of their own.

use crate::cache::flagged;
use crate::mapping::{bytes, text};
use crate::memory::{PAGE, Raw};
use crate::uffd::{Running, eventually, log};
use futures::executor::block_on;
use rustix::fs::OFlags;
use rustix::io::FdFlags;
use shootdown::source::{Fork, OwnedMapping, Uffd, UffdError};
use shootdown::{AddressSpace, Event};
use std::io::ErrorKind;
use std::thread;

// These need no userfaultfd.
crate::list![fn isolated_tests:
    m8_what_is_not_permitted_and_what_the_kernel_does_not_have_are_told_apart,
    addresses_that_the_kernel_does_not_take_back_are_counted,
];

crate::list![fn watching_tests:
    m8_where_the_system_call_is_filtered_the_device_file_serves,
    m1_memory_with_a_hole_is_refused_where_the_page_tables_cannot_be_read,
    m8_what_nobody_watches_is_given_up_where_the_kernel_lists_no_mappings,
];

/// A request of `ioctl` that reads and writes a structure.
const fn request(group: u8, number: u8, size: u32) -> u32 {
    3 << 30 | size << 16 | (group as u32) << 8 | number as u32
}

/// `PAGEMAP_SCAN` (Linux 6.7).
const PAGEMAP_SCAN: u32 = request(b'f', 16, 96);
/// `PROCMAP_QUERY` (Linux 6.11).
const PROCMAP_QUERY: u32 = request(b'f', 17, 104);
/// `USERFAULTFD_IOC_NEW` (Linux 6.1).
const DEVICE: u32 = 0xaa << 8;

/// From now on this thread, and those that it spawns, get `errno` as the answer to a system call:
/// always, or only if its second argument is `argument`.
fn refuse(call: libc::c_long, argument: Option<u32>, errno: i32) {
    let step = |code: u32, k, jf| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    let load = |at| step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, at, 0);
    let skip_unless = |k, jf| step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, k, jf);
    let answer = |k| step(libc::BPF_RET | libc::BPF_K, k, 0);
    // The number of the call is in the first word of `seccomp_data`, the second argument in the
    // seventh.
    let mut program = vec![load(0), skip_unless(call as u32, 1)];
    if let Some(argument) = argument {
        program[1].jf = 3;
        program.extend([load(24), skip_unless(argument, 1)]);
    }
    program
        .extend([answer(libc::SECCOMP_RET_ERRNO | errno as u32), answer(libc::SECCOMP_RET_ALLOW)]);
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the filter is a program that lives until the call returns; what it refuses fails with
    // an error, and changes nothing.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let filter = libc::SECCOMP_MODE_FILTER;
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, filter, &raw const program), 0);
    }
}

fn m8_what_is_not_permitted_and_what_the_kernel_does_not_have_are_told_apart() {
    let cases = [
        (libc::EPERM, UffdError::NotPermitted),
        (libc::EACCES, UffdError::NotPermitted),
        (libc::ENOSYS, UffdError::Unsupported),
        (libc::EINVAL, UffdError::Unsupported),
        (libc::ENOMEM, UffdError::Os(ErrorKind::OutOfMemory)),
    ];
    for (errno, expected) in cases {
        let opened = thread::spawn(move || {
            refuse(libc::SYS_userfaultfd, None, errno);
            refuse(libc::SYS_ioctl, Some(DEVICE), libc::EPERM);
            Uffd::open(&AddressSpace::new()).map(drop)
        });
        assert_eq!(opened.join().unwrap(), Err(expected), "errno {errno}");
    }
}

/// What `mremap` needs is tried at addresses of which nobody has any use afterwards.
fn addresses_that_the_kernel_does_not_take_back_are_counted() {
    let space = AddressSpace::new();
    let mut mapping = OwnedMapping::new(&space, PAGE).unwrap();
    mapping.write(0, b"data");
    block_on(mapping.remap()).unwrap();
    let (leaked, before) = (OwnedMapping::leaked_bytes(), bytes());
    refuse(libc::SYS_munmap, None, libc::ENOMEM);
    block_on(mapping.remap()).unwrap();
    assert_eq!(text(&mapping, 0), *b"data");
    let more = bytes() - before;
    assert!(more > 0, "the kernel has taken back everything");
    assert_eq!(OwnedMapping::leaked_bytes() - leaked, more);
}

fn m8_where_the_system_call_is_filtered_the_device_file_serves() {
    if std::fs::OpenOptions::new().read(true).write(true).open("/dev/userfaultfd").is_err() {
        println!("/dev/userfaultfd may not be opened here");
        return;
    }
    // As the filter of a container does it: the call is refused, the rest permitted.
    refuse(libc::SYS_userfaultfd, None, libc::EPERM);
    // SAFETY: a descriptor that nothing is registered with does nothing to the memory.
    let raw = unsafe { libc::syscall(libc::SYS_userfaultfd, 1) };
    assert_eq!(raw, -1, "the filter does not filter");
    let (_uffd, reader, _deliveries) =
        Uffd::builder().fork(Fork::Ignore).open(&AddressSpace::new()).unwrap();
    assert!(rustix::io::fcntl_getfd(&reader).unwrap().contains(FdFlags::CLOEXEC));
    assert!(rustix::fs::fcntl_getfl(&reader).unwrap().contains(OFlags::NONBLOCK));
    let source = Running::of(&AddressSpace::new(), Uffd::builder().fork(Fork::Ignore));
    let memory = Raw::map(1);
    let _watch = source.uffd.watch(memory.range()).unwrap();
    let (subscription, told) = log(&source.space, memory.range());
    memory.unmap();
    block_on(subscription.read_begin());
    assert_eq!(*told.lock().unwrap(), [(Event::Unmap, memory.range())]);
}

/// As before Linux 6.7, or without a right to read them: then the list of mappings tells whether
/// there is a hole.
fn m1_memory_with_a_hole_is_refused_where_the_page_tables_cannot_be_read() {
    refuse(libc::SYS_ioctl, Some(PAGEMAP_SCAN), libc::ENOTTY);
    let (uffd, _reader, _deliveries) =
        Uffd::builder().fork(Fork::Ignore).open(&AddressSpace::new()).unwrap();
    assert!(!uffd.promises().discards);
    if uffd.promises().granule == PAGE as u64 {
        println!("this kernel does not list single mappings: holes are not seen without both");
        return;
    }
    let (whole, memory) = (Raw::map(3), Raw::map(3));
    memory.part(1, 1).unmap();
    assert!(uffd.watch(whole.range()).is_ok());
    let refused = uffd.watch(memory.range()).unwrap_err();
    assert!(matches!(refused, UffdError::Watch { range, .. } if range == memory.range()));
}

/// As before Linux 6.11.
fn m8_what_nobody_watches_is_given_up_where_the_kernel_lists_no_mappings() {
    refuse(libc::SYS_ioctl, Some(PROCMAP_QUERY), libc::ENOTTY);
    let (uffd, _reader, _deliveries) =
        Uffd::builder().fork(Fork::Keep).open(&AddressSpace::new()).unwrap();
    assert_eq!(uffd.promises().granule, PAGE as u64);
    let memory = Raw::map(3);
    let kept = || ["uw", "dc"].map(|flag| flagged(memory.range(), &[flag]));
    let watch = uffd.watch(memory.range()).unwrap();
    assert_eq!(kept(), [3, 3]);
    drop(watch);
    eventually("it is given up", || kept() == [0, 0]);
}
