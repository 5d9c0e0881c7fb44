//! A driver of a virtio block device (virtio 1.x on PCI) with one queue. It polls.
#![forbid(unsafe_code)]

use crate::system::{PAGE, Pages, Result};
use crate::vfio::{CONFIG, Device, Group};
use std::sync::atomic::{Ordering::SeqCst, fence};
use std::thread;
use std::time::{Duration, Instant};

const COMMAND: u64 = 4;
/// Memory space, bus master, no INTx.
const COMMAND_BITS: u16 = 1 << 1 | 1 << 2 | 1 << 10;
const CAPABILITIES: u64 = 0x34;
const VENDOR_SPECIFIC: u8 = 9;
const COMMON: u8 = 1;
const NOTIFY: u8 = 2;
const DEVICE: u8 = 4;

/// Registers of the common configuration.
const DEVICE_FEATURE_SELECT: u64 = 0;
const DEVICE_FEATURE: u64 = 4;
const DRIVER_FEATURE_SELECT: u64 = 8;
const DRIVER_FEATURE: u64 = 12;
const DEVICE_STATUS: u64 = 20;
const QUEUE_SELECT: u64 = 22;
const QUEUE_SIZE: u64 = 24;
const QUEUE_ENABLE: u64 = 28;
const QUEUE_NOTIFY_OFF: u64 = 30;
const QUEUE_RINGS: u64 = 32;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
/// `VIRTIO_F_VERSION_1` and `VIRTIO_F_ACCESS_PLATFORM`, in the upper half of the features.
const FEATURES: u32 = 1 << 0 | 1 << 1;

const SIZE: u16 = 16;
/// Offsets in the queue's page: the parts of the queue, and the parts of a request other than data.
const DESCRIPTORS: usize = 0;
const AVAILABLE: usize = 256;
const USED: usize = 512;
const HEADER: usize = 1024;
const STATUS: usize = 1040;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// A status that no device returns.
const NO_STATUS: u8 = 0xff;

/// A place in one of the device's regions.
#[derive(Clone, Copy)]
struct Place {
    region: u32,
    at: u64,
}

/// The device. At most one request is in flight.
pub(crate) struct Block {
    device: Device,
    common: Place,
    notify: Place,
    notify_multiplier: u64,
    /// Size of the disk in bytes.
    bytes: u64,
    doorbell: Place,
    queue: Pages,
    iova: u64,
    begun: u16,
}

