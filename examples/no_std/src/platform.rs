//! What a machine without an operating system has to provide: memory, a way in, a way out.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr;
use spin::mutex::SpinMutex;

/// Blocks of sizes that are powers of two, each size with a list of those that were given back.
struct Blocks {
    memory: UnsafeCell<[u8; SIZE]>,
    state: SpinMutex<State>,
}

const SIZE: usize = 4 << 20;
const LEAST: usize = 16;
const SIZES: usize = 20;

struct State {
    used: usize,
    free: [Option<usize>; SIZES],
}

// SAFETY: `memory` is only reached through blocks, which `state` gives out once each.
unsafe impl Sync for Blocks {}

impl Blocks {
    /// Which size holds `layout`: a block is aligned to its size.
    fn size(layout: Layout) -> Option<usize> {
        let bytes = layout.size().max(layout.align()).max(LEAST).checked_next_power_of_two()?;
        let size = (bytes.trailing_zeros() - LEAST.trailing_zeros()) as usize;
        (size < SIZES).then_some(size)
    }
}

// SAFETY: a block is given out once until it comes back, is as large and as aligned as asked for,
// and lies in `memory`.
unsafe impl GlobalAlloc for Blocks {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(size) = Self::size(layout) else { return ptr::null_mut() };
        let (start, mut state) = (self.memory.get().cast::<u8>(), self.state.lock());
        if let Some(at) = state.free[size].take() {
            // SAFETY: `at` is a block of this size that was given back; its first word says which
            // was given back before it.
            unsafe {
                let next = start.add(at).cast::<usize>().read();
                state.free[size] = (next != usize::MAX).then_some(next);
                return start.add(at);
            }
        }
        let bytes = LEAST << size;
        let at = (start as usize + state.used).next_multiple_of(bytes) - start as usize;
        if at + bytes > SIZE {
            return ptr::null_mut();
        }
        state.used = at + bytes;
        // SAFETY: inside `memory`.
        unsafe { start.add(at) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let Some(size) = Self::size(layout) else { return };
        let mut state = self.state.lock();
        let at = block as usize - self.memory.get() as usize;
        // SAFETY: the block is ours again, and at least a word long.
        unsafe { block.cast::<usize>().write(state.free[size].unwrap_or(usize::MAX)) };
        state.free[size] = Some(at);
    }
}

#[global_allocator]
static MEMORY: Blocks = Blocks {
    memory: UnsafeCell::new([0; SIZE]),
    state: SpinMutex::new(State { used: 0, free: [None; SIZES] }),
};

/// The way in: a boot loader's, or that of the few instructions below.
#[unsafe(no_mangle)]
extern "C" fn start() -> ! {
    match crate::run() {
        Ok(()) => exit("no_std: 1000 invalidations beside 3 readers, no stale mapping\n", 0),
        Err(error) => exit(error, 1),
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    exit("no_std: panicked\n", 101)
}

/// `core` was compiled to be unwound through, and refers to this where nothing was optimised away.
/// Nothing unwinds here.
#[cfg(target_os = "linux")]
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// What the compiler calls to copy, fill and compare memory; on a machine without an operating
/// system its own runtime has them.
#[cfg(target_os = "linux")]
mod memory {
    use core::arch::asm;

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
        // SAFETY: the caller's obligation: `len` bytes on both sides, which do not overlap.
        unsafe {
            asm!("rep movsb", inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _)
        };
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
        if (to as usize).wrapping_sub(from as usize) >= len {
            // SAFETY: copied upwards, nothing is overwritten before it is read.
            return unsafe { memcpy(to, from, len) };
        }
        // SAFETY: copied downwards, from the last byte on; there is one, because the ranges
        // overlap.
        unsafe {
            let (last_to, last_from) = (to.add(len).sub(1), from.add(len).sub(1));
            asm!("std", "rep movsb", "cld", inout("rcx") len => _, inout("rdi") last_to => _, inout("rsi") last_from => _);
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
        // SAFETY: the caller's obligation: `len` bytes.
        unsafe {
            asm!("rep stosb", inout("rcx") len => _, inout("rdi") to => _, in("al") byte as u8)
        };
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
        for at in 0..len {
            // SAFETY: the caller's obligation: `len` bytes on both sides.
            let (a, b) = unsafe { (a.add(at).read_volatile(), b.add(at).read_volatile()) };
            if a != b {
                return i32::from(a) - i32::from(b);
            }
        }
        0
    }
}

// The stack is aligned as a function expects it after a call.
#[cfg(target_os = "linux")]
core::arch::global_asm!(".globl _start", "_start:", "and rsp, -16", "call {start}", "ud2", start = sym start);

/// The way out on Linux: two system calls.
#[cfg(target_os = "linux")]
fn exit(message: &str, code: i32) -> ! {
    // SAFETY: `write` reads the message; `exit_group` does not return.
    unsafe {
        core::arch::asm!("syscall", inlateout("rax") 1_usize => _, in("rdi") 1, in("rsi") message.as_ptr(), in("rdx") message.len(), out("rcx") _, out("r11") _);
        core::arch::asm!("syscall", in("rax") 231, in("rdi") code, options(noreturn));
    }
}

/// Without an operating system: the machine stops.
#[cfg(not(target_os = "linux"))]
fn exit(_message: &str, _code: i32) -> ! {
    loop {
        core::hint::spin_loop();
    }
}
