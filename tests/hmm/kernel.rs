//! The kernel's cases. Its buffers have 1024 pages and so have these; a word is 64 bits here and 32
//! there.

use crate::command::{CommandError, Outcome};
use crate::device::{Device, Mirror};
use crate::engine::pause;
use crate::frame::{File, PAGE, WORDS};
use crate::memory::{Fault, PageState, Process, Residence};
use crate::runtime::Runtime;
use crate::vma::{BIG, Backing, Protection};
use futures::channel::oneshot;
use shootdown::{AddressRange, Event, Owner};
use std::sync::Arc;

const PAGES: u64 = 1024;
const TIMES: u64 = 10;

/// Two devices, and something to run tasks on.
pub struct Machine {
    runtime: Runtime,
    devices: [Device; 2],
}

impl Machine {
    fn new(runtime: Runtime, coherent: bool) -> Self {
        Self { runtime, devices: std::array::from_fn(|_| Device { owner: Owner::new(), coherent }) }
    }

    pub fn private(runtime: Runtime) -> Self {
        Self::new(runtime, false)
    }

    pub fn coherent(runtime: Runtime) -> Self {
        Self::new(runtime, true)
    }

    fn is_coherent(&self) -> bool {
        self.devices[0].coherent
    }

    fn open(&self, process: &Process) -> Mirror {
        Mirror::open(process, self.devices[0]).unwrap()
    }

    /// A process, mirrored by the first device, with a private mapping.
    fn with_buffer(&self, pages: u64, protection: Protection) -> (Process, Mirror, AddressRange) {
        let process = Process::new();
        let mirror = self.open(&process);
        let range = process.map(pages, protection, Backing::Private);
        (process, mirror, range)
    }

    /// The same, filled by the processor with the numbers from 0 on.
    async fn with_numbers(&self, pages: u64) -> (Process, Mirror, AddressRange) {
        let (process, mirror, range) = self.with_buffer(pages, Protection::WRITE);
        process.write(range.start(), &numbers(pages, 0)).await.unwrap();
        (process, mirror, range)
    }

    /// The same, in big entries.
    async fn with_big_numbers(&self) -> (Process, Mirror, AddressRange) {
        let (process, mirror, range) = self.with_buffer(BIG, Protection::WRITE);
        process.advise_big(range);
        process.write(range.start(), &numbers(BIG, 0)).await.unwrap();
        (process, mirror, range)
    }
}

fn words(pages: u64) -> usize {
    pages as usize * WORDS
}

/// `from`, `from` + 1, … for so many pages.
fn numbers(pages: u64, from: u64) -> Vec<u64> {
    (from..).take(words(pages)).collect()
}

fn negative(pages: u64) -> Vec<u64> {
    (0..words(pages) as u64).map(u64::wrapping_neg).collect()
}

fn part(range: AddressRange, first: u64, pages: u64) -> AddressRange {
    AddressRange::new(range.start() + first * PAGE, pages * PAGE).unwrap()
}

/// Without printing half a million numbers.
#[track_caller]
fn same(found: &[u64], expected: &[u64]) {
    assert_eq!(found.len(), expected.len());
    if let Some(at) = (0..found.len()).find(|at| found[*at] != expected[*at]) {
        panic!("word {at} is {:#x}, not {:#x}", found[at], expected[at]);
    }
}

/// The mirror was empty, one fault filled it, and nothing invalidated it in between.
#[track_caller]
fn one_fault(outcome: &Outcome, pages: u64) {
    assert_eq!((outcome.pages, outcome.faults), (pages, 1), "pages, faults");
}

async fn reads(process: &Process, range: AddressRange, expected: &[u64]) {
    same(&process.read(range.start(), expected.len()).await.unwrap(), expected);
}

pub async fn open_close(machine: Machine) {
    let process = Process::new();
    let mirror = machine.open(&process);
    assert_eq!(process.space().len(), 1);
    mirror.close().await;
    assert!(process.space().is_empty());
}

pub async fn anon_read(machine: Machine) {
    let (process, mirror, range) = machine.with_buffer(PAGES, Protection::WRITE);
    // The first page has no entry, the second the zero page.
    process.write(part(range, 2, 1).start(), &numbers(PAGES - 2, words(2) as u64)).await.unwrap();
    process.protect(range, Protection::READ).await;
    assert_eq!(process.read(part(range, 1, 1).start(), 1).await.unwrap(), [0]);
    let read = mirror.read(range).await.unwrap();
    one_fault(&read, PAGES);
    assert_eq!(mirror.retries(), 0);
    same(&read.words[..words(2)], &vec![0; words(2)]);
    same(&read.words[words(2)..], &numbers(PAGES - 2, words(2) as u64));
}

