//! What the handles say of themselves, and that nothing is skipped where the kernel permits it.

use crate::formats::{debug, display};
use crate::mapping::mapped;
use crate::memory::{PAGE, Raw};
use crate::uffd::{eventually, log, no_fork};
use futures::executor::block_on;
use rustix::fd::{AsFd, AsRawFd};
use shootdown::source::{Fork, MapError, Protection, Uffd, UffdError, UffdStats, Unwatched};
use shootdown::{AddressRange, AddressSpace};
use std::error::Error;
use std::fmt::Display;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::mpsc;
use std::thread;

crate::list![
    m8_the_source_opens_wherever_the_kernel_has_what_it_needs,
    a_mappings_pointer_is_the_start_of_its_range,
    no_access_is_permitted_where_the_protection_is_none,
    debug_names_the_mapping_and_what_it_is_of,
    display_says_what_happened_and_what_to_do,
    source_is_what_lies_behind_the_text,
];

// With a source.
crate::list![fn watching_tests:
    both_ways_to_a_descriptor_lead_to_the_same,
    m8_one_read_takes_all_that_is_there,
    debug_names_the_source_and_what_it_watches,
    the_source_is_reading_from_the_start_of_run_to_its_end,
];

// Run by the tests above, in processes that end by a signal.
crate::list![fn children: reads_where_the_protection_is_none];

/// What the kernel answers without the library: the system call as an ordinary user may make it,
/// and the features that a source needs (Linux 5.7).
fn raw_features() -> std::io::Result<u64> {
    const NEW: [libc::c_int; 2] = [1, 0];
    let open = |flags: libc::c_int| {
        let flags = flags | libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: a descriptor that nothing is registered with does nothing to the memory.
        unsafe { libc::syscall(libc::SYS_userfaultfd, flags) }
    };
    let fd = NEW.into_iter().map(open).find(|fd| *fd >= 0).ok_or(std::io::Error::last_os_error())?;
    let mut api = [0xaa_u64, 0, 0];
    let request = 3 << 30 | (size_of_val(&api) as u64) << 16 | 0xaa << 8 | 0x3f;
    // SAFETY: `UFFDIO_API` reads and writes one `uffdio_api`, three words; the descriptor is ours.
    let answer = unsafe { libc::ioctl(fd as libc::c_int, request as _, &mut api) };
    let error = std::io::Error::last_os_error();
    // SAFETY: as above.
    unsafe { libc::close(fd as libc::c_int) };
    if answer == 0 { Ok(api[1]) } else { Err(error) }
}

/// Otherwise the tests that need a source would count as ignored, and the run as green.
fn m8_the_source_opens_wherever_the_kernel_has_what_it_needs() {
    // Write-protect mode, and the events REMAP, REMOVE and UNMAP.
    const NEEDED: u64 = 1 | 1 << 2 | 1 << 3 | 1 << 6;
    match raw_features() {
        Ok(known) if known & NEEDED == NEEDED => {
            let opened = Uffd::open(&AddressSpace::new());
            assert!(opened.is_ok(), "the kernel has {known:#x}: {:?}", opened.err());
        }
        Ok(known) => println!("this kernel has the features {known:#x} only"),
        Err(error) => println!("userfaultfd is not permitted: {error}"),
    }
}

fn a_mappings_pointer_is_the_start_of_its_range() {
    let (_space, mut mapping, _log, _subscription) = mapped(3 * PAGE);
    assert_eq!(mapping.as_ptr().addr() as u64, mapping.range().start());
    assert!(!mapping.is_empty());
    // SAFETY: the mapping is there, and nobody writes.
    assert_eq!(unsafe { *mapping.as_ptr() }, b'a');
    block_on(mapping.remap()).unwrap();
    assert_eq!(mapping.as_ptr().addr() as u64, mapping.range().start());
}

