//! The jobs `vfio` and `vfio-pair`: memory is unmapped while a device reads into it, and is then
//! used for something else.
#![forbid(unsafe_code)]

use crate::pattern;
use crate::pci;
use crate::system::{Options, PAGE, Pages, Result, report};
use crate::vfio::Group;
use crate::virtio::Block;
use std::thread;
use std::time::{Duration, Instant};

/// I/O virtual address of the pages of the devices' queues, one after the other.
pub(crate) const QUEUES: u64 = 0x10_0000;
/// I/O virtual address of the data.
pub(crate) const DATA: u64 = 0x4000_0000;
/// I/O virtual address of a page that no read uses.
const APART: u64 = 0x8000_0000;
/// Longest time of a read.
pub(crate) const PATIENCE: Duration = Duration::from_secs(3);

/// Settings of all jobs with VFIO.
pub(crate) struct Reads {
    pub(crate) rounds: u64,
    /// Number of bytes that each device reads at once.
    pub(crate) bytes: usize,
    pub(crate) seed: u16,
    /// Time from the doorbell to the unmap. The device has the request by then.
    pub(crate) delay: Duration,
    /// Time after the request has come back and before memory is checked.
    pub(crate) settle: Duration,
}

impl Reads {
    pub(crate) fn new(options: &Options) -> Result<Self> {
        Ok(Self {
            rounds: options.get("rounds", 3)?,
            bytes: options.get("kib", 64)? << 10,
            seed: options.get("seed", 1)?,
            delay: Duration::from_millis(options.get("delay_ms", 20)?),
            settle: Duration::from_millis(options.get("settle_ms", 0)?),
        })
    }
}

/// Gives the first devices to VFIO. Returns their addresses and their group.
pub(crate) fn bind(count: usize) -> Result<(Vec<String>, u32)> {
    let mut addresses = pci::block_devices()?;
    if addresses.len() < count {
        return Err(format!("there are {} devices, not {count}", addresses.len()).into());
    }
    // Unused devices of the group must belong to VFIO as well.
    let groups = addresses
        .iter()
        .take(count)
        .map(|address| pci::give_to_vfio(address))
        .collect::<Result<Vec<u32>>>()?;
    addresses.truncate(count);
    match groups.iter().all(|group| *group == groups[0]) {
        true => Ok((addresses, groups[0])),
        false => Err(format!("the devices are not in one group: {groups:?}").into()),
    }
}

/// Returns where in the disk the read of a round begins: another place each time.
pub(crate) fn place(round: u64, device: &Block, bytes: usize) -> u64 {
    round * bytes as u64 % (device.bytes() - bytes as u64 + 1) / PAGE as u64 * PAGE as u64
}

/// Runs the job with `count` devices of one group.
pub(crate) fn run(options: &Options, count: usize) -> Result<()> {
    let reads = Reads::new(options)?;
    let (addresses, number) = bind(count)?;
    let group = Group::open(number)?;
    let device = |(index, address): (u64, &String)| {
        Block::new(&group, address, QUEUES + index * PAGE as u64)
    };
    let mut devices = (0..).zip(&addresses).map(device).collect::<Result<Vec<_>>>()?;
    for round in 0..reads.rounds {
        // One range: each device has a part of it, and one call unmaps all of it.
        let data = Pages::new(reads.bytes * count)?;
        group.map(&data, DATA)?;
        let apart = Pages::new(PAGE)?;
        group.map(&apart, APART)?;
        for device in &mut devices {
            device.start()?;
        }
        // One read runs to its end: its data are right, and it shows how long a read takes.
        data.fill_own();
        let begun = Instant::now();
        begin(&mut devices, &reads, 3 * round)?;
        let before = finish(&devices)?;
        let read = begun.elapsed();
        let wrong_before = wrong(&data, &devices, &reads, 3 * round);
        // One read is still in flight when its memory is unmapped.
        data.fill_own();
        let begun = Instant::now();
        begin(&mut devices, &reads, 3 * round + 1)?;
        thread::sleep(reads.delay);
        let early = devices.iter().filter(|device| device.ended()).count();
        // No request in flight meets this one.
        let unmap_apart = group.unmap(APART, apart.bytes())?;
        let unmap = group.unmap(DATA, data.bytes())?;
        let held = begun.elapsed();
        // The memory belongs to the program again, which uses it for something else.
        data.fill_own();
        let later = finish(&devices)?;
        thread::sleep(reads.settle);
        // Other pages at the same address. The device was not reset, so it must ask for them.
        let other = Pages::new(reads.bytes * count)?;
        other.fill_own();
        group.map(&other, DATA)?;
        begin(&mut devices, &reads, 3 * round + 2)?;
        let statuses = [before, finish(&devices)?].concat();
        let wrong = wrong_before + wrong(&other, &devices, &reads, 3 * round + 2);
        let foreign = data.foreign();
        report(&format!(
            r#"{{"job":"vfio","round":{round},"devices":{count},"statuses":{statuses:?},"wrong":{wrong},"read_us":{},"ended_before":{early},"apart_us":{},"unmap_us":{},"held_us":{},"statuses_later":{later:?},"foreign":{foreign}}}"#,
            read.as_micros(),
            unmap_apart.as_micros(),
            unmap.as_micros(),
            held.as_micros(),
        ));
        group.unmap(DATA, other.bytes())?;
    }
    Ok(())
}

/// Begins one read on each device.
fn begin(devices: &mut [Block], reads: &Reads, round: u64) -> Result<()> {
    for (index, device) in devices.iter_mut().enumerate() {
        let (offset, part) = (place(round, device, reads.bytes), index * reads.bytes);
        device.begin(offset, DATA + part as u64, reads.bytes)?;
    }
    Ok(())
}

fn finish(devices: &[Block]) -> Result<Vec<u8>> {
    devices.iter().map(|device| device.finish(PATIENCE)).collect()
}

/// Returns how many words of all reads differ from those of the disks.
fn wrong(data: &Pages, devices: &[Block], reads: &Reads, round: u64) -> u64 {
    let found = data.copy();
    let parts = found.chunks_exact(reads.bytes).zip(devices).enumerate();
    parts
        .map(|(disk, (bytes, device))| {
            pattern::wrong(bytes, reads.seed, disk, place(round, device, reads.bytes))
        })
        .sum()
}
