//! Kinds of memory, each mapped, filled and watched; and what a change of it raises.

use crate::memory::Raw;
use crate::uffd::no_fork;
use futures::executor::block_on;
use shootdown::source::Uffd;
use shootdown::{
    AddressRange, AddressSpace, Event, IntervalNotifier, Invalidation, PassFuture, WouldBlock,
};
use std::ffi::c_void;
use std::io;
use std::os::fd::RawFd;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

pub const HUGE: usize = 2 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `mmap(MAP_PRIVATE | MAP_ANONYMOUS)`.
    Private,
    /// `mmap(MAP_SHARED | MAP_ANONYMOUS)`.
    SharedAnonymous,
    Memfd,
    /// `MAP_PRIVATE` of a memfd; written to, so that the pages are copies.
    MemfdPrivate,
    Sysv,
    /// `MAP_SHARED` of a file on the disk.
    File,
    /// `MAP_PRIVATE` of a file on the disk; written to.
    FilePrivate,
    /// `mmap(MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB)`.
    Huge,
    /// `MAP_SHARED` of a memfd of huge pages.
    HugeMemfd,
}

/// All but huge pages.
pub const SMALL: [Kind; 7] = [
    Kind::Private,
    Kind::SharedAnonymous,
    Kind::Memfd,
    Kind::MemfdPrivate,
    Kind::Sysv,
    Kind::File,
    Kind::FilePrivate,
];

pub const HUGES: [Kind; 2] = [Kind::Huge, Kind::HugeMemfd];

/// Memory of a kind, full of ones. It is never unmapped, and its descriptor is not closed: the
/// process ends soon.
#[derive(Clone, Copy, Debug)]
pub struct Area {
    pub kind: Kind,
    pub raw: Raw,
    pub fd: RawFd,
}

