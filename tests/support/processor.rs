//! Asks for processor time, which other programs of the machine do not use up.

use std::time::Duration;

/// The processor time of all threads of the process; `None` where it cannot be asked for.
pub fn of_process() -> Option<Duration> {
    #[cfg(target_os = "linux")]
    return ask(libc::CLOCK_PROCESS_CPUTIME_ID);
    #[cfg(not(target_os = "linux"))]
    None
}

/// The processor time of this thread. Elsewhere than on Linux, the time.
pub fn of_thread() -> Duration {
    #[cfg(target_os = "linux")]
    if let Some(time) = ask(libc::CLOCK_THREAD_CPUTIME_ID) {
        return time;
    }
    static EPOCH: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    EPOCH.get_or_init(std::time::Instant::now).elapsed()
}

#[cfg(target_os = "linux")]
fn ask(clock: libc::clockid_t) -> Option<Duration> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid for the write of one `timespec`.
    let status = unsafe { libc::clock_gettime(clock, &mut time) };
    (status == 0).then(|| Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}