pub async fn anon_read_prot(machine: Machine) {
    let (process, mirror, range) = machine.with_numbers(PAGES).await;
    process.protect(range, Protection::NONE).await;
    let page = range.start() / PAGE;
    assert_eq!(mirror.read(range).await, Err(CommandError::Fault(Fault::NotReadable { page })));
    process.protect(range, Protection::READ).await;
    reads(&process, range, &numbers(PAGES, 0)).await;
}

pub async fn anon_write(machine: Machine) {
    let (process, mirror, range) = machine.with_buffer(PAGES, Protection::WRITE);
    one_fault(&mirror.write(range.start(), &numbers(PAGES, 0)).await.unwrap(), PAGES);
    reads(&process, range, &numbers(PAGES, 0)).await;
}

pub async fn anon_write_prot(machine: Machine) {
    let (process, mirror, range) = machine.with_buffer(PAGES, Protection::READ);
    // The zero page.
    one_fault(&mirror.read(part(range, 0, 1)).await.unwrap(), 1);
    let page = range.start() / PAGE;
    let refused = mirror.write(range.start(), &numbers(PAGES, 0)).await;
    assert_eq!(refused, Err(CommandError::Fault(Fault::NotWritable { page })));
    reads(&process, range, &vec![0; words(PAGES)]).await;
    // Now the zero page is replaced.
    process.protect(range, Protection::WRITE).await;
    one_fault(&mirror.write(range.start(), &numbers(PAGES, 0)).await.unwrap(), PAGES);
    assert!(mirror.retries() > 0, "to replace it is an invalidation, with which the look collides");
    reads(&process, range, &numbers(PAGES, 0)).await;
}

pub async fn anon_write_child(machine: Machine) {
    for (migrate, big) in [(false, false), (false, true), (true, false), (true, true)] {
        let (process, mirror, range) = match big {
            true => machine.with_big_numbers().await,
            false => machine.with_numbers(PAGES).await,
        };
        let pages = if big { BIG } else { PAGES };
        if migrate {
            assert_eq!(mirror.migrate_to_device(range).await.unwrap().pages, pages);
        }
        let child = process.fork().await;
        reads(&child, range, &numbers(pages, 0)).await;
        // The child needs a mirror of its own.
        let its_mirror = machine.open(&child);
        one_fault(&its_mirror.write(range.start(), &negative(pages)).await.unwrap(), pages);
        reads(&child, range, &negative(pages)).await;
        its_mirror.close().await;
        child.exit().await;
        reads(&process, range, &numbers(pages, 0)).await;
    }
}

pub async fn anon_write_child_shared(machine: Machine) {
    let process = Process::new();
    let range = process.map(PAGES, Protection::WRITE, Backing::Shared(Arc::default(), 0));
    process.write(range.start(), &numbers(PAGES, 0)).await.unwrap();
    let child = process.fork().await;
    reads(&child, range, &numbers(PAGES, 0)).await;
    let its_mirror = machine.open(&child);
    one_fault(&its_mirror.write(range.start(), &negative(PAGES)).await.unwrap(), PAGES);
    reads(&child, range, &negative(PAGES)).await;
    its_mirror.close().await;
    child.exit().await;
    reads(&process, range, &negative(PAGES)).await;
}

pub async fn anon_write_huge(machine: Machine) {
    let (process, mirror, range) = machine.with_buffer(BIG, Protection::WRITE);
    process.advise_big(range);
    one_fault(&mirror.write(range.start(), &numbers(BIG, 0)).await.unwrap(), BIG);
    reads(&process, range, &numbers(BIG, 0)).await;
    let states = mirror.snapshot(range).await.unwrap();
    assert!(
        states
            .iter()
            .all(|state| matches!(state, PageState::Present { big: true, writable: true, .. }))
    );
}

pub async fn file_read(machine: Machine) {
    let (process, file) = (Process::new(), Arc::new(File::default()));
    let mirror = machine.open(&process);
    file.write(&numbers(PAGES, 0));
    let range = process.map(PAGES, Protection::READ, Backing::Shared(file, 0));
    let read = mirror.read(range).await.unwrap();
    one_fault(&read, PAGES);
    same(&read.words, &numbers(PAGES, 0));
}

