//! The device: a file as a virtio block device.
#![forbid(unsafe_code)]

use crate::options::{Fault, Options};
use crate::request::{self, SEGMENT, SEGMENTS};
use crate::uring::Uring;
use crate::{executor, stats::Counters};
use anyhow::{Context as _, Result, ensure};
use futures::StreamExt;
use futures::future::{Either, select};
use futures::stream::unfold;
use rustix::fs::{AtFlags, StatxFlags, statx};
use shootdown_vhost::{Chain, Device, Next, Ring};
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::mem::offset_of;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use virtio_bindings::virtio_blk as blk;

/// The unit of the guest's addresses in bytes, whatever the size of a block is.
pub const SECTOR: u64 = 512;
/// As many buffers a request has at most, besides its header and its status, so that a ring of 128
/// has room for it.
const BUFFERS: u32 = 126;

/// A disk, with what is told of it on the command line.
pub struct Disk {
    index: usize,
    file: Arc<OwnedFd>,
    sectors: u64,
    /// In bytes.
    block: u32,
    queues: u16,
    latency: Duration,
    read_only: bool,
    early: bool,
    pub counters: Counters,
}

/// The disk as what sessions have.
pub struct Served(pub Arc<Disk>);

impl Disk {
    /// The disk whose content is at `path`.
    pub fn open(index: usize, path: &Path, options: &Options) -> Result<Self> {
        let flags = if options.direct { libc::O_DIRECT } else { 0 };
        let opened =
            File::options().read(true).write(!options.read_only).custom_flags(flags).open(path);
        let mut file = opened.with_context(|| format!("{} cannot be opened", path.display()))?;
        let kind = file.metadata()?.file_type();
        ensure!(
            kind.is_file() || kind.is_block_device(),
            "{} is neither a file nor a block device",
            path.display()
        );
        // The metadata of a block device has no length.
        let len = file
            .seek(SeekFrom::End(0))
            .with_context(|| format!("{} has no length", path.display()))?;
        let block = if options.direct { direct_block(&file)? } else { SECTOR as u32 };
        let sectors = len / u64::from(block) * (u64::from(block) / SECTOR);
        ensure!(
            sectors > 0,
            "{} has {len} bytes, which is not even one block of {block}",
            path.display()
        );
        if sectors * SECTOR < len {
            tracing::warn!(
                "the last {} bytes of {} are no whole block, and not on the disk",
                len - sectors * SECTOR,
                path.display()
            );
        }
        Ok(Self {
            index,
            file: Arc::new(file.into()),
            sectors,
            block,
            queues: options.queues,
            latency: options.latency(),
            read_only: options.read_only,
            early: options.fault == Some(Fault::EarlyUsed),
            counters: Counters::default(),
        })
    }

    pub fn file(&self) -> &Arc<OwnedFd> {
        &self.file
    }

    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    pub fn latency(&self) -> Duration {
        self.latency
    }

    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether the guest is told of a request before that is done.
    pub fn tells_early(&self) -> bool {
        self.early
    }

    /// What the guest knows it by, filled up with zeros.
    pub fn id(&self) -> [u8; blk::VIRTIO_BLK_ID_BYTES as usize] {
        let mut id = [0; blk::VIRTIO_BLK_ID_BYTES as usize];
        let name = format!("shootdown-{}", self.index);
        let len = name.len().min(id.len());
        id[..len].copy_from_slice(&name.as_bytes()[..len]);
        id
    }
}

/// The unit of transfers with O_DIRECT, in bytes.
fn direct_block(file: &File) -> Result<u32> {
    let told = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
    let known = told.stx_mask & StatxFlags::DIOALIGN.bits() != 0 && told.stx_dio_offset_align > 0;
    let block = if known { told.stx_dio_offset_align.max(SECTOR as u32) } else { SECTOR as u32 };
    ensure!(block.is_power_of_two(), "O_DIRECT with blocks of {block} bytes");
    Ok(block)
}

