//! Bugs that can be planted, to see that the check finds them.

use shootdown::Event;

/// A bug. Those of drivers and devices are in the first GPU and the last, those of the program in
/// all that it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Fault {
    /// Driver: does not wait for its device
    SkipWait,
    /// Driver: flushes the TLB without waiting for the jobs in flight, or for the preemption (idle
    /// GPUs have neither)
    SkipJobs,
    /// Driver: takes the fence of a command that has completed before
    OldFence,
    /// Driver: takes the fence of whatever command is under way, although it is for other pages
    AnyFence,
    /// Device: signals the fence when the command begins
    EarlyFence,
    /// Driver: flushes all pages but the last
    ShortFlush,
    /// Driver: zaps the first page only
    FirstPageOnly,
    /// Driver: zaps its page table after the flush
    FlushBeforeZap,
    /// Driver: zaps without set_seq (debug builds of the library panic)
    NoSetSeq,
    /// Driver: calls set_seq a moment after it has released its lock
    SetSeqOutsideLock,
    /// Driver: looks at the memory before read_begin
    LateBegin,
    /// Driver: checks read_retry, and takes the lock to install a moment later
    RetryOutsideLock,
    /// Driver: ignores Unmap
    IgnoreUnmap,
    /// Driver: ignores Clear
    IgnoreClear,
    /// Driver: ignores ProtectionPage
    IgnoreProtectionPage,
    /// Driver: ignores ProtectionVma
    IgnoreProtectionVma,
    /// Driver: takes Release for the end of its duties: neither it nor what comes after it stops
    /// the device
    IgnoreRelease,
    /// Program: invalidates before every second unmapping only
    SkipUnmap,
    /// Program: discards memory without an invalidation
    SkipClear,
    /// Program: ends the guard, and changes the memory a moment later
    EarlyEnd,
}

impl Fault {
    /// Whether a driver with this bug does nothing for the event.
    pub fn ignores(self, event: Event) -> bool {
        matches!(
            (self, event),
            (Self::IgnoreUnmap, Event::Unmap)
                | (Self::IgnoreClear, Event::Clear)
                | (Self::IgnoreProtectionPage, Event::ProtectionPage)
                | (Self::IgnoreProtectionVma, Event::ProtectionVma)
                | (Self::IgnoreRelease, Event::Release)
        )
    }
}
