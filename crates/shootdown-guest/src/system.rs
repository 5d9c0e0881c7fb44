//! Work of the first process of a system, and the few system calls that the standard library lacks.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::str::FromStr;

pub(crate) type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Page size in bytes.
pub(crate) const PAGE: usize = 4096;

/// Mounts the kernel's own file systems, and makes the console this process's standard streams.
pub(crate) fn mount_all() -> Result<()> {
    for (kind, target) in [(c"proc", c"/proc"), (c"sysfs", c"/sys"), (c"devtmpfs", c"/dev")] {
        fs::create_dir_all(target.to_str()?)?;
        mount(kind, target)?;
    }
    let console = OpenOptions::new().read(true).write(true).open("/dev/console")?;
    for stream in 0..3 {
        // SAFETY: changes which file a descriptor refers to; no memory is involved.
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

/// Loads the modules that `/modules/LIST` names, in its order. `LIST` also has the parameters.
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

/// Options on the kernel's command line, of the form `guest.NAME=VALUE`.
pub(crate) struct Options(HashMap<String, String>);

impl Options {
    pub(crate) fn read() -> Result<Self> {
        let line = fs::read_to_string("/proc/cmdline")?;
        let options =
            line.split_whitespace().filter_map(|word| word.strip_prefix("guest.")?.split_once('='));
        Ok(Self(options.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()))
    }

    /// Returns the value of an option, or `default` if it is missing.
    pub(crate) fn get<T: FromStr>(&self, name: &str, default: T) -> Result<T> {
        match self.0.get(name) {
            None => Ok(default),
            Some(value) => {
                value.parse().map_err(|_| format!("guest.{name}={value} is not understood").into())
            }
        }
    }
}

/// Prints one result, a JSON object, with one call, so that no line of the kernel splits it.
pub(crate) fn report(object: &str) {
    let mut out = io::stdout().lock();
    // If the console is gone, there is nowhere to report it.
    let _ = out.write_all(format!("GUEST {object}\n").as_bytes()).and_then(|()| out.flush());
}

/// Powers the guest off.
pub(crate) fn power_off() -> ! {
    // SAFETY: neither call involves memory of this process.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
    // If the system does not power off, the monitor ends after the last line.
    loop {
        std::thread::park();
    }
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Makes an `ioctl` whose argument is a structure, which the kernel may write to.
///
/// # Safety
/// `T` is the argument type of `request`, and its addresses refer to memory of this process that
/// may be used in this way.
pub(crate) unsafe fn ioctl<T>(file: RawFd, request: u64, argument: &mut T) -> io::Result<i32> {
    // SAFETY: the caller's obligations are passed on.
    check(unsafe { libc::ioctl(file, request as libc::Ioctl, std::ptr::from_mut(argument)) })
}

/// Makes an `ioctl` whose argument is a number, or is ignored.
pub(crate) fn ioctl_number(file: RawFd, request: u64, argument: u64) -> io::Result<i32> {
    // SAFETY: the requests of this program that come here take a number.
    check(unsafe { libc::ioctl(file, request as libc::Ioctl, argument) })
}

/// Zeroed pages of this process, page by page (never a huge one).
///
/// Devices write to them, so they are accessed word by word and never as a slice.
pub(crate) struct Pages {
    start: NonNull<u64>,
    bytes: usize,
}

// SAFETY: the pages belong to no thread.
unsafe impl Send for Pages {}

impl Pages {
    /// Maps `bytes` bytes, a multiple of the page size.
    pub(crate) fn new(bytes: usize) -> io::Result<Self> {
        assert!(bytes > 0 && bytes.is_multiple_of(PAGE));
        let (access, kind) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: new memory where the kernel chooses.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, kind, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the pages that were just mapped.
        check(unsafe { libc::madvise(start, bytes, libc::MADV_NOHUGEPAGE) })?;
        Ok(Self { start: NonNull::new(start.cast()).expect("a mapping is not at zero"), bytes })
    }

    pub(crate) fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns a pointer to the `T` at the byte `offset`.
    fn at<T>(&self, offset: usize) -> *mut T {
        assert!(offset + size_of::<T>() <= self.bytes && offset.is_multiple_of(align_of::<T>()));
        // SAFETY: just checked to be inside the pages.
        unsafe { self.start.as_ptr().byte_add(offset).cast() }
    }

    /// Reads a `T`, which is a plain number.
    pub(crate) fn read<T: Copy>(&self, offset: usize) -> T {
        // SAFETY: inside the pages, aligned, and every pattern of bits is a number.
        unsafe { self.at::<T>(offset).read_volatile() }
    }

    pub(crate) fn write<T: Copy>(&self, offset: usize, value: T) {
        // SAFETY: inside the pages and aligned.
        unsafe { self.at::<T>(offset).write_volatile(value) }
    }

    /// Fills the pages with words that no disk has, each at its place.
    pub(crate) fn fill_own(&self) {
        (0..self.bytes / 8).for_each(|index| self.write(index * 8, own(index)));
    }

    /// Returns how many words differ from those of [`fill_own`](Self::fill_own).
    pub(crate) fn foreign(&self) -> u64 {
        (0..self.bytes / 8).filter(|index| self.read::<u64>(index * 8) != own(*index)).count()
            as u64
    }

    /// Returns a copy of the current contents.
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

/// Memory for direct I/O of a given number of bytes.
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

/// Returns the text of a file without surrounding white space.
pub(crate) fn text(path: &str) -> Result<String> {
    let mut text = String::new();
    File::open(path)
        .and_then(|mut file| file.read_to_string(&mut text))
        .map_err(|error| format!("{path}: {error}"))?;
    Ok(text.trim().to_owned())
}

/// Writes to a file of the kernel with one call.
pub(crate) fn tell(path: &str, text: &str) -> Result<()> {
    let file = OpenOptions::new().write(true).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(|error| format!("{path}: {error}").into())
}