pub async fn file_write(machine: Machine) {
    let (process, file) = (Process::new(), Arc::new(File::default()));
    let mirror = machine.open(&process);
    let range = process.map(PAGES, Protection::WRITE, Backing::Shared(file.clone(), 0));
    one_fault(&mirror.write(range.start(), &numbers(PAGES, 0)).await.unwrap(), PAGES);
    reads(&process, range, &numbers(PAGES, 0)).await;
    same(&file.read(words(PAGES)), &numbers(PAGES, 0));
}

/// Moves all of it to the device, and checks what the device reads there.
async fn move_and_check(mirror: &Mirror, range: AddressRange, pages: u64, expected: &[u64]) {
    let moved = mirror.migrate_to_device(range).await.unwrap();
    assert_eq!(moved.pages, pages);
    same(&moved.words, expected);
    let local =
        |state: &PageState| matches!(state, PageState::Present { residence: Residence::Local, .. });
    assert!(mirror.snapshot(range).await.unwrap().iter().all(local));
}

pub async fn migrate(machine: Machine) {
    let (_process, mirror, range) = machine.with_numbers(PAGES).await;
    move_and_check(&mirror, range, PAGES, &numbers(PAGES, 0)).await;
}

pub async fn migrate_fault(machine: Machine) {
    let (process, mirror, range) = machine.with_numbers(PAGES).await;
    move_and_check(&mirror, range, PAGES, &numbers(PAGES, 0)).await;
    // The processor takes half of it back, if it has to.
    reads(&process, range, &numbers(PAGES / 2, 0)).await;
    let states = mirror.snapshot(range).await.unwrap();
    let home = |state: &&PageState| {
        matches!(state, PageState::Present { residence: Residence::System, .. })
    };
    assert_eq!(
        states.iter().filter(home).count() as u64,
        if machine.is_coherent() { 0 } else { PAGES / 2 }
    );
    move_and_check(&mirror, range, PAGES, &numbers(PAGES, 0)).await;
}

pub async fn migrate_release(machine: Machine) {
    let (process, mirror, range) = machine.with_numbers(PAGES).await;
    move_and_check(&mirror, range, PAGES, &numbers(PAGES, 0)).await;
    assert_eq!(mirror.release().await.unwrap(), PAGES);
    assert_eq!(process.resident(machine.devices[0].owner), []);
    reads(&process, range, &numbers(PAGES / 2, 0)).await;
}

pub async fn migrate_shared(machine: Machine) {
    let process = Process::new();
    let mirror = machine.open(&process);
    let range = process.map(PAGES, Protection::WRITE, Backing::Shared(Arc::default(), 0));
    assert_eq!(
        mirror.migrate_to_device(range).await,
        Err(CommandError::Page(range.start() / PAGE))
    );
}

/// Page 0 cannot be read, 1 is a hole, 2 the zero page, 3 read-only, the others read and written.
async fn mixed(process: &Process, range: AddressRange, pages: u64) {
    process.unmap(part(range, 1, 1)).await;
    process.protect(part(range, 2, 1), Protection::READ).await;
    assert_eq!(process.read(part(range, 2, 1).start(), 1).await.unwrap(), [0]);
    process.protect(part(range, 3, 1), Protection::WRITE).await;
    process.write(part(range, 3, 1).start(), &[3]).await.unwrap();
    process.protect(part(range, 3, 1), Protection::READ).await;
    process.protect(part(range, 4, pages - 4), Protection::WRITE).await;
    process.write(part(range, 4, 1).start(), &[3]).await.unwrap();
}