impl Device for Served {
    fn features(&self) -> u64 {
        let always = [
            blk::VIRTIO_BLK_F_SEG_MAX,
            blk::VIRTIO_BLK_F_BLK_SIZE,
            blk::VIRTIO_BLK_F_FLUSH,
            blk::VIRTIO_BLK_F_MQ,
        ];
        let discards = [blk::VIRTIO_BLK_F_DISCARD, blk::VIRTIO_BLK_F_WRITE_ZEROES];
        let others: &[u32] = if self.0.read_only { &[blk::VIRTIO_BLK_F_RO] } else { &discards };
        always.iter().chain(others).fold(0, |features, bit| features | 1 << bit)
    }

    fn queues(&self) -> u16 {
        self.0.queues
    }

    fn config(&self) -> Vec<u8> {
        type Config = blk::virtio_blk_config;
        let mut bytes = vec![0; size_of::<Config>()];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(offset_of!(Config, capacity), &self.0.sectors.to_le_bytes());
        put(offset_of!(Config, seg_max), &BUFFERS.to_le_bytes());
        put(offset_of!(Config, blk_size), &self.0.block.to_le_bytes());
        put(offset_of!(Config, num_queues), &self.0.queues.to_le_bytes());
        put(offset_of!(Config, max_discard_sectors), &SEGMENT.to_le_bytes());
        put(offset_of!(Config, max_discard_seg), &SEGMENTS.to_le_bytes());
        put(
            offset_of!(Config, discard_sector_alignment),
            &(self.0.block / SECTOR as u32).to_le_bytes(),
        );
        put(offset_of!(Config, max_write_zeroes_sectors), &SEGMENT.to_le_bytes());
        put(offset_of!(Config, max_write_zeroes_seg), &SEGMENTS.to_le_bytes());
        put(offset_of!(Config, write_zeroes_may_unmap), &[1]);
        bytes
    }

    fn start(&self, ring: Ring) {
        let (disk, name) = (self.0.clone(), format!("disk{}-queue{}", self.0.index, ring.index()));
        let queue = move || {
            let (device, queue) = (disk.index, ring.index());
            tracing::debug!(device, queue, size = ring.size(), "a ring begins");
            match serve(&disk, ring) {
                Ok(()) => tracing::debug!(device, queue, "a ring has ended"),
                Err(error) => tracing::error!(device, queue, %error, "a ring cannot go on"),
            }
        };
        if let Err(error) = thread::Builder::new().name(name).spawn(queue) {
            tracing::error!(device = self.0.index, %error, "there is no thread for a ring");
        }
    }
}

/// Serves a ring on this thread until it stops, with as many requests at once as it has room for.
fn serve(disk: &Disk, ring: Ring) -> io::Result<()> {
    let uring = Uring::new()?;
    // Of its own: the kernel may still poll it when the ring's is closed.
    let kick = Arc::new(ring.kick().try_clone_to_owned()?);
    // Somebody else may have read it first.
    rustix::io::ioctl_fionbio(&kick, true)?;
    let writeback = ring.features() & 1 << blk::VIRTIO_BLK_F_FLUSH != 0;
    let most = usize::from(ring.size());
    let chains = unfold(ring, async |ring| next(&uring, &kick, ring).await);
    let requests =
        chains.for_each_concurrent(most, |chain| request::serve(disk, &uring, chain, writeback));
    executor::run(&uring, requests)
}

/// The next request. `None`: the ring has gone.
async fn next(uring: &Uring, kick: &Arc<OwnedFd>, mut ring: Ring) -> Option<(Chain, Ring)> {
    loop {
        match ring.next().await {
            Ok(Next::Chain(chain)) => return Some((chain, ring)),
            Ok(Next::Empty) => {
                let kicked = pin!(uring.readable(kick));
                if let Either::Right((Err(error), _)) = select(ring.stopping(), kicked).await {
                    tracing::error!(queue = ring.index(), %error, "kicks cannot be waited for");
                    return None;
                }
                let _ = rustix::io::read(kick.as_fd(), &mut [0; 8]);
            }
            // Stopping.
            Ok(_) => return None,
            Err(error) => {
                tracing::error!(queue = ring.index(), %error, "a ring cannot go on");
                return None;
            }
        }
    }
}