fn reads_where_the_protection_is_none() {
    let (_space, mut mapping, _log, _subscription) = mapped(3 * PAGE);
    block_on(mapping.protect(0..PAGE, Protection::Read)).unwrap();
    let mut text = [0; 4];
    mapping.read(0, &mut text);
    println!("{}", text.escape_ascii());
    block_on(mapping.protect(0..PAGE, Protection::None)).unwrap();
    mapping.read(0, &mut text);
    println!("and once more: {}", text.escape_ascii());
}

fn no_access_is_permitted_where_the_protection_is_none() {
    let output = Command::new(std::env::current_exe().unwrap())
        .env("SHOOTDOWN_ONE", "reads_where_the_protection_is_none")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("abcd") && !text.contains("once more"), "{text}");
    assert_eq!(output.status.signal(), Some(libc::SIGSEGV), "{}", output.status);
}

fn both_ways_to_a_descriptor_lead_to_the_same() {
    let _fork = no_fork();
    let (_uffd, reader, deliveries) = Uffd::open(&AddressSpace::new()).unwrap();
    assert_eq!(reader.as_raw_fd(), reader.as_fd().as_raw_fd());
    assert_eq!(deliveries.as_raw_fd(), deliveries.as_fd().as_raw_fd());
    assert_ne!(reader.as_raw_fd(), deliveries.as_raw_fd());
}

fn the_source_is_reading_from_the_start_of_run_to_its_end() {
    let _fork = no_fork();
    let (uffd, mut reader, _deliveries) = Uffd::open(&AddressSpace::new()).unwrap();
    assert!(!uffd.is_reading());
    let reading = thread::spawn(move || reader.run());
    eventually("the thread is there", || uffd.is_reading());
    uffd.stop();
    reading.join().unwrap().unwrap();
    assert!(!uffd.is_reading());
}

/// Whether a thread of this process waits in the kernel and cannot be interrupted.
fn waits_in_the_kernel(thread: libc::pid_t) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap();
    stat.rsplit_once(')').is_some_and(|(_, rest)| rest.starts_with(" D"))
}

/// More threads wait for the reader than it takes events at once.
fn m8_one_read_takes_all_that_is_there() {
    const THREADS: usize = 20;
    let _fork = no_fork();
    let space = AddressSpace::new();
    let (uffd, mut reader, mut deliveries) = Uffd::open(&space).unwrap();
    // Every other page, so that each is a mapping of its own.
    let memory = Raw::map(2 * THREADS);
    let watches: Vec<_> =
        (0..THREADS).map(|at| uffd.watch(memory.part(2 * at, 1).range()).unwrap()).collect();
    let (says, hears) = mpsc::channel();
    thread::scope(|scope| {
        for at in 0..THREADS {
            let says = says.clone();
            scope.spawn(move || {
                // SAFETY: it only asks for the thread's number.
                says.send(unsafe { libc::gettid() }).unwrap();
                memory.part(2 * at, 1).unmap();
            });
        }
        let threads: Vec<_> = hears.iter().take(THREADS).collect();
        eventually("all of them wait for the reader", || {
            threads.iter().all(|thread| waits_in_the_kernel(*thread))
        });
        let read = reader.read().unwrap();
        // Should one be missing: nobody hangs.
        while reader.read().unwrap() > 0 {}
        assert_eq!(read, THREADS);
    });
    assert_eq!(uffd.stats().events, THREADS as u64);
    block_on(deliveries.deliver()).unwrap();
    drop(watches);
}

fn range() -> AddressRange {
    AddressRange::new(0x1000, 0x1000).unwrap()
}

fn refused() -> std::io::Error {
    std::io::Error::other("the disk is full")
}