pub async fn migrate_mixed(machine: Machine) {
    let process = Process::new();
    let mirrors = machine.devices.map(|device| Mirror::open(&process, device).unwrap());
    let range = process.map(6, Protection::NONE, Backing::Private);
    let first = range.start() / PAGE;
    let refused = |page| Err(CommandError::Fault(Fault::NotReadable { page }));
    assert_eq!(mirrors[1].migrate_to_device(range).await, refused(first), "protected");
    process.protect(part(range, 0, 1), Protection::READ).await;
    process.unmap(part(range, 1, 1)).await;
    assert_eq!(mirrors[1].migrate_to_device(part(range, 0, 3)).await, refused(first + 1), "a hole");
    mixed(&process, range, 6).await;
    process.write(part(range, 5, 1).start(), &[3]).await.unwrap();
    let moved = mirrors[1].migrate_to_device(part(range, 2, 4)).await.unwrap();
    assert_eq!(moved.pages, 4);
    assert_eq!([0, 1, 2, 3].map(|page| moved.words[page * WORDS]), [0, 3, 3, 3]);
    // Not from one device to the other.
    assert_eq!(
        mirrors[0].migrate_to_device(part(range, 5, 1)).await,
        Err(CommandError::Page(first + 5))
    );
}

pub async fn migrate_multiple(machine: Machine) {
    for _ in 0..TIMES {
        let (process, mirror, range) = machine.with_numbers(PAGES).await;
        move_and_check(&mirror, range, PAGES, &numbers(PAGES, 0)).await;
        if machine.is_coherent() {
            assert_eq!(mirror.migrate_to_system(range).await.unwrap().pages, PAGES);
        }
        reads(&process, range, &numbers(PAGES, 0)).await;
        assert_eq!(process.resident(machine.devices[0].owner), []);
    }
}

pub async fn anon_read_multiple(machine: Machine) {
    let process = Process::new();
    let mirror = machine.open(&process);
    for time in 0..TIMES {
        let range = process.map(PAGES, Protection::WRITE, Backing::Private);
        process.write(range.start(), &numbers(PAGES, time)).await.unwrap();
        let read = mirror.read(range).await.unwrap();
        one_fault(&read, PAGES);
        same(&read.words, &numbers(PAGES, time));
        process.unmap(range).await;
    }
}

pub async fn anon_teardown(machine: Machine) {
    let (mut complete, mut refused) = (0, 0);
    // Sooner and later: before the device has begun, while it faults, while it reads; every
    // thirteenth time when it has finished.
    for time in 0..TIMES * 10 {
        let pages = if time % 10 == 0 { PAGES } else { 64 };
        let process = Process::new();
        let mirror = machine.open(&process);
        let range = process.map(pages, Protection::WRITE, Backing::Private);
        process.write(range.start(), &numbers(pages, time)).await.unwrap();
        let (finished, is_finished) = oneshot::channel::<()>();
        let unmap = machine.runtime.spawn({
            let process = process.clone();
            async move {
                // By steps of the device's on one thread; longer for threads that run at the same
                // time.
                let pauses = if time % 2 == 0 { time / 2 % 13 } else { (time % 13).pow(2) * 8 };
                for _ in 0..pauses {
                    pause().await;
                }
                if time % 13 == 12 {
                    is_finished.await.unwrap();
                }
                process.unmap(part(range, pages / 2, pages / 2)).await;
            }
        });
        let read = mirror.read(range).await;
        // Nobody waits any more if time % 13 is not 12.
        let _ = finished.send(());
        match read {
            Ok(read) => {
                // One fault, and one more for each time that the unmapping lapsed because the
                // executor did not come to it (C4).
                assert!(
                    read.pages == pages
                        && (1..=1 + process.space().stats().lapses).contains(&read.faults.into()),
                    "{}",
                    read.faults
                );
                same(&read.words, &numbers(pages, time));
                complete += 1;
            }
            Err(error) => {
                assert!(matches!(error, CommandError::Fault(Fault::NotReadable { .. })), "{error}");
                refused += 1;
            }
        }
        unmap.await;
        assert!(
            matches!(mirror.read(range).await, Err(CommandError::Fault(Fault::NotReadable { .. }))),
            "a stale mapping"
        );
        // What is left can still be read.
        same(
            &mirror.read(part(range, 0, pages / 2)).await.unwrap().words,
            &numbers(pages / 2, time),
        );
    }
    assert!(
        complete > 0 && refused > 0,
        "{complete} complete, {refused} refused: they did not meet"
    );
}

