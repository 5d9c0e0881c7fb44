//! Page frames, and files that have some.

use shootdown::Owner;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Words of a page; all memory here is read and written in words of 64 bits.
pub const WORDS: usize = 512;
/// What the next user of a frame writes to it: a device that reads this has used a mapping that it
/// should have dropped.
pub const REUSED: u64 = 0xdead_dead_dead_dead;

/// A page of physical memory, of the system's or of a device's.
pub struct Frame {
    words: Box<[AtomicU64]>,
    /// Page tables and files that have it.
    mapped: AtomicUsize,
    /// In whose memory it is; `None` for the system's.
    device: Option<Owner>,
}

impl Frame {
    /// What every page that was never written reads as.
    pub fn zero() -> Arc<Self> {
        static ZERO: OnceLock<Mapped> = OnceLock::new();
        ZERO.get_or_init(|| Mapped::zeroed(None)).frame().clone()
    }

    pub fn device(&self) -> Option<Owner> {
        self.device
    }

    pub fn load(&self, word: usize) -> u64 {
        self.words[word].load(Ordering::Acquire)
    }

    pub fn store(&self, word: usize, value: u64) {
        self.words[word].store(value, Ordering::Release);
    }

    fn fill(&self, value: u64) {
        self.words.iter().for_each(|word| word.store(value, Ordering::Release));
    }
}

/// A frame in a page table or file. When the last of them is dropped, somebody else gets the frame
/// at once, whether a device still uses it or not.
pub struct Mapped(Arc<Frame>);

impl Mapped {
    pub fn zeroed(device: Option<Owner>) -> Self {
        let words = (0..WORDS).map(|_| AtomicU64::new(0)).collect();
        Self(Arc::new(Frame { words, mapped: AtomicUsize::new(1), device }))
    }

    pub fn copy_of(frame: &Frame, device: Option<Owner>) -> Self {
        let words = (0..WORDS).map(|word| AtomicU64::new(frame.load(word))).collect();
        Self(Arc::new(Frame { words, mapped: AtomicUsize::new(1), device }))
    }

    pub fn frame(&self) -> &Arc<Frame> {
        &self.0
    }

    /// Whether somebody else has it as well.
    pub fn is_shared(&self) -> bool {
        self.0.mapped.load(Ordering::Acquire) > 1
    }
}

impl Clone for Mapped {
    fn clone(&self) -> Self {
        self.0.mapped.fetch_add(1, Ordering::AcqRel);
        Self(self.0.clone())
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if self.0.mapped.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.fill(REUSED);
        }
    }
}

/// Memory that several mappings share: a file, or anonymous shared memory.
#[derive(Default)]
pub struct File(Mutex<BTreeMap<u64, Mapped>>);

impl File {
    /// Page `page` of it, zero where nothing was written.
    pub fn page(&self, page: u64) -> Mapped {
        self.0.lock().unwrap().entry(page).or_insert_with(|| Mapped::zeroed(None)).clone()
    }

    /// `pwrite`: `words` from the start on.
    pub fn write(&self, words: &[u64]) {
        for (page, words) in (0..).zip(words.chunks(WORDS)) {
            let mapped = self.page(page);
            words.iter().enumerate().for_each(|(at, word)| mapped.frame().store(at, *word));
        }
    }

    /// `pread`: `count` words from the start on.
    pub fn read(&self, count: usize) -> Vec<u64> {
        (0..count).map(|at| self.page((at / WORDS) as u64).frame().load(at % WORDS)).collect()
    }
}
