//! A request of the guest: what it wants, and doing that.
#![forbid(unsafe_code)]

use crate::disk::{Disk, SECTOR};
use crate::uring::Uring;
use futures::future::{Either, select};
use shootdown_vhost::{AccessError, Chain, CompleteError};
use std::io;
use std::ops::Range;
use std::pin::pin;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use virtio_bindings::virtio_blk as blk;

/// The length of a header, and of a segment of a discard, in bytes.
const HEADER: usize = 16;
/// As many segments a discard has at most.
pub const SEGMENTS: u32 = 64;
/// As many sectors a segment of a discard has at most: 1 GiB.
pub const SEGMENT: u32 = 1 << 21;

const OK: u8 = blk::VIRTIO_BLK_S_OK as u8;
const FAILED: u8 = blk::VIRTIO_BLK_S_IOERR as u8;
const UNSUPPORTED: u8 = blk::VIRTIO_BLK_S_UNSUPP as u8;

/// What the guest wants. Offsets and lengths are in bytes of the file.
#[derive(Debug, PartialEq)]
enum Request {
    Read {
        offset: u64,
        len: usize,
    },
    Write {
        offset: u64,
        len: usize,
    },
    Flush,
    Id,
    /// With the mode of `fallocate`.
    Deallocate(Vec<(Range<u64>, libc::c_int)>),
}

/// What has come of it.
struct Outcome {
    status: u8,
    /// Bytes of data that have been written from the start of what the device may write.
    written: usize,
}

/// Does what the chain asks for, and tells the guest. `writeback`: what has been written may be
/// lost until the guest flushes.
pub async fn serve(disk: &Disk, uring: &Uring, chain: Chain, writeback: bool) {
    let Some(status_at) = chain.writable().len().checked_sub(1) else {
        tracing::warn!(?chain, "a request without room for its status");
        report(chain.complete(0).await);
        return;
    };
    let request = Request::read(disk, &chain);
    tracing::trace!(?chain, ?request);
    let chain = Rc::new(chain);
    let outcome = if disk.tells_early() {
        let Some(outcome) = early(disk, uring, &chain, &request, status_at, writeback).await else {
            return;
        };
        outcome
    } else {
        execute(disk, uring, &chain, &request, writeback).await
    };
    let Some(chain) = Rc::into_inner(chain) else {
        unreachable!("what has been awaited has let go")
    };
    if let Err(error) = chain.writable().write(status_at, &[outcome.status]) {
        tracing::warn!(%error, "the status of a request");
    }
    report(chain.complete(used(&outcome, status_at)).await);
}

/// The length that the used ring is told: what has been written without a gap.
fn used(outcome: &Outcome, status_at: usize) -> u32 {
    let status = usize::from(outcome.written == status_at);
    u32::try_from(outcome.written + status).unwrap_or(u32::MAX)
}

fn report(completed: Result<(), CompleteError>) {
    match completed {
        Ok(()) => {}
        Err(CompleteError::Stopping) => {
            tracing::debug!("the ring stops; the guest does not hear of a request")
        }
        Err(error) => tracing::warn!(%error, "the guest does not hear of a request"),
    }
}

/// A fault: the guest is told first. `None` if it was.
async fn early(
    disk: &Disk,
    uring: &Uring,
    chain: &Rc<Chain>,
    request: &Result<Request, u8>,
    status_at: usize,
    writeback: bool,
) -> Option<Outcome> {
    let written = if let Ok(Request::Read { len, .. }) = request { *len } else { 0 };
    let hoped = Outcome { status: request.as_ref().err().copied().unwrap_or(OK), written };
    if let Err(error) = chain.writable().write(status_at, &[hoped.status]) {
        tracing::warn!(%error, "the status of a request");
    }
    let told = pin!(chain.complete_early(used(&hoped, status_at)));
    match select(told, pin!(execute(disk, uring, chain, request, writeback))).await {
        Either::Left((told, executed)) => {
            report(told);
            executed.await;
            None
        }
        // The used ring has no translation yet, and the work does not wait for one.
        Either::Right((outcome, _)) => Some(outcome),
    }
}

impl Request {
    /// `Err`: the status of a request that cannot be done.
    fn read(disk: &Disk, chain: &Chain) -> Result<Self, u8> {
        let malformed = |error: AccessError| {
            tracing::warn!(?chain, %error, "a malformed request");
            FAILED
        };
        let mut header = [0; HEADER];
        chain.readable().read(0, &mut header).map_err(malformed)?;
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let (kind, sector) = (u32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(sector));
        let (readable, writable) = (chain.readable().len() - HEADER, chain.writable().len() - 1);
        let request = match kind {
            blk::VIRTIO_BLK_T_IN => {
                Self::Read { offset: transfer(disk, sector, writable)?, len: writable }
            }
            blk::VIRTIO_BLK_T_OUT => {
                Self::Write { offset: transfer(disk, sector, readable)?, len: readable }
            }
            blk::VIRTIO_BLK_T_FLUSH => Self::Flush,
            blk::VIRTIO_BLK_T_GET_ID => Self::Id,
            blk::VIRTIO_BLK_T_DISCARD | blk::VIRTIO_BLK_T_WRITE_ZEROES => {
                if readable == 0
                    || !readable.is_multiple_of(HEADER)
                    || readable / HEADER > SEGMENTS as usize
                {
                    tracing::warn!(?chain, "a discard with {readable} bytes of segments");
                    return Err(FAILED);
                }
                let mut bytes = vec![0; readable];
                chain.readable().read(HEADER, &mut bytes).map_err(malformed)?;
                let (segments, _) = bytes.as_chunks::<HEADER>();
                let zeroes = kind == blk::VIRTIO_BLK_T_WRITE_ZEROES;
                Self::Deallocate(
                    segments
                        .iter()
                        .map(|bytes| segment(disk, bytes, zeroes))
                        .collect::<Result<_, _>>()?,
                )
            }
            _ => return Err(UNSUPPORTED),
        };
        if disk.is_read_only() && matches!(request, Self::Write { .. } | Self::Deallocate(_)) {
            return Err(FAILED);
        }
        Ok(request)
    }
}