pub async fn snapshot(machine: Machine) {
    let process = Process::new();
    let mirrors = machine.devices.map(|device| Mirror::open(&process, device).unwrap());
    let range = process.map(7, Protection::NONE, Backing::Private);
    mixed(&process, range, 7).await;
    assert_eq!(mirrors[0].migrate_to_device(part(range, 5, 1)).await.unwrap().pages, 1);
    assert_eq!(mirrors[1].migrate_to_device(part(range, 6, 1)).await.unwrap().pages, 1);
    let present =
        |writable, zero, residence| PageState::Present { writable, zero, big: false, residence };
    let expected = [
        PageState::Error,
        PageState::Error,
        present(false, true, Residence::System),
        present(false, false, Residence::System),
        present(true, false, Residence::System),
        present(true, false, Residence::Local),
        if machine.is_coherent() {
            present(true, false, Residence::Remote)
        } else {
            PageState::None
        },
    ];
    assert_eq!(mirrors[0].snapshot(range).await.unwrap(), expected);
}

pub async fn compound(machine: Machine) {
    let (process, mirror, range) = machine.with_big_numbers().await;
    let seen = |writable| PageState::Present {
        writable,
        zero: false,
        big: true,
        residence: Residence::System,
    };
    assert_eq!(mirror.snapshot(range).await.unwrap(), vec![seen(true); BIG as usize]);
    process.protect(range, Protection::READ).await;
    assert_eq!(mirror.snapshot(range).await.unwrap(), vec![seen(false); BIG as usize]);
    // To protect a part splits the entry.
    process.protect(part(range, 0, 1), Protection::WRITE).await;
    let states = mirror.snapshot(range).await.unwrap();
    assert!(states.iter().all(|state| matches!(state, PageState::Present { big: false, .. })));
}

pub async fn double_map(machine: Machine) {
    let process = Process::new();
    let mirrors = machine.devices.map(|device| Mirror::open(&process, device).unwrap());
    let range = process.map(6, Protection::WRITE, Backing::Private);
    process.write(range.start(), &numbers(6, 0)).await.unwrap();
    process.protect(range, Protection::READ).await;
    for mirror in &mirrors {
        let read = mirror.read(range).await.unwrap();
        one_fault(&read, 6);
        same(&read.words, &numbers(6, 0));
        assert_eq!(mirror.take_events(), [Event::ProtectionVma], "called once");
    }
    assert_eq!(mirrors[1].migrate_to_device(range).await.unwrap().pages, 6);
    let owner = Some(machine.devices[1].owner);
    assert_eq!(mirrors[0].take_events(), [Event::Migrate { owner }], "called once");
    assert_eq!(mirrors[1].take_events(), [], "its own");
    let read = mirrors[0].read(range).await.unwrap();
    one_fault(&read, 6);
    same(&read.words, &numbers(6, 0));
    // Private memory comes home, page by page; coherent memory is read where it is.
    let home = vec![Event::Migrate { owner: None }; if machine.is_coherent() { 0 } else { 6 }];
    process.discard(range).await;
    for mirror in &mirrors {
        assert_eq!(
            mirror.take_events(),
            [home.clone(), vec![Event::Clear]].concat(),
            "each called once an event"
        );
    }
}

pub async fn exclusive(machine: Machine) {
    let (process, mirror, range) = machine.with_numbers(PAGES).await;
    let given = mirror.exclusive(range).await.unwrap();
    assert_eq!(given.pages, PAGES);
    same(&given.words, &numbers(PAGES, 0));
    assert!(mirror.check_not_exclusive(range).is_err());
    // What the processor touches is the device's no longer.
    reads(&process, range, &numbers(PAGES, 0)).await;
    process.write(range.start(), &numbers(PAGES, 1)).await.unwrap();
    reads(&process, range, &numbers(PAGES, 1)).await;
    mirror.check_not_exclusive(range).unwrap();
}

pub async fn exclusive_mprotect(machine: Machine) {
    let (process, mirror, range) = machine.with_numbers(PAGES).await;
    let given = mirror.exclusive(range).await.unwrap();
    assert_eq!(given.pages, PAGES);
    same(&given.words, &numbers(PAGES, 0));
    process.protect(range, Protection::READ).await;
    let page = range.start() / PAGE;
    let refused = mirror.write(range.start(), &numbers(PAGES, 7)).await;
    assert_eq!(refused, Err(CommandError::Fault(Fault::NotWritable { page })));
}

pub async fn exclusive_cow(machine: Machine) {
    let (process, mirror, range) = machine.with_numbers(PAGES).await;
    assert_eq!(mirror.exclusive(range).await.unwrap().pages, PAGES);
    let child = process.fork().await;
    mirror.check_not_exclusive(range).unwrap();
    for each in [&process, &child] {
        reads(each, range, &numbers(PAGES, 0)).await;
        each.write(range.start(), &numbers(PAGES, 1)).await.unwrap();
        reads(each, range, &numbers(PAGES, 1)).await;
    }
}

