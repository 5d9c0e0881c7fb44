//! An IOMMU group, the memory that its devices reach, and the devices' registers, through VFIO.

use crate::system::{Pages, Result, ioctl, ioctl_number};
use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// The requests of `linux/vfio.h`: `_IO(';', 100 + n)`.
const fn request(n: u64) -> u64 {
    (b';' as u64) << 8 | (100 + n)
}
const GET_API_VERSION: u64 = request(0);
const SET_IOMMU: u64 = request(2);
const GROUP_GET_STATUS: u64 = request(3);
const GROUP_SET_CONTAINER: u64 = request(4);
const GROUP_GET_DEVICE_FD: u64 = request(6);
const DEVICE_GET_REGION_INFO: u64 = request(8);
const IOMMU_MAP_DMA: u64 = request(13);
const IOMMU_UNMAP_DMA: u64 = request(14);

const TYPE1V2_IOMMU: u64 = 3;
const GROUP_VIABLE: u32 = 1;
const MAP_READ_AND_WRITE: u32 = 3;
/// Number of the configuration space's region. The BARs have the numbers 0 to 5.
pub(crate) const CONFIG: u32 = 7;

#[repr(C)]
struct Status {
    size: u32,
    flags: u32,
}

#[repr(C)]
struct Region {
    size: u32,
    flags: u32,
    index: u32,
    capabilities: u32,
    bytes: u64,
    offset: u64,
}

#[repr(C)]
struct Map {
    size: u32,
    flags: u32,
    address: u64,
    iova: u64,
    bytes: u64,
}

#[repr(C)]
struct Unmap {
    size: u32,
    flags: u32,
    iova: u64,
    bytes: u64,
}

/// A group in a container of its own.
pub(crate) struct Group {
    group: File,
    container: File,
}

impl Group {
    pub(crate) fn open(number: u32) -> Result<Self> {
        let open = |path: &str| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(path)
                .map_err(|error| format!("{path}: {error}"))
        };
        let container = open("/dev/vfio/vfio")?;
        let version = ioctl_number(container.as_raw_fd(), GET_API_VERSION, 0)?;
        if version != 0 {
            return Err(format!("the version of VFIO is {version}, not 0").into());
        }
        let group = open(&format!("/dev/vfio/{number}"))?;
        let mut status = Status { size: size_of::<Status>() as u32, flags: 0 };
        // SAFETY: this is the structure of the request.
        unsafe { ioctl(group.as_raw_fd(), GROUP_GET_STATUS, &mut status) }?;
        if status.flags & GROUP_VIABLE == 0 {
            return Err(format!("group {number}: not all of its devices are VFIO's").into());
        }
        // SAFETY: this request takes a file descriptor in memory.
        unsafe { ioctl(group.as_raw_fd(), GROUP_SET_CONTAINER, &mut container.as_raw_fd()) }?;
        ioctl_number(container.as_raw_fd(), SET_IOMMU, TYPE1V2_IOMMU)?;
        Ok(Self { group, container })
    }

    /// Lets the group's devices read and write the pages at `iova`. The pages still belong to the
    /// caller; a device's writes look like those of another thread.
    pub(crate) fn map(&self, pages: &Pages, iova: u64) -> Result<()> {
        let (size, bytes) = (size_of::<Map>() as u32, pages.bytes() as u64);
        let mut map =
            Map { size, flags: MAP_READ_AND_WRITE, address: pages.address(), iova, bytes };
        // SAFETY: this is the structure of the request. `Pages` are never a slice, so a device may
        // write to them, and the kernel keeps them while they are mapped.
        unsafe { ioctl(self.container.as_raw_fd(), IOMMU_MAP_DMA, &mut map) }
            .map_err(|error| format!("map: {error}"))?;
        Ok(())
    }

    /// Ends [`map`](Self::map) for `bytes` bytes at `iova`. Returns how long the call took.
    pub(crate) fn unmap(&self, iova: u64, bytes: usize) -> Result<Duration> {
        let mut unmap =
            Unmap { size: size_of::<Unmap>() as u32, flags: 0, iova, bytes: bytes as u64 };
        let begun = Instant::now();
        // SAFETY: this is the structure of the request.
        unsafe { ioctl(self.container.as_raw_fd(), IOMMU_UNMAP_DMA, &mut unmap) }
            .map_err(|error| format!("unmap: {error}"))?;
        let took = begun.elapsed();
        if unmap.bytes == bytes as u64 {
            Ok(took)
        } else {
            Err(format!("{} bytes were unmapped", unmap.bytes).into())
        }
    }

    /// Opens the device at the address on the bus, and resets it.
    pub(crate) fn device(&self, address: &str) -> Result<Device> {
        let mut name = [0_u8; 32];
        name[..address.len()].copy_from_slice(address.as_bytes());
        // SAFETY: this request takes a string that ends in a zero.
        let file = unsafe { ioctl(self.group.as_raw_fd(), GROUP_GET_DEVICE_FD, &mut name) }
            .map_err(|error| format!("device {address}: {error}"))?;
        // SAFETY: the descriptor is new and has no other owner.
        let file = unsafe { File::from_raw_fd(file) };
        let mut offsets = [0; CONFIG as usize + 1];
        for (index, offset) in (0..).zip(&mut offsets) {
            let size = size_of::<Region>() as u32;
            let mut region = Region { size, flags: 0, index, capabilities: 0, bytes: 0, offset: 0 };
            // SAFETY: this is the structure of the request.
            unsafe { ioctl(file.as_raw_fd(), DEVICE_GET_REGION_INFO, &mut region) }?;
            *offset = region.offset;
        }
        Ok(Device { file, offsets })
    }
}

/// The registers of a device.
pub(crate) struct Device {
    file: File,
    offsets: [u64; CONFIG as usize + 1],
}

impl Device {
    /// Reads a register of `N` bytes (1, 2, 4 or 8), in little-endian order.
    pub(crate) fn read<const N: usize>(&self, region: u32, at: u64) -> Result<[u8; N]> {
        let mut value = [0; N];
        self.file.read_exact_at(&mut value, self.offsets[region as usize] + at)?;
        Ok(value)
    }

    pub(crate) fn write<const N: usize>(&self, region: u32, at: u64, value: [u8; N]) -> Result<()> {
        Ok(self.file.write_all_at(&value, self.offsets[region as usize] + at)?)
    }
}