impl Block {
    /// Opens the device at the address on the bus. The page of its queue is at `iova`.
    /// [Start](Self::start) it next.
    pub(crate) fn new(group: &Group, address: &str, iova: u64) -> Result<Self> {
        let device = group.device(address)?;
        let command = u16::from_le_bytes(device.read(CONFIG, COMMAND)?) | COMMAND_BITS;
        device.write(CONFIG, COMMAND, command.to_le_bytes())?;
        let mut places = [None; 5];
        let mut notify_multiplier = 0;
        let [mut at] = device.read(CONFIG, CAPABILITIES)?;
        while at != 0 {
            let here = u64::from(at);
            let [kind, next, _, which] = device.read(CONFIG, here)?;
            if kind == VENDOR_SPECIFIC && usize::from(which) < places.len() {
                let ([bar], offset) = (
                    device.read(CONFIG, here + 4)?,
                    u32::from_le_bytes(device.read(CONFIG, here + 8)?),
                );
                places[usize::from(which)] = Some(Place { region: bar.into(), at: offset.into() });
                if which == NOTIFY {
                    notify_multiplier = u32::from_le_bytes(device.read(CONFIG, here + 16)?).into();
                }
            }
            at = next;
        }
        let place = |which: u8| {
            places[usize::from(which)].ok_or(format!("capability {which} of virtio is missing"))
        };
        let (common, notify, configuration) = (place(COMMON)?, place(NOTIFY)?, place(DEVICE)?);
        let sectors = u64::from_le_bytes(device.read(configuration.region, configuration.at)?);
        let queue = Pages::new(PAGE)?;
        group.map(&queue, iova)?;
        let bytes = sectors * 512;
        Ok(Self {
            device,
            common,
            notify,
            notify_multiplier,
            bytes,
            doorbell: notify,
            queue,
            iova,
            begun: 0,
        })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    fn get<const N: usize>(&self, register: u64) -> Result<[u8; N]> {
        self.device.read(self.common.region, self.common.at + register)
    }

    fn set<const N: usize>(&self, register: u64, value: [u8; N]) -> Result<()> {
        self.device.write(self.common.region, self.common.at + register, value)
    }

    /// Resets the device and starts with an empty queue.
    pub(crate) fn start(&mut self) -> Result<()> {
        self.set(DEVICE_STATUS, [0])?;
        while self.get(DEVICE_STATUS)? != [0] {
            thread::yield_now();
        }
        self.set(DEVICE_STATUS, [ACKNOWLEDGE | DRIVER])?;
        self.set(DEVICE_FEATURE_SELECT, 1_u32.to_le_bytes())?;
        let offered = u32::from_le_bytes(self.get(DEVICE_FEATURE)?);
        if offered & FEATURES != FEATURES {
            return Err(format!("the device offers no IOMMU: {offered:#x}").into());
        }
        for (half, features) in [(0_u32, 0), (1, FEATURES)] {
            self.set(DRIVER_FEATURE_SELECT, half.to_le_bytes())?;
            self.set(DRIVER_FEATURE, features.to_le_bytes())?;
        }
        self.set(DEVICE_STATUS, [ACKNOWLEDGE | DRIVER | FEATURES_OK])?;
        let [status] = self.get(DEVICE_STATUS)?;
        if status & FEATURES_OK == 0 {
            return Err("the device does not take the features".into());
        }
        (0..PAGE).step_by(8).for_each(|offset| self.queue.write(offset, 0_u64));
        // No interrupts: this driver polls.
        self.queue.write(AVAILABLE, 1_u16);
        self.begun = 0;
        self.set(QUEUE_SELECT, 0_u16.to_le_bytes())?;
        self.set(QUEUE_SIZE, SIZE.to_le_bytes())?;
        for (register, part) in (QUEUE_RINGS..).step_by(8).zip([DESCRIPTORS, AVAILABLE, USED]) {
            let address = self.iova + part as u64;
            // In two halves: the device need not accept eight bytes at once.
            self.set(register, (address as u32).to_le_bytes())?;
            self.set(register + 4, ((address >> 32) as u32).to_le_bytes())?;
        }
        let offset =
            u64::from(u16::from_le_bytes(self.get(QUEUE_NOTIFY_OFF)?)) * self.notify_multiplier;
        self.doorbell = Place { at: self.notify.at + offset, ..self.notify };
        self.set(QUEUE_ENABLE, 1_u16.to_le_bytes())?;
        self.set(DEVICE_STATUS, [ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK])
    }

    /// Begins to read `bytes` bytes from the byte `offset` of the disk into the memory at `iova`.
    pub(crate) fn begin(&mut self, offset: u64, iova: u64, bytes: usize) -> Result<()> {
        let descriptor = |index: usize, address: u64, bytes: usize, flags: u16| {
            let at = DESCRIPTORS + index * 16;
            self.queue.write(at, address);
            self.queue.write(at + 8, bytes as u32);
            self.queue.write(at + 12, flags);
            self.queue.write(at + 14, if flags & NEXT == 0 { 0 } else { index as u16 + 1 });
        };
        descriptor(0, self.iova + HEADER as u64, 16, NEXT);
        descriptor(1, iova, bytes, NEXT | WRITE);
        descriptor(2, self.iova + STATUS as u64, 1, WRITE);
        // Kind 0 of a request is a read.
        self.queue.write(HEADER, 0_u64);
        self.queue.write(HEADER + 8, offset / 512);
        self.queue.write(STATUS, NO_STATUS);
        self.queue.write(AVAILABLE + 4 + usize::from(self.begun % SIZE) * 2, 0_u16);
        fence(SeqCst);
        self.begun = self.begun.wrapping_add(1);
        self.queue.write(AVAILABLE + 2, self.begun);
        fence(SeqCst);
        self.device.write(self.doorbell.region, self.doorbell.at, 0_u16.to_le_bytes())
    }

    /// Returns `true` if the device has returned the request.
    pub(crate) fn ended(&self) -> bool {
        fence(SeqCst);
        self.queue.read::<u16>(USED + 2) == self.begun
    }

    /// Waits until the device has returned the request, at most for `patience`. Returns its status
    /// (0 is success), or an error if the request has not come back.
    pub(crate) fn finish(&self, patience: Duration) -> Result<u8> {
        let begun = Instant::now();
        while !self.ended() {
            if begun.elapsed() > patience {
                return Err(format!("a read has not come back within {patience:?}").into());
            }
            thread::sleep(Duration::from_micros(100));
        }
        Ok(self.queue.read(STATUS))
    }
}