pub async fn hmm_cow_in_device(machine: Machine) {
    let (process, mirror, range) = machine.with_numbers(4).await;
    move_and_check(&mirror, range, 4, &numbers(4, 0)).await;
    let child = process.fork().await;
    process.write(range.start(), &numbers(4, 1)).await.unwrap();
    reads(&child, range, &numbers(4, 0)).await;
    child.exit().await;
    let seen = PageState::Present {
        writable: true,
        zero: false,
        big: false,
        residence: Residence::System,
    };
    assert_eq!(mirror.snapshot(range).await.unwrap(), [seen; 4]);
    reads(&process, range, &numbers(4, 1)).await;
}

pub async fn migrate_anon_huge_empty(machine: Machine) {
    let (process, mirror, range) = machine.with_buffer(BIG, Protection::READ);
    process.advise_big(range);
    move_and_check(&mirror, range, BIG, &vec![0; words(BIG)]).await;
}

pub async fn migrate_anon_huge_zero(machine: Machine) {
    let (process, mirror, range) = machine.with_buffer(BIG, Protection::READ);
    process.advise_big(range);
    assert_eq!(process.read(range.start(), 1).await.unwrap(), [0]);
    move_and_check(&mirror, range, BIG, &vec![0; words(BIG)]).await;
    reads(&process, range, &vec![0; words(BIG)]).await;
}

pub async fn migrate_anon_huge_free(machine: Machine) {
    let (process, mirror, range) = machine.with_big_numbers().await;
    move_and_check(&mirror, range, BIG, &numbers(BIG, 0)).await;
    process.discard(range).await;
    assert_eq!(process.resident(machine.devices[0].owner), []);
    reads(&process, range, &vec![0; words(BIG)]).await;
}

pub async fn migrate_anon_huge_fault(machine: Machine) {
    let (process, mirror, range) = machine.with_big_numbers().await;
    move_and_check(&mirror, range, BIG, &numbers(BIG, 0)).await;
    reads(&process, range, &numbers(BIG, 0)).await;
}

/// Half a block, at each of these pages of it.
const OFFSETS: [u64; 3] = [0, BIG / 4, BIG / 2];

pub async fn migrate_partial_unmap_fault(machine: Machine) {
    for big in [false, true] {
        for offset in OFFSETS {
            let (process, mirror, range) = match big {
                true => machine.with_big_numbers().await,
                false => machine.with_numbers(BIG).await,
            };
            move_and_check(&mirror, range, BIG, &numbers(BIG, 0)).await;
            process.unmap(part(range, offset, BIG / 2)).await;
            for page in 0..BIG {
                let read = process.read(part(range, page, 1).start(), WORDS).await;
                if (offset..offset + BIG / 2).contains(&page) {
                    assert_eq!(read, Err(Fault::NotReadable { page: range.start() / PAGE + page }));
                } else {
                    same(&read.unwrap(), &numbers(1, page * WORDS as u64));
                }
            }
        }
    }
}

pub async fn migrate_remap_fault(machine: Machine) {
    for (before, keep, big) in (0..8).map(|bits| (bits & 1 != 0, bits & 2 != 0, bits & 4 != 0)) {
        for offset in OFFSETS {
            let (process, mirror, range) = machine.with_buffer(8 * BIG, Protection::WRITE);
            let from = part(range, 0, BIG);
            if big {
                process.advise_big(from);
            }
            process.unmap(part(range, BIG, 2 * BIG)).await;
            process.write(from.start(), &numbers(BIG, 0)).await.unwrap();
            let to = part(range, BIG + offset, BIG);
            let mut at = from;
            if before {
                at = process.remap(from, to.start(), keep).await;
            }
            move_and_check(&mirror, at, BIG, &numbers(BIG, 0)).await;
            if !before {
                at = process.remap(from, to.start(), keep).await;
            }
            assert_eq!(at, to);
            reads(&process, at, &numbers(BIG, 0)).await;
            let page = from.start() / PAGE;
            let left = if keep { Ok(vec![0]) } else { Err(Fault::NotReadable { page }) };
            assert_eq!(process.read(from.start(), 1).await, left);
            process.unmap(at).await;
        }
    }
}
