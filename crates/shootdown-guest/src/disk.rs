//! The job `disk`: several threads write every disk and read it back, with direct I/O, in blocks of
//! random sizes.

use crate::pattern;
use crate::system::{self, Buffer, Options, PAGE, Result, ioctl};
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::Instant;

/// Largest block in bytes.
const LARGEST: usize = 256 << 10;
/// Number of bytes discarded in the middle of a disk.
const DISCARDED: u64 = 1 << 20;
/// `_IO(0x12, 119)`: discards a range; the argument is two numbers of bytes.
const BLKDISCARD: u64 = 0x1277;

/// Returns the disks of the guest in the order of their names.
pub(crate) fn disks() -> Result<Vec<String>> {
    let names = fs::read_dir("/sys/block")?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names = names.collect::<Result<Vec<String>>>()?;
    names.retain(|name| name.starts_with("vd"));
    names.sort();
    if names.is_empty() { Err("there is no disk".into()) } else { Ok(names) }
}

/// Opens a disk for direct I/O.
pub(crate) fn open(name: &str) -> Result<File> {
    Ok(OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(format!("/dev/{name}"))?)
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let (mib, seed, threads) =
        (options.get("mib", 64)?, options.get("seed", 1)?, options.get("threads", 4)?);
    let disks = disks()?;
    let results: Vec<Result<()>> = thread::scope(|scope| {
        let job = |disk, name| move || Disk::open(disk, name, mib << 20, seed, threads)?.run();
        let running: Vec<_> =
            disks.iter().enumerate().map(|(disk, name)| scope.spawn(job(disk, name))).collect();
        running
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err("a thread has panicked".into())))
            .collect()
    });
    results.into_iter().collect()
}

struct Disk {
    index: usize,
    name: String,
    file: File,
    bytes: u64,
    seed: u16,
    threads: usize,
}

impl Disk {
    fn open(index: usize, name: &str, bytes: u64, seed: u16, threads: usize) -> Result<Self> {
        let sectors: u64 = system::text(&format!("/sys/block/{name}/size"))?.parse()?;
        if sectors * 512 < bytes {
            return Err(
                format!("{name} has {} bytes, which is less than {bytes}", sectors * 512).into()
            );
        }
        Ok(Self { index, name: name.to_owned(), file: open(name)?, bytes, seed, threads })
    }

    fn run(&self) -> Result<()> {
        let begun = Instant::now();
        self.write(&self.blocks(0, self.bytes, 1))?;
        let (discard, after_discard) = self.discard()?;
        let (wrong, sum) = self.read(&self.blocks(0, self.bytes, 2))?;
        let queues = fs::read_dir(format!("/sys/block/{}/mq", self.name))?.count();
        system::report(&format!(
            r#"{{"job":"disk","disk":{},"bytes":{},"wrong":{wrong},"sum":"{sum:016x}","discard":{discard},"after_discard":"{after_discard}","queues":{queues},"ms":{}}}"#,
            self.index,
            self.bytes,
            begun.elapsed().as_millis()
        ));
        Ok(())
    }

    /// Returns the blocks of a range, of 4 KiB to 256 KiB, in a random order that depends on
    /// `round`.
    fn blocks(&self, start: u64, bytes: u64, round: u64) -> Vec<(u64, usize)> {
        let mut state = u64::from(self.seed) << 32 | (self.index as u64) << 16 | round;
        let mut below = |limit: usize| {
            state = state.wrapping_add(1);
            (pattern::mix(state) % limit as u64) as usize
        };
        let (mut blocks, mut offset) = (Vec::new(), start);
        while offset < start + bytes {
            // Small and large blocks are equally frequent: a power of two, and some pages.
            let pages = (1 << below(7)) - 1 + below(2);
            let length =
                (pages.clamp(1, LARGEST / PAGE) * PAGE).min((start + bytes - offset) as usize);
            blocks.push((offset, length));
            offset += length as u64;
        }
        (1..blocks.len()).rev().for_each(|last| blocks.swap(last, below(last + 1)));
        blocks
    }

    /// Lets several threads take one block after the other.
    fn each(
        &self,
        blocks: &[(u64, usize)],
        work: impl Fn(&mut [u8], u64, usize) -> Result<()> + Sync,
    ) -> Result<()> {
        let next = AtomicUsize::new(0);
        let worker = || -> Result<()> {
            let mut buffer = Buffer::new(LARGEST);
            loop {
                let turn = next.fetch_add(1, Relaxed);
                let Some((offset, length)) = blocks.get(turn).copied() else { return Ok(()) };
                work(buffer.bytes(length), offset, turn)
                    .map_err(|error| format!("disk {} at {offset}: {error}", self.index))?;
            }
        };
        thread::scope(|scope| {
            let running: Vec<_> = (0..self.threads).map(|_| scope.spawn(worker)).collect();
            running.into_iter().try_for_each(|thread| {
                thread.join().unwrap_or_else(|_| Err("a thread has panicked".into()))
            })
        })
    }

    /// Writes the blocks, and flushes from time to time.
    fn write(&self, blocks: &[(u64, usize)]) -> Result<()> {
        self.each(blocks, |bytes, offset, turn| {
            pattern::fill(bytes, self.seed, self.index, offset);
            self.file.write_all_at(bytes, offset)?;
            if turn == 64 {
                // From here on a request is always in flight.
                system::report(&format!(r#"{{"begun":{}}}"#, self.index));
            }
            if turn % 64 == 63 { Ok(self.file.sync_data()?) } else { Ok(()) }
        })?;
        Ok(self.file.sync_all()?)
    }

    /// Reads the blocks. Returns how many words are wrong, and the sum of all.
    fn read(&self, blocks: &[(u64, usize)]) -> Result<(u64, u64)> {
        let (wrong, sum) = (AtomicU64::new(0), AtomicU64::new(0));
        self.each(blocks, |bytes, offset, _| {
            bytes.fill(0xee);
            self.file.read_exact_at(bytes, offset)?;
            wrong.fetch_add(pattern::wrong(bytes, self.seed, self.index, offset), Relaxed);
            sum.fetch_add(pattern::sum(bytes, offset), Relaxed);
            Ok(())
        })?;
        Ok((wrong.into_inner(), sum.into_inner()))
    }

    /// Discards a part, checks its contents, and writes it again. Returns whether the device
    /// supports it, and what was found.
    fn discard(&self) -> Result<(bool, &'static str)> {
        let most: u64 =
            system::text(&format!("/sys/block/{}/queue/discard_max_bytes", self.name))?.parse()?;
        if most == 0 || self.bytes < 4 * DISCARDED {
            return Ok((false, "not done"));
        }
        let start = self.bytes / 2;
        let mut range = [start, DISCARDED];
        // SAFETY: this request takes two numbers.
        unsafe { ioctl(self.file.as_raw_fd(), BLKDISCARD, &mut range) }
            .map_err(|error| format!("discard: {error}"))?;
        let mut buffer = Buffer::new(DISCARDED as usize);
        let bytes = buffer.bytes(DISCARDED as usize);
        self.file.read_exact_at(bytes, start)?;
        let found = if bytes.iter().all(|byte| *byte == 0) {
            "zeros"
        } else if pattern::wrong(bytes, self.seed, self.index, start) == 0 {
            "kept"
        } else {
            "something else"
        };
        self.write(&self.blocks(start, DISCARDED, 3))?;
        Ok((true, found))
    }
}
