//! The job `speed`: random direct reads at a constant queue depth, through io_uring.

use crate::disk::{disks, open};
use crate::pattern;
use crate::system::{self, Buffer, Options, Result};
use io_uring::{IoUring, opcode, types};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

pub(crate) fn run(options: &Options) -> Result<()> {
    let time = Duration::from_millis(options.get("ms", 500)?);
    for (disk, name) in disks()?.iter().enumerate() {
        let file = open(name)?;
        let sectors: u64 = system::text(&format!("/sys/block/{name}/size"))?.parse()?;
        for block in [4 << 10, 64 << 10] {
            for depth in [1, 32] {
                // A warm-up for translations and caches.
                reads(&file, sectors * 512, block, depth, time / 10)?;
                let (count, took) = reads(&file, sectors * 512, block, depth, time)?;
                let seconds = took.as_secs_f64();
                system::report(&format!(
                    r#"{{"job":"speed","disk":{disk},"block":{block},"depth":{depth},"reads":{count},"iops":{:.0},"us":{:.1}}}"#,
                    count as f64 / seconds,
                    seconds * 1e6 * f64::from(depth) / count as f64
                ));
            }
        }
    }
    Ok(())
}

/// Reads for `time`. Returns the number of reads and the time that they took.
fn reads(
    file: &File,
    bytes: u64,
    block: usize,
    depth: u32,
    time: Duration,
) -> Result<(u64, Duration)> {
    // An error ends the guest and may leave reads in flight, so their memory is never freed.
    let buffers: &mut Vec<Buffer> =
        Box::leak(Box::new((0..depth).map(|_| Buffer::new(block)).collect()));
    let mut ring = IoUring::new(depth)?;
    let (mut begun, mut ended) = (0_u64, 0_u64);
    let start = Instant::now();
    let mut idle: Vec<u64> = (0..u64::from(depth)).collect();
    while ended < begun || start.elapsed() < time {
        let more = start.elapsed() < time;
        for slot in idle.drain(..).filter(|_| more) {
            let offset = pattern::mix(begun) % (bytes / block as u64) * block as u64;
            let memory = buffers[slot as usize].bytes(block).as_mut_ptr();
            let read =
                opcode::Read::new(types::Fd(file.as_raw_fd()), memory, block as u32).offset(offset);
            // SAFETY: the buffer lives for ever, and the slot's next read begins after this one has
            // ended.
            unsafe { ring.submission().push(&read.build().user_data(slot)) }?;
            begun += 1;
        }
        if ended == begun {
            break;
        }
        ring.submit_and_wait(1)?;
        for done in ring.completion() {
            if done.result() != block as i32 {
                return Err(format!("a read has returned {}", done.result()).into());
            }
            ended += 1;
            idle.push(done.user_data());
        }
    }
    Ok((ended, start.elapsed()))
}
