//! What the first process of a system has to do, and the few system calls that the standard library
//! lacks.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::str::FromStr;

pub(crate) type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;

/// Mounts what the kernel shows of itself, and makes the console this process's streams.
pub(crate) fn mount_all() -> Result<()> {
    for (kind, target) in [(c"proc", c"/proc"), (c"sysfs", c"/sys"), (c"devtmpfs", c"/dev")] {
        fs::create_dir_all(target.to_str()?)?;
        mount(kind, target)?;
    }
    let console = OpenOptions::new().read(true).write(true).open("/dev/console")?;
    for stream in 0..3 {
        // SAFETY: changes which file a descriptor means; no memory is concerned.
        check(unsafe { libc::dup2(console.as_raw_fd(), stream) })?;
    }
    Ok(())
}

fn mount(kind: &CStr, target: &CStr) -> io::Result<()> {
    // SAFETY: all strings end in a zero, and this kind of file system takes no data.
    check(unsafe {
        libc::mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null())
    })
    .map(drop)
}

/// Loads the modules that `/modules/LIST` names, in its order. `LIST` has the parameters, too.
pub(crate) fn load_modules(list: &str) -> Result<()> {
    let lines = fs::read_to_string(format!("/modules/{list}"))?;
    for line in lines.lines() {
        let (name, parameters) = line.split_once(' ').unwrap_or((line, ""));
        let file = File::open(format!("/modules/{name}.ko"))
            .map_err(|error| format!("{name}: {error}"))?;
        let parameters = CString::new(parameters)?;
        // SAFETY: the kernel reads the file and a string that ends in a zero.
        let loaded = unsafe {
            libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), parameters.as_ptr(), 0)
        };
        match check(loaded as i32) {
            Err(error) if error.raw_os_error() != Some(libc::EEXIST) => {
                return Err(format!("module {name}: {error}").into());
            }
            _ => {}
        }
    }
    Ok(())
}

/// What the kernel's command line says of the form `guest.NAME=VALUE`.
pub(crate) struct Options(HashMap<String, String>);

impl Options {
    pub(crate) fn read() -> Result<Self> {
        let line = fs::read_to_string("/proc/cmdline")?;
        let options =
            line.split_whitespace().filter_map(|word| word.strip_prefix("guest.")?.split_once('='));
        Ok(Self(options.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()))
    }

    /// The option's value, or the one that is meant where it does not stand.
    pub(crate) fn get<T: FromStr>(&self, name: &str, default: T) -> Result<T> {
        match self.0.get(name) {
            None => Ok(default),
            Some(value) => {
                value.parse().map_err(|_| format!("guest.{name}={value} is not understood").into())
            }
        }
    }
}

/// Prints one result, a JSON object, with one call: lines of the kernel do not come between.
pub(crate) fn report(object: &str) {
    let mut out = io::stdout().lock();
    // Nobody is left to be told that the console is gone.
    let _ = out.write_all(format!("GUEST {object}\n").as_bytes()).and_then(|()| out.flush());
}

/// The end of the guest.
pub(crate) fn power_off() -> ! {
    // SAFETY: both calls concern no memory of this process.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
    // The monitor ends when the last line has come, should the system not.
    loop {
        std::thread::park();
    }
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// An `ioctl` whose argument is a structure, which the kernel may write to.
///
/// # Safety
/// `T` is what `request` takes, and what its addresses name is memory of this process that may be
/// used so.
pub(crate) unsafe fn ioctl<T>(file: RawFd, request: u64, argument: &mut T) -> io::Result<i32> {
    // SAFETY: the caller's obligations are passed on.
    check(unsafe { libc::ioctl(file, request as libc::Ioctl, std::ptr::from_mut(argument)) })
}

/// An `ioctl` whose argument is a number, or is not looked at.
pub(crate) fn ioctl_number(file: RawFd, request: u64, argument: u64) -> io::Result<i32> {
    // SAFETY: the kernel takes the argument of the requests of this program that come here for a
    // number.
    check(unsafe { libc::ioctl(file, request as libc::Ioctl, argument) })
}

/// Pages of this process, zeroed, page by page (never a huge one).
///
/// Devices write to them, so they are looked at word by word and never as a slice.
pub(crate) struct Pages {
    start: NonNull<u64>,
    bytes: usize,
}

// SAFETY: the pages belong to no thread.
unsafe impl Send for Pages {}

impl Pages {
    /// `bytes` is a multiple of the page's.
    pub(crate) fn new(bytes: usize) -> io::Result<Self> {
        assert!(bytes > 0 && bytes.is_multiple_of(PAGE));
        let (access, kind) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: new memory, at a place of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, kind, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: these are the pages of just now.
        check(unsafe { libc::madvise(start, bytes, libc::MADV_NOHUGEPAGE) })?;
        Ok(Self { start: NonNull::new(start.cast()).expect("a mapping is not at zero"), bytes })
    }

    pub(crate) fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// A pointer to the `T` at the byte `offset`.
    fn at<T>(&self, offset: usize) -> *mut T {
        assert!(offset + size_of::<T>() <= self.bytes && offset.is_multiple_of(align_of::<T>()));
        // SAFETY: just checked to be inside the pages.
        unsafe { self.start.as_ptr().byte_add(offset).cast() }
    }

    /// `T` is a plain number.
    pub(crate) fn read<T: Copy>(&self, offset: usize) -> T {
        // SAFETY: inside the pages, aligned, and every pattern of bits is a number.
        unsafe { self.at::<T>(offset).read_volatile() }
    }

    pub(crate) fn write<T: Copy>(&self, offset: usize, value: T) {
        // SAFETY: inside the pages and aligned.
        unsafe { self.at::<T>(offset).write_volatile(value) }
    }

    /// Words that no disk has, each at its place.
    pub(crate) fn fill_own(&self) {
        (0..self.bytes / 8).for_each(|index| self.write(index * 8, own(index)));
    }

    /// How many words are not those of [`fill_own`](Self::fill_own).
    pub(crate) fn foreign(&self) -> u64 {
        (0..self.bytes / 8).filter(|index| self.read::<u64>(index * 8) != own(*index)).count()
            as u64
    }

    /// A copy of what is there now.
    pub(crate) fn copy(&self) -> Vec<u8> {
        (0..self.bytes / 8).flat_map(|index| self.read::<u64>(index * 8).to_le_bytes()).collect()
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the pages of `new`, to which no reference is left.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

fn own(index: usize) -> u64 {
    0xa5a5 << 48 | index as u64
}

/// Memory for direct I/O of up to `bytes` bytes.
pub(crate) struct Buffer(Vec<Page>);

#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

impl Buffer {
    pub(crate) fn new(bytes: usize) -> Self {
        Self(vec![Page([0; PAGE]); bytes.div_ceil(PAGE)])
    }

    pub(crate) fn bytes(&mut self, length: usize) -> &mut [u8] {
        assert!(length <= self.0.len() * PAGE);
        // SAFETY: the pages are next to each other and are bytes.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), length) }
    }
}

/// A file's text without the white space around it.
pub(crate) fn text(path: &str) -> Result<String> {
    let mut text = String::new();
    File::open(path)
        .and_then(|mut file| file.read_to_string(&mut text))
        .map_err(|error| format!("{path}: {error}"))?;
    Ok(text.trim().to_owned())
}

/// Writes to a file of the kernel's with one call.
pub(crate) fn tell(path: &str, text: &str) -> Result<()> {
    let file = OpenOptions::new().write(true).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(|error| format!("{path}: {error}").into())
}