/// The error of a system call that answers -1.
pub fn check(returned: impl Into<i64>) -> io::Result<()> {
    if returned.into() == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The frame that holds the first page; 0 where the kernel does not say, `None` if none does.
pub fn frame(memory: Raw) -> Option<u64> {
    use std::os::unix::fs::FileExt;
    let mut entry = [0; 8];
    let map = std::fs::File::open("/proc/self/pagemap").unwrap();
    map.read_exact_at(&mut entry, memory.at as u64 / 4096 * 8).unwrap();
    let entry = u64::from_ne_bytes(entry);
    (entry >> 63 == 1).then_some(entry & ((1 << 55) - 1))
}

impl Area {
    pub fn new(kind: Kind) -> Self {
        let area = Self::untouched(kind);
        area.raw.write(1);
        area
    }

    pub fn untouched(kind: Kind) -> Self {
        let (len, shared, private) = (16 * 4096, libc::MAP_SHARED, libc::MAP_PRIVATE);
        let memfd = |flags| {
            // SAFETY: makes a descriptor.
            unsafe { libc::memfd_create(c"kinds".as_ptr(), flags) }
        };
        let (len, flags, fd) = match kind {
            Kind::Private => (len, private | libc::MAP_ANONYMOUS, -1),
            Kind::SharedAnonymous => (len, shared | libc::MAP_ANONYMOUS, -1),
            Kind::Memfd => (len, shared, memfd(0)),
            Kind::MemfdPrivate => (len, private, memfd(0)),
            Kind::File => (len, shared, file()),
            Kind::FilePrivate => (len, private, file()),
            Kind::Huge => (3 * HUGE, private | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB, -1),
            Kind::HugeMemfd => (3 * HUGE, shared, memfd(libc::MFD_HUGETLB)),
            Kind::Sysv => return Self::sysv(len),
        };
        if fd != -1 {
            // SAFETY: its own descriptor.
            check(unsafe { libc::ftruncate(fd, len as i64) }).unwrap();
        }
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping where the kernel chooses.
        let at = unsafe { libc::mmap(ptr::null_mut(), len, rights, flags, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED, "{kind:?}: {}", io::Error::last_os_error());
        Self { kind, raw: Raw { at: at.expose_provenance(), len }, fd }
    }

    fn sysv(len: usize) -> Self {
        let segment = segment(len);
        // SAFETY: a new mapping where the kernel chooses.
        let at = unsafe { libc::shmat(segment, ptr::null(), 0) };
        assert_ne!(at.addr(), usize::MAX, "{}", io::Error::last_os_error());
        // SAFETY: it goes when nobody has it attached.
        unsafe { libc::shmctl(segment, libc::IPC_RMID, ptr::null_mut()) };
        Self { kind: Kind::Sysv, raw: Raw { at: at.expose_provenance(), len }, fd: -1 }
    }

    pub fn ptr(self) -> *mut c_void {
        self.raw.range().as_mut_ptr().cast()
    }

    pub fn range(self) -> AddressRange {
        self.raw.range()
    }
}

/// A new segment of SysV memory.
pub fn segment(len: usize) -> i32 {
    // SAFETY: makes a segment.
    let segment = unsafe { libc::shmget(libc::IPC_PRIVATE, len, libc::IPC_CREAT | 0o600) };
    assert_ne!(segment, -1, "{}", io::Error::last_os_error());
    segment
}

/// A file on the disk, without a name.
fn file() -> RawFd {
    use std::os::fd::IntoRawFd;
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path =
        std::env::temp_dir().join(format!("shootdown-kinds-{}-{number}", std::process::id()));
    let file =
        std::fs::File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    file.into_raw_fd()
}

/// Notes what it is told, and whether the memory was full of ones then.
#[derive(Clone, Default)]
pub struct Log(pub Arc<Mutex<Vec<(Event, AddressRange)>>>);

impl IntervalNotifier for Log {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        self.0
            .lock()
            .unwrap()
            .extend(invalidation.ranges().iter().map(|range| (invalidation.event(), *range)));
        invalidation.set_seq();
        Ok(None)
    }
}

/// What came of a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Silent,
    /// The driver is told, in this order.
    Told(Vec<(Event, AddressRange)>),
    /// The kernel refuses the change for this kind of memory.
    Refused(i32),
    Unwatchable(String),
}

pub type Change = fn(Area) -> io::Result<()>;

/// Watches `range`, makes the change on another thread, and reads until it has been made.
pub fn outcome(range: AddressRange, change: impl FnOnce() -> io::Result<()> + Send) -> Outcome {
    let space = AddressSpace::new();
    let (uffd, mut reader, mut deliveries) = Uffd::open(&space).unwrap();
    let _watch = match uffd.watch(range) {
        Ok(watch) => watch,
        Err(error) => return Outcome::Unwatchable(error.to_string()),
    };
    let log = Log::default();
    let _subscription = space.insert(AddressRange::ALL, log.clone()).unwrap();
    let mut events = 0;
    let made = thread::scope(|scope| {
        let thread = scope.spawn(change);
        while !thread.is_finished() {
            let read = reader.read().unwrap();
            if read > 0 {
                // What comes later is not told of together with it.
                let _ = block_on(deliveries.deliver());
            }
            events += read;
            thread::yield_now();
        }
        thread.join().unwrap()
    });
    events += reader.read().unwrap();
    let _ = block_on(deliveries.deliver());
    let told = std::mem::take(&mut *log.0.lock().unwrap());
    assert_eq!(events == 0, told.is_empty(), "{events} events: {told:?}");
    match (made, told.is_empty()) {
        (Err(error), true) => Outcome::Refused(error.raw_os_error().unwrap()),
        (Ok(()), true) => Outcome::Silent,
        (_, false) => Outcome::Told(told),
    }
}