/// The offset in the file of a transfer of `len` bytes.
fn transfer(disk: &Disk, sector: u64, len: usize) -> Result<u64, u8> {
    let len = len as u64;
    if !len.is_multiple_of(SECTOR) {
        tracing::warn!("a transfer of {len} bytes, which are no whole sectors");
        return Err(FAILED);
    }
    inside(disk, sector, len / SECTOR).map(|range| range.start)
}

/// The bytes of these sectors, if the disk has them.
fn inside(disk: &Disk, first: u64, count: u64) -> Result<Range<u64>, u8> {
    match first.checked_add(count) {
        Some(end) if end <= disk.sectors() => Ok(first * SECTOR..end * SECTOR),
        _ => {
            tracing::warn!("{count} sectors from {first} on; the disk has {}", disk.sectors());
            Err(FAILED)
        }
    }
}

/// One segment of a discard, or of a request to write zeroes.
fn segment(
    disk: &Disk,
    bytes: &[u8; HEADER],
    zeroes: bool,
) -> Result<(Range<u64>, libc::c_int), u8> {
    let [sector @ .., a, b, c, d, e, f, g, h] = *bytes;
    let (count, flags) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
    let mode = match (zeroes, flags) {
        (false, 0) | (true, blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) => libc::FALLOC_FL_PUNCH_HOLE,
        (true, 0) => libc::FALLOC_FL_ZERO_RANGE,
        _ => return Err(UNSUPPORTED),
    };
    if count > SEGMENT {
        tracing::warn!("a segment of {count} sectors, more than the {SEGMENT} that were offered");
        return Err(FAILED);
    }
    Ok((inside(disk, u64::from_le_bytes(sector), count.into())?, mode | libc::FALLOC_FL_KEEP_SIZE))
}

async fn execute(
    disk: &Disk,
    uring: &Uring,
    chain: &Rc<Chain>,
    request: &Result<Request, u8>,
    writeback: bool,
) -> Outcome {
    let mut written = 0;
    let done = match request {
        Err(status) => return Outcome { status: *status, written },
        Ok(request) => carry_out(disk, uring, chain, request, &mut written, writeback).await,
    };
    let status = match done {
        Ok(()) => OK,
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => UNSUPPORTED,
        Err(error) => {
            tracing::warn!(?chain, ?request, %error, "a request has failed");
            FAILED
        }
    };
    if status == OK {
        let counters = &disk.counters;
        let counter = match request {
            Ok(Request::Read { .. }) => Some(&counters.reads),
            Ok(Request::Write { .. }) => Some(&counters.writes),
            Ok(Request::Flush) => Some(&counters.flushes),
            Ok(Request::Deallocate(_)) => Some(&counters.discards),
            Ok(Request::Id) | Err(_) => None,
        };
        counter.map(|counter| counter.fetch_add(1, Ordering::Relaxed));
    }
    Outcome { status, written }
}

async fn carry_out(
    disk: &Disk,
    uring: &Uring,
    chain: &Rc<Chain>,
    request: &Request,
    written: &mut usize,
    writeback: bool,
) -> io::Result<()> {
    let file = disk.file();
    if let Request::Read { .. } | Request::Write { .. } = request
        && !disk.latency().is_zero()
    {
        uring.sleep(disk.latency()).await?;
    }
    match request {
        Request::Read { offset, len } => {
            while *written < *len {
                let at = offset + *written as u64;
                *written += some(uring.read(file, chain, *written..*len, at).await)?;
            }
        }
        Request::Write { offset, len } => {
            let mut done = 0;
            while done < *len {
                let at = offset + done as u64;
                done += some(uring.write(file, chain, HEADER + done..HEADER + len, at).await)?;
            }
        }
        Request::Flush => return uring.sync(file).await,
        Request::Id => {
            let id = disk.id();
            let id = &id[..id.len().min(chain.writable().len() - 1)];
            chain.writable().write(0, id).map_err(io::Error::other)?;
            *written = id.len();
        }
        Request::Deallocate(segments) => {
            for (range, mode) in segments.iter().filter(|(range, _)| !range.is_empty()) {
                uring.fallocate(file, range.clone(), *mode).await?;
            }
        }
    }
    if !writeback && matches!(request, Request::Write { .. } | Request::Deallocate(_)) {
        uring.sync(file).await?;
    }
    Ok(())
}

/// How far a transfer has come; 0 means again.
fn some(transferred: io::Result<usize>) -> io::Result<usize> {
    match transferred {
        Ok(0) => {
            Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file is shorter than it was"))
        }
        Err(error)
            if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) =>
        {
            Ok(0)
        }
        other => other,
    }
}