fn debug_names_the_mapping_and_what_it_is_of() {
    let (_space, mapping, _log, _subscription) = mapped(3 * PAGE);
    debug(&mapping, &["OwnedMapping", &mapping.range().to_string()]);
    debug(&Protection::None, &["None"]);
    debug(&MapError::Forked, &["Forked"]);
    debug(&MapError::Os(refused()), &["Os", "the disk is full"]);
    debug(&UffdError::NoRoom { range: range() }, &["NoRoom", "0x1000..=0x1fff"]);
    debug(&UffdStats::default(), &["UffdStats", "events: 0", "unsettled: 0"]);
    debug(&Uffd::builder(), &["UffdBuilder", "fork: None", "settle", "granule"]);
    debug(&Fork::Keep, &["Keep"]);
    debug(&Unwatched::<MapError>::Watch(UffdError::Closed), &["Watch", "Closed"]);
}

fn debug_names_the_source_and_what_it_watches() {
    let _fork = no_fork();
    let space = AddressSpace::new();
    let (uffd, reader, deliveries) = Uffd::open(&space).unwrap();
    let memory = Raw::map(1);
    let driver = log(&space, memory.range()).0;
    let watch = uffd.watch(memory.range()).unwrap();
    let text = memory.range().to_string();
    debug(&uffd, &["Uffd", "Promises", "fork", "discards", "granule", "watched", &text]);
    debug(&uffd.promises(), &["Promises", "fork", "granule"]);
    debug(&watch, &["Watch", &text, "armed: true"]);
    debug(&reader, &["Reader", "Inner", "fd"]);
    debug(&deliveries, &["Deliveries", "Inner"]);
    let mut watching = uffd.prepare_watched(memory.range(), |_| async { Ok::<_, UffdError>(()) });
    debug(&watching(block_on(driver.read_begin())), &["Watching"]);
}

fn display_says_what_happened_and_what_to_do() {
    let not_pages = |part| MapError::NotPages { part, len: 0x3000, page: 0x1000 };
    display(&not_pages(0x10..0x20), &["0x10..0x20", "0x3000 bytes", "0x1000"]);
    display(&not_pages(0x10..0x10), &["0x10..0x10", "no byte", "0x1000"]);
    let beyond = MapError::BeyondEnd { end: 0x3000, size: 0x2000 };
    display(&beyond, &["0x3000", "0x2000", "ftruncate"]);
    display(&MapError::Forked, &["child", "make another one"]);
    display(&MapError::Os(refused()), &["refused", "the disk is full"]);
    display(&MapError::AddressLost(refused()), &["another address", "the disk is full"]);
    display(&UffdError::NotPermitted, &["not permitted", "CAP_SYS_PTRACE"]);
    display(&UffdError::Unsupported, &["Linux 5.7", "OwnedMapping"]);
    let watch = UffdError::Watch { range: range(), os: std::io::ErrorKind::AddrInUse };
    display(&watch, &["0x1000..=0x1fff", "cannot be watched"]);
    display(&UffdError::NoRoom { range: range() }, &["0x1000..=0x1fff", "vm.max_map_count"]);
    display(&UffdError::Closed, &["dropped", "keep both"]);
    display(&UffdError::Forked, &["child", "open another one"]);
    display(&UffdError::Os(std::io::ErrorKind::OutOfMemory), &["refused", "memory"]);
    let closed = UffdError::Closed.to_string();
    display(&Unwatched::<MapError>::Watch(UffdError::Closed), &[&closed]);
    display(&Unwatched::Prepare(MapError::Os(refused())), &["the disk is full"]);
}

/// An error that has a cause.
#[derive(Debug)]
struct Behind(std::io::Error);

impl Display for Behind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the table cannot be filled")
    }
}

impl Error for Behind {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.0)
    }
}

fn source_is_what_lies_behind_the_text() {
    let none: [&dyn Error; 6] = [
        &MapError::Forked,
        &MapError::Os(refused()),
        &MapError::AddressLost(refused()),
        &UffdError::NotPermitted,
        &Unwatched::<MapError>::Watch(UffdError::Closed),
        &Unwatched::Prepare(MapError::Forked),
    ];
    for error in none {
        assert!(error.source().is_none(), "{error}");
    }
    let behind = Unwatched::Prepare(Behind(refused()));
    assert_eq!(behind.source().map(ToString::to_string), Some(refused().to_string()));
}