/// What is in the memory, if it is there, when the event of a change can be read and has not been.
pub fn at_the_event(area: Area, change: Change) -> Option<Vec<u8>> {
    use std::os::fd::AsRawFd;
    let space = AddressSpace::new();
    let (uffd, mut reader, mut deliveries) = Uffd::open(&space).unwrap();
    let _watch = uffd.watch(area.range()).unwrap();
    let look = thread::scope(|scope| {
        let thread = scope.spawn(|| change(area).unwrap());
        let mut fd = libc::pollfd { fd: reader.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: reads and writes one `pollfd`.
        assert_eq!(unsafe { libc::poll(&raw mut fd, 1, 20_000) }, 1, "no event");
        let look = area.raw.look();
        while !thread.is_finished() {
            reader.read().unwrap();
        }
        look
    });
    let _ = block_on(deliveries.deliver());
    look
}

/// Pins that a change raises no event; and that a driver hears of it by hand, before the change.
pub fn silent(kind: Kind, event: Event, change: Change) {
    let _fork = no_fork();
    let area = Area::new(kind);
    assert_eq!(outcome(area.range(), || change(area)), Outcome::Silent, "{kind:?}");

    let (space, log, area) = (AddressSpace::new(), Log::default(), Area::new(kind));
    let driver = space.insert(area.range(), log.clone()).unwrap();
    let before = block_on(driver.read_begin());
    let guard = block_on(space.invalidate(area.range(), event));
    assert_eq!(*log.0.lock().unwrap(), [(event, area.range())]);
    assert!(
        area.raw.look().unwrap().iter().all(|byte| *byte == 1),
        "{kind:?}: it comes before the change"
    );
    change(area).unwrap();
    drop(guard);
    assert!(driver.read_retry(before), "{kind:?}: who looked before the change collides");
}

/// Pins that a change is told as one event of the whole range.
pub fn audible(kind: Kind, event: Event, change: Change) {
    let _fork = no_fork();
    let area = Area::new(kind);
    assert_eq!(
        outcome(area.range(), || change(area)),
        Outcome::Told(vec![(event, area.range())]),
        "{kind:?}"
    );
}

/// Pins that there is no such change of that kind of memory.
pub fn refused(kind: Kind, errno: i32, change: Change) {
    let _fork = no_fork();
    let area = Area::new(kind);
    assert_eq!(outcome(area.range(), || change(area)), Outcome::Refused(errno), "{kind:?}");
}

/// Huge pages for the tests that need them, one at a time and each in a process of its own: what a
/// test has used is free again when its process has ended. They are given back when this is
/// dropped.
pub struct HugePages(String);

/// As many as a test needs.
const NEEDED: u64 = 64;

const RESERVE: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    /// Reserves as many as a test needs, once for the whole run: an answer for now would not hold
    /// later.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn reserve() -> Result<Self, String> {
        let of = |name: &str| -> Option<u64> {
            let memory = std::fs::read_to_string("/proc/meminfo").ok()?;
            memory
                .lines()
                .find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
        };
        if of("Hugepagesize:") != Some(2048) {
            return Err("no huge pages of 2 MiB".into());
        }
        let counts = of("HugePages_Total:").zip(of("HugePages_Free:")).ok_or("no huge pages")?;
        let before =
            std::fs::read_to_string(RESERVE).map_err(|error| format!("no huge pages: {error}"))?;
        let wanted = (counts.0 - counts.1 + NEEDED).max(counts.0).to_string();
        let reserved = Self(before.trim().to_owned());
        for _ in 0..2 {
            std::fs::write(RESERVE, &wanted)
                .map_err(|error| format!("no huge pages are reserved: {error}"))?;
            if of("HugePages_Free:") >= Some(NEEDED) {
                return Ok(reserved);
            }
            // Where memory is in small pieces: whether that may be asked for or not, the next look
            // decides.
            let _ = std::fs::write("/proc/sys/vm/compact_memory", "1");
        }
        Err("the kernel has no room for huge pages".into())
    }

    /// Runs one of the tests that need them.
    pub fn isolated(name: &str) {
        static ONE: Mutex<()> = Mutex::new(());
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        crate::isolated(name);
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(RESERVE, &self.0);
    }
}
