//! Hearing that jobs are done. Only a lost device reaches no memory any more: any other error says
//! nothing about the jobs, so it is waited for again, or in another way. Every wait is bounded, so
//! that a thread looks at what it was told meanwhile.
//!
//! `unsafe` here is calls of Vulkan with handles that exist until the thread that makes them was
//! joined.

use ash::vk;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use shootdown::Timeline;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::time::Duration;

/// A wait ends after so many nanoseconds, and begins again.
const BOUND: u64 = 100_000_000;
/// Before the next try after an error: what is lacking (memory, descriptors) may be there then.
const PAUSE: Duration = Duration::from_millis(5);

/// What the waiting thread tells.
#[derive(Clone, Default)]
pub(crate) struct Heard {
    pub(crate) done: Timeline,
    /// The device is lost: it reaches no memory any more, and takes no work.
    lost: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
}

/// The device is lost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lost;

impl Heard {
    /// What nobody will ever signal is over: a lost device reaches no memory.
    pub(crate) fn lose(&self) -> Lost {
        self.lost.store(true, Ordering::Release);
        self.done.signal(u64::MAX);
        Lost
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// The thread ends soon, whatever it waits for.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Calls `attempt` until it succeeds or the device is lost.
    pub(crate) fn insist<T>(
        &self,
        mut attempt: impl FnMut() -> Result<T, vk::Result>,
    ) -> Result<T, Lost> {
        loop {
            if self.is_lost() {
                return Err(Lost);
            }
            match attempt() {
                Ok(done) => return Ok(done),
                Err(vk::Result::ERROR_DEVICE_LOST) => return Err(self.lose()),
                Err(vk::Result::TIMEOUT) => {}
                Err(_) => std::thread::sleep(PAUSE),
            }
        }
    }
}

/// Waits until a timeline semaphore is at `number`, for a bounded time.
pub(crate) fn wait_for(
    device: &ash::Device,
    semaphore: vk::Semaphore,
    number: u64,
) -> Result<(), vk::Result> {
    let (semaphores, numbers) = ([semaphore], [number]);
    let info = vk::SemaphoreWaitInfo::default().semaphores(&semaphores).values(&numbers);
    // SAFETY: the caller's semaphore exists.
    unsafe { device.wait_semaphores(&info, BOUND) }
}

/// Waits for the next number on a timeline semaphore, again and again: one thread for all who wait
/// for any number of it.
pub(crate) fn wait_for_the_next(device: &ash::Device, semaphore: vk::Semaphore, heard: &Heard) {
    while !heard.is_stopped() {
        let next = heard.done.value() + 1;
        // SAFETY: both exist until this thread was joined.
        let value = wait_for(device, semaphore, next)
            .and_then(|()| unsafe { device.get_semaphore_counter_value(semaphore) });
        match value {
            Ok(value) => heard.done.signal(value),
            Err(vk::Result::TIMEOUT) => {}
            Err(vk::Result::ERROR_DEVICE_LOST) => {
                heard.lose();
                return;
            }
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

/// The same by the descriptors of fences, which an executor's reactor could wait for as well. Where
/// there is no descriptor, or it cannot be waited for, the semaphore is. It ends when nobody sends
/// fences any more.
pub(crate) fn wait_for_descriptors(
    device: &ash::Device,
    extension: &ash::khr::external_fence_fd::Device,
    semaphore: vk::Semaphore,
    fences: &Receiver<(vk::Fence, u64)>,
    heard: &Heard,
) {
    for (fence, number) in fences {
        let info = vk::FenceGetFdInfoKHR::default()
            .fence(fence)
            .handle_type(vk::ExternalFenceHandleTypeFlags::SYNC_FD);
        // SAFETY: the fence was made for this, was submitted, and is this thread's now.
        let got = unsafe { extension.get_fence_fd(&info) };
        let done = match got {
            // Signalled already.
            Ok(-1) => true,
            // SAFETY: a new descriptor, which is ours.
            Ok(fd) => is_signalled(&unsafe { OwnedFd::from_raw_fd(fd) }, heard),
            Err(vk::Result::ERROR_DEVICE_LOST) => {
                heard.lose();
                false
            }
            Err(_) => false,
        };
        let over = if done { Ok(()) } else { heard.insist(|| wait_for(device, semaphore, number)) };
        if over.is_ok() && got.is_err() {
            // It was not taken out of the fence, which is signalled after the semaphore.
            // SAFETY: as above.
            let _ = heard.insist(|| unsafe { device.wait_for_fences(&[fence], true, BOUND) });
        }
        // SAFETY: its job is done, or its device is lost.
        unsafe { device.destroy_fence(fence, None) };
        heard.done.signal(number);
    }
}

/// Waits for a descriptor. `false` if that says nothing, or the device is lost.
fn is_signalled(fd: &OwnedFd, heard: &Heard) -> bool {
    let bound = Timespec { tv_sec: 0, tv_nsec: BOUND as i64 };
    while !heard.is_lost() {
        let mut polled = [PollFd::new(fd, PollFlags::IN)];
        match poll(&mut polled, Some(&bound)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return polled[0].revents() == PollFlags::IN,
            Err(_) => return false,
        }
    }
    false
}
